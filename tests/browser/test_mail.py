"""Held and dead mail in a real browser: the cards come live, and their buttons move the message without a reload."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.needs import ROOT


def test_the_buttons_of_held_and_dead_mail_do_what_they_say(tmp_path: Path) -> None:
    # A process of its own: trio-asyncio, which the hive needs, changes asyncio for all that is imported beside it,
    # playwright among it.
    subprocess.run([sys.executable, "-m", "tests.browser.mail_hive", str(tmp_path)], cwd=ROOT, check=True, timeout=300)
