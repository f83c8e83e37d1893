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
from hive_agent.runner import Activity, Ending, Seat
from hive_agent.serve import as_ack
from hive_core.protocol.harness import REQUEST_LIMIT_BYTES
from hive_core.protocol.lines import decode, encode
from tests.harness_host import a_lease
from tests.processes import PATIENCE_S, PROGRAMS, look_until

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
    return Claude(Seat("iris", where, where, where, where, PROGRAMS, str(program), True, 1))


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
    lines: list[dict[str, Any]] = []

    async def turn() -> None:
        endings.append(await take(runner, lines))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(turn)
        await trio.to_thread.run_sync(look_until, lambda: lines)
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
    runner, written = a_runner(tmp_path, "turn; echo $$ > new; mv new pid; exec sleep 600"), tmp_path / "pid"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, runner, [])
        await trio.to_thread.run_sync(look_until, written.exists)
        nursery.cancel_scope.cancel()
    assert not Path(f"/proc/{written.read_text().strip()}").exists()


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
    assert (usage["cost_usd"], usage["input_tokens"], usage["output_tokens"]) == (None, None, None)


# -- turns that are stuck ---------------------------------------------------------------------------------------------

TOOL = '{"type":"assistant","message":{"content":[{"type":"tool_use","id":"t","name":"Bash","input":{"command":"x"}}]}}'
IN_A_TOOL = f"turn; echo '{TOOL}'"


ASKS = TOOL.replace("Bash", "AskUserQuestion")


@pytest.mark.parametrize(
    ("script", "kind", "why"),
    [
        ("exec sleep 600", "never_started", "it did not begin for 1 s, and its processes did nothing"),
        (
            f"{IN_A_TOOL}; exec sleep 600",
            "silent",
            "it printed nothing for 1 s, and its processes did nothing, in the tool Bash",
        ),
        (
            "turn; while :; do :; done",
            "silent_busy",
            "it printed nothing for 4 s, while its processes used the cpu, outside any tool",
        ),
        (
            f"turn; while :; do echo '{TOOL}'; done",
            "loop",
            "it called the same tool 25 times in a row, with the same arguments and the same answer",
        ),
        (
            f"turn; echo '{ASKS}'; exec sleep 600",
            "unanswered_prompt",
            "it waits for a person, who is not there, in the tool AskUserQuestion",
        ),
    ],
    ids=["never started", "silent", "silent with cpu", "in a loop", "asks"],
)
async def test_a_turn_that_is_stuck_is_ended_and_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: str, why: str
) -> None:
    make_impatient(monkeypatch)
    runner = a_runner(tmp_path, script)
    lines: list[dict[str, Any]] = []
    ending = await take(runner, lines, turn_silence_s=1)
    assert (ending.outcome, ending.reason, ending.error) == ("failed", "stuck", f"the turn was stuck: {why}")
    assert {"type": "hive", "subtype": "stuck", "kind": kind, "error": why} in lines
    assert runner.activity == Activity("stuck", kind)
    assert runner._program is None


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude, "INTERRUPT_S", 0.05)
    monkeypatch.setattr(claude, "LATE_S", 0.05)
    monkeypatch.setattr("hive_agent.program.LINGER_S", 0.3)
    monkeypatch.setattr("hive_agent.watch.PROMPT_S", 0.2)
    monkeypatch.setattr("hive_agent.watch.BUSY_SHARE", 0.0)  # of half a second a busy machine may give it very little


@pytest.mark.parametrize("last", ["good; exec sleep 600", "good; exec >&-; exec sleep 600"])
async def test_a_program_that_has_finished_and_goes_on_is_shown_and_ended_and_its_turn_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    make_impatient(monkeypatch)
    runner = a_runner(tmp_path, f"turn; {last}")
    lines: list[dict[str, Any]] = []
    ending = await take(runner, lines, turns="cold")
    assert (ending.outcome, ending.reason) == ("done", None)
    assert [line["kind"] for line in lines if line.get("subtype") == "stuck"] == ["not_ending"]
    assert runner._program is None


