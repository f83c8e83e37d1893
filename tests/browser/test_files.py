"""Files in a real browser: picked, dropped and pasted into the composer, sent, and taken back as downloads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.needs import ROOT


def test_the_composer_sends_files_that_were_picked_dropped_or_pasted(tmp_path: Path) -> None:
    # A process of its own: trio-asyncio, which the hive needs, changes asyncio for all that is imported beside it,
    # playwright among it.
    subprocess.run([sys.executable, "-m", "tests.browser.files_hive", str(tmp_path)], cwd=ROOT, check=True, timeout=300)
