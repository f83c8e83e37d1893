"""Starts what keeps an agent's prints: printed.py, a process of its own that outlives the daemon as the agent does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

from hive_core.containers import printed


def start_keeper(path: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start what keeps an agent's prints in a file: (where to print, it). Raises OSError."""
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as undo:
        undo.callback(theirs.close)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
            # Held for as long as something may still be written; what an agent of before left behind may hold it.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By its path, not as a module: it needs nothing of the package, and nothing of site-packages.
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(printed.__file__)],
                stdin=ours.fileno(),
                stdout=file,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        undo.pop_all()
    return theirs, keeper
