"""Processes as /proc shows them: which one a pid means, and all that come from it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_KILL_ROUNDS = 100  # each ends what was born during the one before: two are enough, but for who forks all the time


def _stat_fields(pid: int) -> list[str]:
    # The command's name is in parentheses and may hold any byte, which its owner chooses: count from behind it.
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


def boot_id() -> str:
    """Names this boot of the kernel: pids and start times begin anew with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the pid it names one process for ever."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def parent_of(pid: int) -> int | None:
    """The pid of its parent; None when it is gone."""
    try:
        return int(_stat_fields(pid)[1])
    except OSError:
        return None


def all_pids() -> list[int]:
    """Every process that /proc shows, of whomever."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def kill_descendants(root: int) -> None:
    """Kill all that comes from a process that is stopped, and what is born meanwhile, until nothing new is found.

    Who was sent SIGKILL has no more children: a round that finds nobody new is the last. Zombies are looked through,
    not killed; they stay, so that nobody loses their ancestor between two looks.
    """
    killed: set[tuple[int, int]] = set()
    for _ in range(_KILL_ROUNDS):
        fresh = _descendants(root) - killed
        if not fresh:
            return
        for pid, started in fresh:
            _kill_the(pid, started)
        killed |= fresh


def _kill_the(pid: int, started: int) -> None:
    """Kill one process; a stranger that has its pid by now started later, and is left alone."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if start_time(pid) == started:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _descendants(root: int) -> set[tuple[int, int]]:
    """All that comes from a process: (pid, start time)."""
    seen: dict[int, tuple[int, int]] = {}
    for pid in all_pids():
        with contextlib.suppress(OSError):
            fields = _stat_fields(pid)
            seen[pid] = int(fields[1]), int(fields[19])
    children: dict[int, list[int]] = {}
    for pid, (parent, started) in seen.items():
        # Nobody is older than its parent: that number went to another while we looked.
        if parent in seen and seen[parent][1] <= started:
            children.setdefault(parent, []).append(pid)
    found, level = set(), children.get(root, [])
    while level:
        found |= {(pid, seen[pid][1]) for pid in level}
        level = [grandchild for child in level for grandchild in children.get(child, [])]
    return found


def wait_stopped(pid: int) -> None:
    """A stop counts once the process has left what it was doing in the kernel: some microseconds."""
    with contextlib.suppress(OSError):
        for _ in range(1000):
            if _stat_fields(pid)[0] in "TtZX":
                return
            time.sleep(0.0001)


def first_in_namespace(root: int) -> int | None:
    """The first process of a pid namespace below ours that comes from one, by its number here; None: there is none."""
    return numbered_inside(root, 1)


def numbered_inside(root: int, number: int) -> int | None:
    """The process that has a number in a pid namespace below ours and comes from one, by its number here; or None."""
    for pid in sorted({root, *(pid for pid, _ in _descendants(root))}):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_bytes()  # of its name the kernel keeps nothing out but line feeds
            numbers = next(line.split()[1:] for line in status.split(b"\n") if line.startswith(b"NSpid:"))
            if len(numbers) > 1 and int(numbers[-1]) == number:
                return pid
    return None


def folder_id(path: str | Path) -> tuple[int, int]:
    """Names a directory, also when another has its path by now. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def kill_that_see(folder: tuple[int, int], at: str) -> None:
    """Kill every process in another mount namespace than ours that has a directory (`folder_id`) at a path."""
    ours = os.stat("/proc/self/ns/mnt")
    for pid in all_pids():
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/ns/mnt"), ours) or folder_id(f"/proc/{pid}/root{at}") != folder:
                continue
            # Of whoever has this number from here on, that is still so when it is killed.
            started = start_time(pid)
            if started is not None and folder_id(f"/proc/{pid}/root{at}") == folder:
                _kill_the(pid, started)


def usage_below(root: int) -> tuple[int, int]:
    """How many processes there are from one downwards, itself among them, and the bytes they hold in memory."""
    page, held, count = os.sysconf("SC_PAGE_SIZE"), 0, 0
    for pid in (root, *(pid for pid, _ in _descendants(root))):
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            held, count = held + pages * page, count + (pages > 0)  # who has ended has none
    return count, held
