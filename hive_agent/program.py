"""One run of the agent's program: a process that gets a prompt on stdin and is read line by line until it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from hive_agent.descendants import end_descendants
from hive_core.protocol.lines import LineSplitter
from hive_core.protocol.refusal import Refusal

# Far above what is passed on to the host: the line that says how the turn ended must be read whatever its length.
READ_LIMIT_BYTES = 16 * 1024 * 1024
READ_BYTES = 64 * 1024
LINGER_S = 10.0
DRAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Command:
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    prompt: bytes


LineReader = Callable[[bytes | Refusal], None]


async def run_program(
    command: Command, read_stdout: LineReader, read_stderr: LineReader, is_over: Callable[[], bool]
) -> int | None:
    """Run the command to its end and return its exit code, negative for a signal.

    `is_over` says, after each line, that the program has told its result: if it still runs 10 s later it is killed,
    and the code is None. However this ends, cancelled too, nothing that the program started runs on.
    Raises OSError when it cannot be started.
    """
    process = await trio.lowlevel.open_process(
        list(command.argv),
        env=dict(command.env),
        cwd=command.cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        with trio.CancelScope() as lingering:

            def read(line: bytes | Refusal) -> None:
                read_stdout(line)
                if is_over() and lingering.deadline == float("inf"):
                    lingering.deadline = trio.current_time() + LINGER_S

            async with trio.open_nursery() as pipes:
                pipes.start_soon(_feed, process.stdin, command.prompt)
                pipes.start_soon(_read_lines, process.stdout, read)
                pipes.start_soon(_read_lines, process.stderr, read_stderr)
                await process.wait()
                # What the program left running may hold its pipes open for ever.
                pipes.cancel_scope.deadline = trio.current_time() + DRAIN_S
        return process.returncode
    finally:
        await _end(process)


async def _end(process: trio.Process) -> None:
    with trio.CancelScope(shield=True):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await end_descendants()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                await pipe.aclose()


async def _feed(stdin: trio.abc.SendStream, prompt: bytes) -> None:
    # It may end without reading; then its output says why.
    with contextlib.suppress(trio.BrokenResourceError):
        await stdin.send_all(prompt)
    await stdin.aclose()


async def _read_lines(pipe: trio.abc.ReceiveStream, read: LineReader) -> None:
    splitter = LineSplitter(READ_LIMIT_BYTES)
    while data := await pipe.receive_some(READ_BYTES):
        for line in splitter.feed(bytes(data)):
            read(line)
    if splitter.unfinished:
        for line in splitter.feed(b"\n"):
            read(line)
