"""The process of Claude Code over many turns, played by scripts that behave badly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from hive_agent import claude
from hive_agent.claude import Claude
from hive_agent.claude_stream import Report
from hive_agent.runner import Ending, Seat
from tests.harness_host import a_lease
from tests.processes import look_until

PATIENCE_S = 20.0
INIT = '{"type":"system","subtype":"init","session_id":"s","mcp_servers":[{"name":"hive","status":"connected"}]}'
RESULT = '{"type":"result","is_error":false}'


def a_runner(folder: Path, script: str) -> Claude:
    """A runner whose program is a shell script; `turn` in it reads a prompt, and `good` ends the turn well."""
    program = folder / "program"
    program.write_text(
        f"#!/bin/sh\nturn() {{ read -r _ && echo '{INIT}'; }}\ngood() {{ echo '{RESULT}'; }}\n{script}\n"
    )
    program.chmod(0o755)
    where = str(folder)
    return Claude(Seat("iris", where, where, where, where, "/usr/bin:/bin", str(program), True, 1))


async def take(runner: Claude, lines: list[dict[str, Any]], session: str | None = "s", **settings: Any) -> Ending:
    lease = cast("Any", a_lease(program="claude", session=session, **settings))
    with trio.fail_after(PATIENCE_S):
        return await runner.take_turn(lease, lambda line: lines.append(json.loads(line)))


async def test_a_program_that_does_not_hear_its_interruption_is_ended_by_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claude, "INTERRUPT_S", 0.05)
    monkeypatch.setattr("hive_agent.program.LINGER_S", 0.05)
    runner = a_runner(tmp_path, "turn; exec sleep 600")
    endings: list[Ending] = []

    async def turn() -> None:
        endings.append(await take(runner, []))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        await trio.testing.wait_all_tasks_blocked(0.1)
        runner.interrupt()
        runner.interrupt()
    assert (endings[0].outcome, endings[0].session) == ("cancelled", "s")
    await runner.close()


async def test_what_is_printed_between_two_turns_is_shown_with_the_next(tmp_path: Path) -> None:
    wait = "while ! test -e go; do :; done"
    note = 'echo \'{"type":"system","subtype":"note"}\'; echo oh >&2'
    runner = a_runner(tmp_path, f"turn; good; {wait}; {note}; turn; good; read _")
    await take(runner, [])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.rest)
        (tmp_path / "go").touch()
        await trio.to_thread.run_sync(look_until, lambda: len(runner._between) == 2)
        nursery.cancel_scope.cancel()
    lines: list[dict[str, Any]] = []
    assert (await take(runner, lines)).outcome == "done"
    assert {line["subtype"] for line in lines[:2]} == {"note", "stderr"}
    await runner.close()


async def test_a_program_without_the_hives_tools_is_not_kept(tmp_path: Path) -> None:
    """The next turn would not have them either."""
    runner = a_runner(
        tmp_path, 'read -r _; echo \'{"type":"system","subtype":"init","session_id":"s"}\'; good; read _; touch ended'
    )
    assert (await take(runner, [])).outcome == "waiting"
    assert (tmp_path / "ended").exists()


async def test_a_new_process_that_ends_before_it_begins_is_not_started_again(tmp_path: Path) -> None:
    """Only one that was kept may have ended unseen."""
    runner = a_runner(tmp_path, "echo >> starts; test -e again && exit 3; turn; good; touch again")
    assert (await take(runner, [], warm_turns=1)).outcome == "done"
    assert (await take(runner, [])).outcome == "failed"
    assert (tmp_path / "starts").read_text().count("\n") == 2


async def test_a_turn_that_is_cut_off_leaves_no_process(tmp_path: Path) -> None:
    runner = a_runner(tmp_path, "turn; echo $$ > pid; exec sleep 600")
    with trio.move_on_after(0.3):
        await take(runner, [])
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


def a_result(cost: float, tokens: int) -> dict[str, Any]:
    models = {
        "one": {"inputTokens": tokens, "costUSD": cost, "contextWindow": 200_000},
        "other": {"inputTokens": 7, "costUSD": 0.5},
    }
    return {
        "type": "result",
        "is_error": False,
        "usage": {"input_tokens": 3},
        "total_cost_usd": cost,
        "modelUsage": models,
    }


def test_of_what_a_process_counts_over_all_its_turns_each_turn_has_its_own_part() -> None:
    report = Report(a_result(0.75, 10))
    report.read_stdout(json.dumps(a_result(1.0, 14)).encode())
    usage = report.ending(None).usage
    assert usage is not None
    assert (usage["cost_usd"], usage["input_tokens"]) == (0.25, 3)
    assert usage["models"] == {"one": {"inputTokens": 4, "costUSD": 0.25, "contextWindow": 200_000}}


@pytest.mark.parametrize(
    "told", [{}, {"total_cost_usd": None, "modelUsage": 3}, {"total_cost_usd": "x", "modelUsage": {"one": 2}}]
)
def test_what_is_unknown_stays_unknown(told: dict[str, Any]) -> None:
    report = Report(a_result(0.75, 10))
    report.read_stdout(json.dumps({"type": "result", "is_error": False, **told}).encode())
    usage = report.ending(None).usage
    assert usage is not None
    assert usage["cost_usd"] is None


# -- turns that are stuck ---------------------------------------------------------------------------------------------

TOOL = '{"type":"assistant","message":{"content":[{"type":"tool_use","id":"t","name":"Bash","input":{"command":"x"}}]}}'
IN_A_TOOL = f"turn; echo '{TOOL}'"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (
            f"{IN_A_TOOL}; exec sleep 600",
            "it printed nothing for 3 s, and its processes did nothing, in the tool Bash",
        ),
        (
            f"turn; while :; do echo '{TOOL}'; done",
            "it called the same tool 25 times in a row, with the same arguments and the same answer",
        ),
    ],
    ids=["silent", "in a loop"],
)
async def test_a_turn_that_is_stuck_is_ended_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    monkeypatch.setattr(claude, "INTERRUPT_S", 0.05)
    monkeypatch.setattr("hive_agent.program.LINGER_S", 0.05)
    runner = a_runner(tmp_path, script)
    lines: list[dict[str, Any]] = []
    ending = await take(runner, lines, turn_silence_s=3)
    assert (ending.outcome, ending.error) == ("failed", f"the turn was stuck: {why}")
    assert {"type": "hive", "subtype": "stuck", "error": why} in lines
    assert runner._program is None


async def test_a_call_whose_arguments_change_is_no_loop(tmp_path: Path) -> None:
    call = TOOL.replace('"x"', "\"'$n'\"")
    runner = a_runner(tmp_path, f"turn; for n in $(seq 60); do echo '{call}'; done; good; read _")
    assert (await take(runner, [])).outcome == "done"
    await runner.close()
