"""The processes that come from this one: a turn leaves none of them behind.

A program's shell commands run in process groups and sessions of their own, so killing its group is not enough. As
the reaper of its orphans this process stays the ancestor of all of them, and /proc says who they are.
"""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import trio

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 5.0
_adopting = False


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends: prctl(2). Where that fails, orphans escape.

    For a process all of whose descendants are the program's: from now on `end_descendants` ends every one.
    """
    global _adopting
    _adopting = True
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def end_descendants() -> int:
    """Kill and reap every descendant, if they were adopted; returns how many were found at first.

    No child may be waited for elsewhere at that moment.
    Runs to its end even when cancelled, which takes at most 5 seconds: a process can be past killing for a while.
    """
    found = 0
    if not _adopting:
        return found
    with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE_S):
        while pids := descendants():
            found = found or len(pids)
            for pid in pids:
                _kill(pid)
            _reap()
            await trio.sleep(0.005)
    return found


def descendants() -> list[int]:
    """The ids of all processes that have this one among their ancestors, zombies included."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, parentheses too: what follows the last one is plain.
            parent = int(path.read_bytes().rpartition(b")")[2].split()[1])
        except OSError:
            continue  # it ended just now
        children.setdefault(parent, []).append(int(path.parent.name))
    found: list[int] = []
    level = children.get(os.getpid(), [])
    while level:
        found += level
        level = [grandchild for child in level for grandchild in children.get(child, [])]
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return
