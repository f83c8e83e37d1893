"""One run of a program, with real processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hive_agent import program
from hive_agent.program import Command, Line, Program
from tests.processes import PATIENCE_S, PROGRAMS, look_until


@asynccontextmanager
async def started(script: str, folder: Path) -> AsyncIterator[Program]:
    running = await Program.start(Command(["/bin/sh", "-c", script], {"PATH": PROGRAMS}, str(folder)))
    try:
        yield running
    finally:
        await running.kill()


async def run(script: str, folder: Path, told: bytes = b"", over: bytes = b"over") -> tuple[int | None, list[bytes]]:
    """Run a shell script to its end: its exit code and the lines of its stdout. `over` is a line that is enough."""
    lines: list[bytes] = []

    def read(line: Line) -> bool:
        assert isinstance(line, bytes)
        lines.append(line)
        return line == over

    command = Command(["/bin/sh", "-c", script], {"PATH": PROGRAMS, "ONLY": "this"}, str(folder))
    with trio.fail_after(PATIENCE_S):
        started = await Program.start(command)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(started.tell, told)
                if not told:
                    await started.read(read, lambda line: None)
                nursery.cancel_scope.deadline = trio.current_time() + PATIENCE_S / 4
            return await started.finish(read), lines
        finally:
            await started.kill()


async def test_the_prompt_is_its_stdin_and_the_environment_is_only_what_was_given(tmp_path: Path) -> None:
    code, lines = await run("cat; pwd; env | grep -v -e ^PWD -e ^_ -e ^SHLVL | sort", tmp_path, b"a prompt\n")
    assert (code, lines) == (0, [b"a prompt", str(tmp_path).encode(), b"ONLY=this", f"PATH={PROGRAMS}".encode()])


async def test_a_program_that_reads_nothing_of_a_long_prompt_just_ends(tmp_path: Path) -> None:
    assert await run("exit 4", tmp_path, b"x" * 1_000_000) == (4, [])


async def test_a_last_line_without_its_end_is_a_line(tmp_path: Path) -> None:
    assert await run("printf 'one\ntwo'", tmp_path) == (0, [b"one", b"two"])


async def test_the_signal_that_ended_it_is_told(tmp_path: Path) -> None:
    assert (await run("kill -9 $$", tmp_path))[0] == -9


async def test_a_program_that_goes_on_after_its_result_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LINGER_S", 0.1)
    assert await run("echo over; exec sleep 600", tmp_path) == (None, [b"over"])


async def test_a_cancelled_run_leaves_no_process(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "trap '' TERM; echo $$ > new; mv new pid; while :; do sleep 1; done", tmp_path)
        await trio.to_thread.run_sync(look_until, written.exists)
        nursery.cancel_scope.cancel()
    assert not Path(f"/proc/{written.read_text().strip()}").exists()


async def test_a_program_that_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await Program.start(Command([str(tmp_path / "none")], {}, str(tmp_path)))


async def test_a_read_that_is_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    """Between two turns somebody else reads, and is cut when the next begins."""
    script = "read _; printf 'one\ntwo\n'; read _; printf 'three\n'"
    async with started(script, tmp_path) as running:
        first: list[Line] = []
        with trio.move_on_after(0.05):
            await running.read(lambda line: first.append(line) or False, lambda line: None)
        await running.tell(b"\n")
        assert await running.read(lambda line: first.append(line) or True, lambda line: None)
        assert first == [b"one"]
        await running.tell(b"\n")
        assert not await running.read(lambda line: first.append(line) or False, lambda line: None)
        assert first == [b"one", b"two", b"three"]


async def test_a_program_that_closes_its_output_and_goes_on_does_not_hold_the_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "LINGER_S", 0.1)
    async with started("exec >&- 2>&-; exec sleep 600", tmp_path) as running:
        with trio.fail_after(PATIENCE_S):
            assert not await running.read(lambda line: True, lambda line: None)
            assert await running.finish() is None
