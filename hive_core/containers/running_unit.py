"""An agent that runs as a unit of systemd's: its end is seen by its main process, and told by what the unit wrote."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.process_tree import first_in_namespace
from hive_core.containers.running import Exit, Running
from hive_core.protocol.refusal import Refusal

log = logging.getLogger(__name__)
_SETTLES_WITHIN_S = 120.0  # what is left of it is killed by systemd


class RunningUnit(Running):
    """
    pid         of the unit's main process, systemd-nspawn; 0 when the unit has ended already
    invocation  names this run of the unit
    ask         asks the harness inside to end
    """

    def __init__(
        self,
        host: NixosHost,
        unit: str,
        pid: int,
        invocation: str,
        end_file: Path,
        ask: Callable[[], Awaitable[None]],
    ) -> None:
        self._host = host
        self._unit = unit
        self._pid = pid
        self._end_file = end_file
        self._ask = ask
        self._asked = trio.Event()
        self.invocation = invocation
        self._pidfd: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid) if pid else None

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def ended(self) -> bool:
        return self._pidfd is None

    def copy_descriptor(self) -> int | None:
        """A pidfd of its main process, to be closed by whoever asked; None when its end was seen."""
        return None if self._pidfd is None else os.dup(self._pidfd)

    async def wait(self) -> Exit:
        if self._pidfd is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._ask_when_told)
                await trio.lowlevel.wait_readable(self._pidfd)
                nursery.cancel_scope.cancel()
            self._close()
        with contextlib.suppress(Refusal):  # systemd that says nothing: what was written is all there is
            await self._host.settled(self._unit, _SETTLES_WITHIN_S)
        return Exit(exit_code(self._end_file, self.invocation))

    def stop(self) -> None:
        self._asked.set()

    def kill(self) -> None:
        """Kill systemd-nspawn: systemd then kills all that is left in the unit."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def first_inside(self) -> int | None:
        """The host's number of the container's first process; None when there is none (any more)."""
        return None if self._pidfd is None else first_in_namespace(self._pid)

    async def _ask_when_told(self) -> None:
        await self._asked.wait()
        try:
            await self._ask()
        except Refusal as refusal:
            log.warning("%s could not be asked to stop: %s", self._unit, refusal.message)

    def _close(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def exit_code(end_file: Path, invocation: str) -> int | None:
    """The code that one run of a unit ended with, as its ExecStopPost wrote it; None when a signal ended it."""
    with contextlib.suppress(OSError, ValueError):
        told, how, status = end_file.read_text().split()
        if told == invocation and how == "exited":
            return int(status)
    return None
