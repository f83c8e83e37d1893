"""One run of a program, with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hive_agent import program
from hive_agent.program import Command, run_program
from hive_core.protocol.refusal import Refusal


async def run(script: str, folder: Path, prompt: bytes = b"", over: bytes = b"over") -> tuple[int | None, list[bytes]]:
    """Run a shell script: its exit code and the lines of its stdout."""
    lines: list[bytes] = []

    def read(line: bytes | Refusal) -> None:
        assert isinstance(line, bytes)
        lines.append(line)

    command = Command(["/bin/sh", "-c", script], {"PATH": "/usr/bin:/bin", "ONLY": "this"}, str(folder), prompt)
    with trio.fail_after(20):
        code = await run_program(command, read, lambda line: None, lambda: over in lines)
    return code, lines


async def test_the_prompt_is_its_stdin_and_the_environment_is_only_what_was_given(tmp_path: Path) -> None:
    code, lines = await run("cat; pwd; env | grep -v -e ^PWD -e ^_ -e ^SHLVL | sort", tmp_path, b"a prompt\n")
    assert (code, lines) == (0, [b"a prompt", str(tmp_path).encode(), b"ONLY=this", b"PATH=/usr/bin:/bin"])


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
    with trio.move_on_after(0.3):
        await run("trap '' TERM; echo $$ > pid; while :; do sleep 1; done", tmp_path)
    pid = int(await trio.Path(tmp_path / "pid").read_text())
    assert not await trio.Path(f"/proc/{pid}").exists()


async def test_a_program_that_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    command = Command([str(tmp_path / "none")], {}, str(tmp_path), b"")
    with pytest.raises(FileNotFoundError):
        await run_program(command, lambda line: None, lambda line: None, lambda: False)