async def test_a_program_that_closes_its_output_and_goes_on_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_impatient(monkeypatch)
    runner = a_runner(tmp_path, "turn; exec >&- 2>&-; exec sleep 600")
    lines: list[dict[str, Any]] = []
    ending = await take(runner, lines)
    assert (ending.outcome, ending.reason) == ("failed", "stuck")
    assert [line["kind"] for line in lines if line.get("subtype") == "stuck"] == ["not_ending"]


async def test_a_program_that_asks_for_a_permission_is_told_no_at_once_and_goes_on(tmp_path: Path) -> None:
    asked = '{"type":"control_request","request_id":"r1","request":{"subtype":"can_use_tool","tool_name":"Bash"}}'
    runner = a_runner(tmp_path, f"turn; echo '{asked}'; read -r no; echo \"$no\" > told; good; read _")
    lines: list[dict[str, Any]] = []
    assert (await take(runner, lines)).outcome == "done"
    told = json.loads((tmp_path / "told").read_text())["response"]
    assert (told["request_id"], told["subtype"], told["response"]["behavior"]) == ("r1", "success", "deny")
    assert "denied" in [line["subtype"] for line in lines if line["type"] == "hive"]
    await runner.close()


async def test_a_session_with_which_the_program_never_starts_is_given_up_after_two_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_impatient(monkeypatch)
    resumes = 'case "$*" in *--resume*) exec sleep 600;; esac'
    runner = a_runner(tmp_path, f"{resumes}; turn; good; read _")
    assert [(await take(runner, [], turn_silence_s=1)).reason for _ in range(2)] == ["stuck", "stuck"]
    lines: list[dict[str, Any]] = []
    third = await take(runner, lines, turn_silence_s=1)
    assert (third.outcome, third.session_lost) == ("done", True)
    assert lines[0] == {"type": "hive", "subtype": "session_lost", "session": "s"}
    await runner.close()


async def test_a_call_whose_arguments_change_is_no_loop(tmp_path: Path) -> None:
    call = TOOL.replace('"x"', "\"'$n'\"")
    runner = a_runner(tmp_path, f"turn; for n in $(seq 60); do echo '{call}'; done; good; read _")
    assert (await take(runner, [])).outcome == "done"
    await runner.close()


def a_call(name: str) -> str:
    return json.dumps({"type": "assistant", "message": {"content": [{"type": "tool_use", "id": "1", "name": name}]}})


def a_result_with(more: str) -> str:
    return f'{{"type":"result","is_error":false,{more}}}'


@pytest.mark.parametrize(
    "lines",
    [
        [INIT, a_result_with('"total_cost_usd":1e999')],
        [INIT, a_result_with(f'"total_cost_usd":{10**400}')],
        [INIT, a_result_with('"num_turns":1e999,"duration_ms":-1e999')],
        [INIT, a_result_with('"terminal_reason":[]').replace("false", "true")],
        [INIT, a_result_with(f'"modelUsage":{{"m":{{"costUSD":1,"note":"{"y" * REQUEST_LIMIT_BYTES}"}}}}')],
        [INIT, a_result_with(f'"modelUsage":{{"{"m" * REQUEST_LIMIT_BYTES}":{{"costUSD":1}}}}')],
        [INIT, a_result_with(f'"num_turns":"{"y" * REQUEST_LIMIT_BYTES}"')],
        [INIT.replace('"s"', f'"{"s" * REQUEST_LIMIT_BYTES}"'), RESULT],
        [INIT, f'{{"type":"system","subtype":"api_retry","attempt":"{"y" * REQUEST_LIMIT_BYTES}"}}', RESULT],
        [INIT, a_call("y" * REQUEST_LIMIT_BYTES), RESULT],
    ],
    ids=lambda lines: str(lines[-1])[:60],
)
def test_whatever_its_program_prints_the_harness_asks_only_what_its_host_can_read(lines: list[str]) -> None:
    """A request that the host cannot read would be sent again for ever, and its turn would never end."""
    report = Report({"total_cost_usd": 0.5})
    for line in lines:
        report.read_stdout(line.encode())
        state = encode({"op": "lines", "state": report.activity._asdict()})
        assert decode(state)
        assert len(state) < 1000
    ack = encode({"op": "ack", **as_ack(cast("Any", a_lease()), report.ending(0))})
    assert decode(ack)["outcome"]
    assert len(ack) < 2000
