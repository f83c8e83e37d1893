"""Disks that are soon full, for tests that run as root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def _why_no_mount() -> str | None:
    trial = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"no small disk can be mounted: {done.stderr.strip()} (run as root)" if done.returncode else None


_no_mount = _why_no_mount()
small_disks = pytest.mark.skipif(_no_mount is not None, reason=str(_no_mount))


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A new folder that holds so much, such as "64m", while the block runs."""
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
