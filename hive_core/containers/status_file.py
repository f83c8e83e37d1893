"""An agent's status file: bwrap writes into it, and whoever holds its lock is the agent."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import signal
import time
from pathlib import Path

from hive_core.containers.process_tree import all_pids, folder_id, parent_of

_KILL_ROUNDS = 1000  # a millisecond each: it ends at once, but for what it does in the kernel


def claim(status: io.FileIO) -> None:
    """Lock an agent's status file and empty it: what is started with it holds the lock for as long as it lives."""
    try:
        fcntl.flock(status, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise BlockingIOError(exc.errno, "it runs already, and holds its status file", status.name) from None
    status.truncate(0)


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock on the file; a file that cannot be opened is nobody's."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def lock_holder(status: Path) -> int | None:
    """The agent that holds its status file locked, or None. All processes are looked at only when somebody does."""
    if not is_locked(status):
        return None
    path = os.path.realpath(status)
    holders = [pid for pid in all_pids() if _holds_lock(pid, path)]
    # What an agent has just forked has its descriptors too, for a moment. What the daemon before had just forked does
    # not count: it had that daemon's own lock as well, and while somebody has that no other daemon begins.
    return next((pid for pid in holders if parent_of(pid) not in holders), None)


def end_holders(status: Path) -> None:
    """Kill whoever holds an agent's status file locked."""
    for _ in range(_KILL_ROUNDS):
        if (pid := lock_holder(status)) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _holds_lock(pid: int, path: str) -> bool:
    """Whether a process has a file open by a descriptor that locks it; whoever just reads the file has no lock."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                    locks = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
                    if "FLOCK  ADVISORY  WRITE" in locks:
                        return True
    return False


def status_value(path: Path, key: str) -> int | None:
    """One value of bwrap's status file, which holds a JSON object a line."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for line in path.read_text().splitlines():
            value = json.loads(line).get(key)
            if isinstance(value, int):
                return value
    return None


def end_inside(status: Path, state: tuple[int, int]) -> None:
    """When bwrap itself was killed, what it watched runs on, without anybody: end that too."""
    inner = status_value(status, "child-pid")
    if inner is None or status_value(status, "exit-code") is not None:
        return
    with contextlib.suppress(OSError):
        # The pid may be another's by now: only what is in this agent's sandbox has this directory there.
        if folder_id(f"/proc/{inner}/root/state") == state:
            os.kill(inner, signal.SIGKILL)
