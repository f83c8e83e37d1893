"""git's own services on the connected socket of an agent: the pipes by which one asks, and its end.

What git leaves when it is killed is known from what it tells of itself, and removed when the last of its processes
has gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from select import PIPE_BUF

import trio

from hive_core.git.pushes import ASK_LIMIT_BYTES
from hive_core.protocol.words import AgentName

SEATS = 8  # gits of all agents together
ENDED = b"\n.\n"  # of what the hook asks
END_S = 10.0  # that processes which were killed have to be gone
# What git tells of a process that has objects of a push to look at: "incoming" alone is of old releases.
_QUARANTINE = re.compile(rb'"param":"GIT_QUARANTINE_PATH","value":"[^"]*/((?:tmp_objdir-)?incoming-\w+)"')
_TRACE_KEPT = 8 * 1024
TRACED = {"GIT_TRACE2_ENV_VARS": "GIT_QUARANTINE_PATH"}


class Seats:
    """How many gits run at once, each of which may take its memory. Of those of the second half every agent has one:
    so none keeps all others out."""

    def __init__(self, most: int = SEATS) -> None:
        self._most = most
        self._taken: Counter[AgentName] = Counter()
        self._waiting = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def seat(self, agent: AgentName) -> AsyncIterator[None]:
        """Wait for one, and have it."""
        while not self._is_room(agent):
            await self._waiting.park()
        self._taken[agent] += 1
        try:
            yield
        finally:
            self._taken -= Counter({agent: 1})
            self._waiting.unpark_all()

    def _is_room(self, agent: AgentName) -> bool:
        taken = self._taken.total()
        return taken < (self._most if not self._taken[agent] else self._most // 2)


class Pipes:
    """Three pipes: in one the hook asks, from another it reads the answer, and in the last git tells what it does."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        try:
            self._ask, self.hooks_ask = self._pipe()
            self.hooks_answer, self._answer = self._pipe()
            self._trace, self.gits_trace = self._pipe()
        except OSError:
            self._close(*self._open)
            raise
        for descriptor in (self._ask, self._trace):
            os.set_blocking(descriptor, False)
        self._told = b""
        self.quarantine: str | None = None  # the directory of objects that came, whatever git made of them

    def _pipe(self) -> tuple[int, int]:
        both = os.pipe2(os.O_CLOEXEC)
        self._open.update(both)
        return both

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(*self._open)

    def _close(self, *descriptors: int) -> None:
        for descriptor in self._open.intersection(descriptors):
            self._open.discard(descriptor)
            os.close(descriptor)

    @property
    def of_git(self) -> tuple[int, int, int]:
        return self.hooks_ask, self.hooks_answer, self.gits_trace

    def hand_over(self) -> None:
        """git has its ends now, and when they are closed all of its processes have gone."""
        self._close(*self.of_git)

    def say(self, answer: bytes) -> None:
        """Answer, with as much as any pipe has room for: else a client that does not read would hold up the daemon.
        Who does not listen any more has gone."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._answer, answer[:PIPE_BUF])
        self._close(self._answer)

    async def read_question(self) -> bytes:
        """What the hook asks; of more than ASK_LIMIT_BYTES the beginning, and one byte more than that.

        Nothing where git ended without a question.
        """
        asked, end = b"", b""
        while end != ENDED:
            await trio.lowlevel.wait_readable(self._ask)
            if not (data := os.read(self._ask, ASK_LIMIT_BYTES)):
                return b""
            asked = (asked + data)[: ASK_LIMIT_BYTES + 1]
            end = (end + data)[-len(ENDED) :]  # it is read to its end: else the hook would not come to the answer
        return asked.removesuffix(b".\n")

    async def watch(self) -> None:
        """See whether git is given objects, until the last of its processes has gone."""
        while True:
            await trio.lowlevel.wait_readable(self._trace)
            if not (data := os.read(self._trace, ASK_LIMIT_BYTES)):
                return
            self._told = self._told[-_TRACE_KEPT:] + data
            if self.quarantine is None and (found := _QUARANTINE.search(self._told)):
                self.quarantine = found[1].decode()

    async def clear(self, mirror: Path) -> None:
        """When git has gone, remove the objects that it held back, which one that was killed leaves."""
        self.hand_over()
        with trio.move_on_after(END_S):
            await self.watch()
        if self.quarantine is not None:
            leaving = mirror / "objects" / self.quarantine
            await trio.to_thread.run_sync(lambda: shutil.rmtree(leaving, ignore_errors=True))


async def serve_git(
    command: Sequence[str],
    environment: dict[str, str],
    sock: socket.socket,
    time_s: float,
    descriptors: Sequence[int] = (),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run git on a connected socket to its end, or for so long."""
    sock.setblocking(True)  # it is one with git's
    process = await trio.lowlevel.open_process(
        command,
        stdin=sock.fileno(),
        stdout=sock.fileno(),
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        start_new_session=True,
        pass_fds=descriptors,
    )
    try:
        task_status.started()
        with trio.move_on_after(time_s):
            await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
