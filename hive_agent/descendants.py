"""The processes that come from this one: a turn leaves none of them behind.

A program's shell commands run in process groups and sessions of their own, so killing its group is not enough. As
the reaper of its orphans this process stays the ancestor of all of them, and /proc says who they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import trio

_PR_SET_CHILD_SUBREAPER = 36
_PATIENCE_S = 5.0
_adopting = False
_spared: set[int] = set()  # sessions of processes that are not the program's


class Process(NamedTuple):
    """One line of /proc."""

    pid: int
    parent: int
    session: int


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends: prctl(2). Where that fails, orphans escape.

    For a process all of whose descendants are the program's, but for the sessions that are spared: from now on
    `end_descendants` ends every one.
    """
    global _adopting
    _adopting = True
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def spare(session: int) -> None:
    """The processes of that session, and what descends from them, are not the program's."""
    _spared.add(session)


async def end_session(session: int) -> None:
    """Kill and reap what is left of a session that was spared. Runs to its end even when cancelled."""
    with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE_S):
        while pids := [one.pid for one in _processes() if one.session == session]:
            await _end(pids)
    _spared.discard(session)


async def end_descendants() -> int:
    """Kill and reap every descendant of the program, if they were adopted; returns how many were found at first.

    None of them may be waited for elsewhere at that moment.
    Runs to its end even when cancelled, which takes at most 5 seconds: a process can be past killing for a while.
    """
    found = 0
    if not _adopting:
        return found
    with trio.CancelScope(shield=True), trio.move_on_after(_PATIENCE_S):
        while pids := descendants():
            found = found or len(pids)
            await _end(pids)
    return found


def descendants() -> list[int]:
    """The ids of all processes that have this one among their ancestors, zombies included, but for spared ones."""
    return [one.pid for one in _family(_spared)]


def _processes() -> Iterator[Process]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything, parentheses too: what follows the last one is plain.
            _, parent, _, session = path.read_bytes().rpartition(b")")[2].split()[:4]
        except (OSError, ValueError):
            continue  # it ended just now
        yield Process(int(path.parent.name), int(parent), int(session))


def _family(without: Collection[int]) -> list[Process]:
    """Every descendant, but for those of some sessions and what descends from them."""
    children: dict[int, list[Process]] = {}
    for process in _processes():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    level = children.get(os.getpid(), [])
    while level := [one for one in level if one.session not in without]:
        found += level
        level = [child for one in level for child in children.get(one.pid, [])]
    return found


async def _end(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap(pids)
    await trio.sleep(0.005)


def _reap(pids: list[int]) -> None:
    """Those that are our own children by now; the others will be when their parents have ended."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
