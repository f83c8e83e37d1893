"""A command of the host's that is given a time and a measure."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import trio

from hive_core.containers.process_tree import kill_descendants, wait_stopped
from hive_core.containers.running import Done
from hive_core.protocol.refusal import Refusal

OUTPUT_LIMIT_BYTES = 256 << 10


class TookTooLong(Refusal):
    """It was killed since its time was over."""

    def __init__(self, patience_s: float) -> None:
        super().__init__("failed", f"the command did not end within {patience_s:g} s and was killed; give it more time")


async def run_command(
    command: Sequence[str], patience_s: float, environment: Mapping[str, str] = MappingProxyType({})
) -> Done:
    """Run a command to its end, in an environment of these alone. What it prints beyond the limit is dropped.

    Raises Refusal when it cannot be run, and TookTooLong when it did: then all that comes from it was killed.
    """
    try:
        process = _begin(command, environment)
    except OSError as exc:
        raise Refusal("failed", f"cannot run {command[0]}: {exc.strerror}; install it, or mend its path") from None
    assert process.stdout is not None
    output = bytearray()
    with process.stdout, trio.move_on_after(patience_s) as scope:
        try:
            os.set_blocking(process.stdout.fileno(), False)
            await _read(process.stdout.fileno(), output)
            await _wait(process)
        finally:
            _end(process)
    if scope.cancelled_caught:
        raise TookTooLong(patience_s)
    return Done(process.returncode, bytes(output).decode("utf-8", "replace"))


def _begin(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd="/",
        start_new_session=True,
    )


async def _read(pipe: int, output: bytearray) -> None:
    while True:
        await trio.lowlevel.wait_readable(pipe)
        piece = os.read(pipe, 64 << 10)
        if not piece:
            return
        output += piece[: OUTPUT_LIMIT_BYTES - len(output)]


async def _wait(process: subprocess.Popen[bytes]) -> None:
    descriptor = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        wait_stopped(process.pid)
        kill_descendants(process.pid)
        process.kill()
        process.wait()
