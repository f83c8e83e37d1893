"""One process of the agent's program: it is told lines and tells lines, for one turn or for many."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from hive_agent.descendants import end_descendants
from hive_core.protocol.lines import LineSplitter
from hive_core.protocol.refusal import Refusal

# Far above what is passed on to the host: the line that says how the turn ended must be read whatever its length.
READ_LIMIT_BYTES = 16 * 1024 * 1024
READ_BYTES = 64 * 1024
LINGER_S = 10.0
DRAIN_S = 1.0
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Line = bytes | Refusal  # a Refusal for one that is too long to read


def _ignore(_: Line) -> None:
    return


@dataclass(frozen=True, slots=True)
class Command:
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str


class _Lines:
    """The lines that come through a pipe. A read that is cancelled loses none of them."""

    def __init__(self, pipe: trio.abc.ReceiveStream) -> None:
        self.pipe = pipe
        self._splitter = LineSplitter(READ_LIMIT_BYTES)
        self._ready: deque[Line] = deque()
        self._at_end = False

    async def next(self) -> Line | None:
        """The next line, the last one also without its end; None behind it."""
        while not self._ready and not self._at_end:
            data = await self.pipe.receive_some(READ_BYTES)
            self._at_end = not data
            if data or self._splitter.unfinished:
                self._ready.extend(self._splitter.feed(bytes(data) or b"\n"))
        return self._ready.popleft() if self._ready else None


class Program:
    """A process that runs. Whoever starts it ends it, by `finish` or `kill`: then nothing that it started runs on."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout, self._stderr = _Lines(process.stdout), _Lines(process.stderr)

    @classmethod
    async def start(cls, command: Command) -> Program:
        """Raises OSError when it cannot be started."""
        return cls(
            await trio.lowlevel.open_process(
                list(command.argv),
                env=dict(command.env),
                cwd=command.cwd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def memory_bytes(self) -> int:
        """What the process itself has in memory now; 0 when it has ended."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * PAGE_BYTES
        return 0

    async def tell(self, line: bytes) -> None:
        """Write to its stdin. One that ends without reading says why by its output."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stdin.send_all(line)

    async def read(self, read_stdout: Callable[[Line], bool], read_stderr: Callable[[Line], object]) -> bool:
        """Hand its lines on until `read_stdout` has enough, which is true, or it has ended, which is false.

        One that closes its stdout and goes on has LINGER_S to end. Cancelled, it loses no line: the next call goes on.
        """
        enough = False
        with trio.CancelScope() as pipes:

            async def read_until_enough() -> None:
                nonlocal enough
                while (line := await self._stdout.next()) is not None:
                    if read_stdout(line):
                        enough = True
                        pipes.cancel()
                        return
                pipes.deadline = min(pipes.deadline, trio.current_time() + LINGER_S)

            async def read_all() -> None:
                while (line := await self._stderr.next()) is not None:
                    read_stderr(line)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_until_enough)
                nursery.start_soon(read_all)
                await self._process.wait()
                # What the program left running may hold its pipes open for ever.
                pipes.deadline = trio.current_time() + DRAIN_S
        return enough

    async def finish(
        self,
        read_stdout: Callable[[Line], object] = _ignore,
        read_stderr: Callable[[Line], object] = _ignore,
        patience_s: float | None = None,
    ) -> int | None:
        """Let it end by closing its stdin, and hand on what it still says.

        Its exit code, negative for a signal. None when it did not end within `patience_s`, LINGER_S by
        default, and was killed.
        """
        try:
            await self._stdin.aclose()
            with trio.move_on_after(LINGER_S if patience_s is None else patience_s):
                await self.read(lambda line: bool(read_stdout(line)) and False, read_stderr)
            return self._process.returncode
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End it and all that it started, now. Runs to its end even when cancelled."""
        with trio.CancelScope(shield=True):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
            await end_descendants()
            for pipe in (self._stdin, self._stdout.pipe, self._stderr.pipe):
                await pipe.aclose()
