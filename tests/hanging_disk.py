"""A directory on a disk that hangs: a FUSE mount whose requests nobody answers, until it is let go."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """Whoever looks into the directory waits for as long as the block runs; what was there is there again then."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        assert os.environ.get("HIVE_REQUIRE") != "ci", "mounting needs root and /dev/fuse"
        pytest.skip("mounting needs root and /dev/fuse")
    kernel = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={kernel},rootmode=40000,user_id=0,group_id=0,allow_other"
    mounted = subprocess.run(
        ["mount", "-i", "-t", "fuse", "-o", options, "hanging", str(folder)],
        pass_fds=[kernel],
        capture_output=True,
        text=True,
    )
    try:
        assert mounted.returncode == 0, mounted.stderr
        yield
    finally:
        os.close(kernel)  # who waits is told that it is not connected
        subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
