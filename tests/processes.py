"""Processes of the host, as a test finds and awaits them."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 60.0  # of every test: on a machine that is slow and loaded, what takes a moment takes many
_LOOK_AGAIN_S = 0.002  # what is waited for needs the processor more
PROGRAMS = os.environ["PATH"]  # where this system has them: NixOS has none in /usr/bin


def look_until(look: Callable[[], T]) -> T:
    """What it finds, as soon as there is something: for what the kernel tells nobody of."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing was found"
        time.sleep(_LOOK_AGAIN_S)
    return found


def pids_naming(text: str) -> list[int]:
    """The processes, apart from this one, whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def children_of(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_gone(*pids: int) -> None:
    """Return when none of them runs."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], PATIENCE_S)[0], f"process {pid} lives on"
        finally:
            os.close(descriptor)
