"""An agent that runs: its end, seen or brought about."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from hive_core.containers.process_tree import kill_descendants, wait_stopped
from hive_core.containers.scopes import unit_of
from hive_core.containers.status_file import is_locked, status_value

_KILL_PATIENCE_S = 5.0  # a process can be past killing for a while
_LOG_PATIENCE_S = 1.0  # what an agent left behind may print on: its exit is told all the same


@dataclass(frozen=True, slots=True)
class Exit:
    code: int | None  # None: it was ended from outside and left no code
    with_machine: bool = False  # the machine went down with it


@dataclass(frozen=True, slots=True)
class Usage:
    """What an agent takes of the host."""

    processes: int
    memory_bytes: int  # what its processes hold in memory; what two share counts twice


@dataclass(frozen=True, slots=True)
class Done:
    """A command that ended in an agent's container."""

    code: int  # negative for a signal
    output: str  # what it printed, both ways in one; at most OUTPUT_LIMIT_BYTES of its beginning


@dataclass(frozen=True, slots=True)
class Ways:
    """What a driver knows of its agents' processes."""

    first_inside: Callable[[], int | None]  # the host's number of an agent's first process in its container
    end_left: Callable[[], None]  # ends what may be left of an agent whose wrapper has ended


class Running(Protocol):
    """An agent that runs, whether this daemon started it or an earlier one."""

    @property
    def pid(self) -> int:
        """Its wrapper's, outside of the container."""

    @property
    def ended(self) -> bool:
        """Whether its end was seen."""

    def unit(self) -> Mapping[str, str]:
        """The scope of systemd's that it is in, and its invocation; nothing when it is in none."""
        return unit_of(self.pid)

    async def wait(self) -> Exit:
        """Return when it has ended and what it printed is kept. Cancelling it changes nothing."""

    def stop(self) -> None:
        """Ask the harness to end at its turn's edge, by SIGTERM; nothing when it has ended.

        Like `kill`, it is sure to be carried out only while somebody waits for the end.
        """

    def kill(self) -> None:
        """End the whole agent at once, also what has a session of its own; nothing when it has ended."""


class RunningProcess(Running):
    """One whose wrapper this process may signal."""

    def __init__(
        self,
        pid: int,
        process: subprocess.Popen[bytes] | None,
        status: Path,
        ways: Ways,
        keeper: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self._pid = pid
        self.ways = ways
        self._process = process
        self._keeper = keeper
        self._status = status
        self._pidfd = os.pidfd_open(pid)
        self._ended = False

    @property
    def pid(self) -> int:
        return self._pid

    def copy_descriptor(self) -> int | None:
        """A pidfd of its wrapper's, to be closed by whoever asked; None when its end was seen."""
        return None if self._ended else os.dup(self._pidfd)

    async def wait(self) -> Exit:
        if not self._ended:
            await trio.lowlevel.wait_readable(self._pidfd)
            if self._process is not None:
                self._process.wait()
            self._close()
        with trio.move_on_after(_LOG_PATIENCE_S):
            while self._is_printing():  # noqa: ASYNC110 - another process's end, a few ms away
                await trio.sleep(0.002)
        code = status_value(self._status, "exit-code")
        return Exit(code if code is not None or self._process is None else self._process.returncode)

    def end(self) -> None:
        """End it and return when it is gone; for one that is in nobody's care."""
        self.kill()
        select.select([self._pidfd], [], [], _KILL_PATIENCE_S)
        self._close()

    @property
    def ended(self) -> bool:
        return self._ended

    def stop(self) -> None:
        if not self._ended and (first := self.ways.first_inside()) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)

    def kill(self) -> None:
        if self._ended:
            return
        try:
            # Stopped first: it is the reaper of its orphans, so all that comes from it stays below it meanwhile, and
            # bwrap's child is found in the moment of its birth.
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        except ProcessLookupError:
            return
        wait_stopped(self.pid)
        kill_descendants(self.pid)
        # As long as it has not ended its pid is its own, and so is the group of that number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            os.close(self._pidfd)
        self.ways.end_left()

    def _is_printing(self) -> bool:
        if self._keeper is not None:
            return self._keeper.poll() is None
        return is_locked(self._status.with_suffix(".log"))
