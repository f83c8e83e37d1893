"""Cards in a real browser: a change of 500 files is read, two are approved by keyboard, one that takes its time tells
how far it is; on a phone too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.needs import ROOT


def test_cards_are_read_and_decided_by_mouse_and_by_keyboard_and_tell_how_far_they_are(tmp_path: Path) -> None:
    # A process of its own, as in test_mail.
    command = [sys.executable, "-m", "tests.browser.approvals_hive", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=460)
