"""An agent steered from its page in a real browser: by buttons and /commands, and shown without a reload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.needs import ROOT


def test_an_agent_is_steered_by_its_buttons_and_by_commands_in_its_composer(tmp_path: Path) -> None:
    # A process of its own, as in test_mail.
    command = [sys.executable, "-m", "tests.browser.steering_hive", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
