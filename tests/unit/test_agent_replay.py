"""Recorded turns, run again: by the same code they go the same way, and what another would do is told."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from hive_agent import claude_errors, claude_stream
from hive_agent.claude import Claude
from hive_agent.replay import replay
from hive_agent.runner import Ending, Seat
from tests.harness_host import a_lease
from tests.processes import PROGRAMS
from tests.unit.test_agent_claude import FIXTURES
from tests.unit.test_agent_claude_process import TOOL

INIT = '{"type":"system","subtype":"init","session_id":"s","mcp_servers":[{"name":"hive","status":"connected"}]}'
SAY = '{"type":"assistant","message":{"content":[{"type":"text","text":"hm"}],"usage":{"input_tokens":7}}}'


def result(cost: float = 0.25, **more: Any) -> str:
    told = {"is_error": False, "total_cost_usd": cost, "usage": {"input_tokens": 3, "output_tokens": 4}}
    return json.dumps({"type": "result", **told, "modelUsage": {}, **more})


def limited() -> str:
    return result(is_error=True, api_error_status=429, result="API Error: slow down")


def lost() -> str:
    told = ["No conversation found with session ID: s"]
    return result(0, subtype="error_during_execution", is_error=True, errors=told)


def prints(*lines: str) -> str:
    return "; ".join(f"echo '{line}'" for line in lines)


def record_of(
    folder: Path, script: str, lease: dict[str, Any], interrupted: bool = False, turns: int = 1
) -> dict[str, Any]:
    """Take turns with a real process, in virtual time, and keep the last one as the host would."""
    program = folder / "program"
    program.write_text(f"#!/bin/sh\nturn() {{ read -r _ && echo '{INIT}'; }}\n{script}\n")
    program.chmod(0o755)
    where = str(folder)
    runner = Claude(Seat("iris", where, where, where, where, PROGRAMS, str(program), True, 1))
    lines: list[str] = []
    results: list[str] = []

    async def take() -> Ending:
        def pass_on(line: str) -> None:
            lines.append(line)
            if interrupted and "assistant" in line:
                runner.interrupt()

        try:
            for _ in range(turns):
                results.extend(line for line in lines if '"result"' in line)
                lines.clear()
                ending = await runner.take_turn(cast("Any", lease), pass_on)
        finally:
            await runner.close()
        return ending

    ending = trio.run(take, clock=trio.testing.MockClock(autojump_threshold=0.5))
    return {
        "given": {key: value for key, value in lease.items() if key != "notes"},  # of which the host hears by lines
        "state": ending.outcome,
        "reason": ending.reason,
        "error": ending.error,
        "usage": json.loads(json.dumps(ending.usage)),
        "asked_sha256": runner.asked,
        "before": json.loads(results[-1]) if results else None,
        "lines": list(lines),
        "missing": [],
    }


def run_again(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    place = folder / "replay"
    place.mkdir()
    return trio.run(replay, record, place, clock=trio.testing.MockClock(autojump_threshold=0.5))


A_LEASE = a_lease(7, "do it", program="claude", session="s", turn_silence_s=30)
NOTED = {**A_LEASE, "notes": ["x: it was cloned to /projects/x just now", "y: there is no such project"]}
COLD = a_lease(7, "do it", program="claude", session="s", turns="cold")
ERRAND = {**a_lease(7, program="claude", session="s"), "message": None, "errand": "save_and_compact"}
BOUNDARY = '{"type":"system","subtype":"compact_boundary","compact_metadata":{"post_tokens":9}}'
LOOP = f"for _ in $(seq 40); do {prints(TOOL)}; done; sleep 600"
PLAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "done": (f"turn; {prints(SAY, result())}; read _", A_LEASE, "done"),
    "noted": (f"turn; {prints(SAY, result())}; read _", NOTED, "done"),
    "cold": (f"turn; {prints(SAY, result())}; read _; echo bye >&2", COLD, "done"),
    "refused by the provider": (f"turn; {prints(limited())}; read _", A_LEASE, "waiting"),
    "crashed": (f"turn; {prints(SAY)}; exit 3", A_LEASE, "failed"),
    "crashed with last words": (f"turn; echo 'oh no' >&2; {prints(SAY)}; exit 3", A_LEASE, "failed"),
    "killed": (f"turn; {prints(SAY)}; kill -9 $$", A_LEASE, "failed"),
    "failed behind its result": (f"turn; {prints(SAY, result())}; read _; exit 4", COLD, "failed"),
    "a session that was lost": (
        f"test -e once || {{ touch once; read -r _; {prints(lost())}; exit 1; }}; turn; {prints(result())}; read _",
        A_LEASE,
        "done",
    ),
    "malformed": (f"turn; echo 'not { {} }json'; {prints(SAY, result())}; read _", A_LEASE, "done"),
    "silent": (f"turn; {prints(SAY)}; sleep 600", A_LEASE, "failed"),
    "never started": ("sleep 600", A_LEASE, "failed"),
    "in a loop": (f"turn; {LOOP}", A_LEASE, "failed"),
    "an errand": (f"turn; {prints(SAY, result())}; turn; {prints(BOUNDARY, result(0.5))}; read _", ERRAND, "done"),
}


@pytest.mark.parametrize("play", PLAYS)
def test_a_turn_goes_the_same_way_again(tmp_path: Path, play: str) -> None:
    script, lease, outcome = PLAYS[play]
    record = record_of(tmp_path, script, lease)
    assert record["state"] == outcome, record
    found = run_again(tmp_path, record)
    assert (found["same"], found["differences"], found["missing"]) == (True, [], [])


@pytest.mark.parametrize("name", sorted(path.stem for path in FIXTURES.glob("*.jsonl")))
def test_what_the_real_program_printed_goes_the_same_way_again(tmp_path: Path, name: str) -> None:
    *lines, _ = (FIXTURES / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "stream").write_bytes(b"".join(lines))
    record = record_of(tmp_path, "while read -r _; do cat stream; done", A_LEASE)
    assert record["lines"]
    found = run_again(tmp_path, record)
    assert (found["same"], found["differences"]) == (True, [])


def test_a_turn_that_was_taken_away_goes_the_same_way_again(tmp_path: Path) -> None:
    record = record_of(tmp_path, f"turn; {prints(SAY)}; read -r _; {prints(result())}; read _", A_LEASE, True)
    assert record["state"] == "cancelled"
    assert run_again(tmp_path, record)["same"]


def test_the_hosts_own_word_for_why_a_turn_was_cut_short_is_no_difference(tmp_path: Path) -> None:
    record = record_of(tmp_path, f"turn; {prints(result())}; read _", A_LEASE)
    assert run_again(tmp_path, {**record, "reason": "paused"})["same"]
    (tmp_path / "replay").rename(tmp_path / "first")
    assert not run_again(tmp_path, {**record, "reason": "overloaded"})["same"]


def test_a_turn_of_a_process_that_had_others_counts_its_own_part_again(tmp_path: Path) -> None:
    script = f"turn; {prints(result(0.25))}; turn; {prints(result(0.75))}; read _"
    record = record_of(tmp_path, script, A_LEASE, turns=2)
    assert record["usage"]["cost_usd"] == 0.5
    assert run_again(tmp_path, record)["same"]
    record["before"] = None
    (tmp_path / "replay").rename(tmp_path / "first")
    assert [one["what"] for one in run_again(tmp_path, record)["differences"]] == ["usage"]


@pytest.mark.parametrize("cost", [10**400, -(10**400)])
def test_a_cost_of_400_digits_is_unknown_and_stops_no_replay(tmp_path: Path, cost: int) -> None:
    record = record_of(tmp_path, f"turn; {prints(result(cost))}; read _", A_LEASE)
    assert record["usage"]["cost_usd"] is None
    assert run_again(tmp_path, record)["same"]
    record["lines"].insert(1, result(0.25))
    (tmp_path / "replay").rename(tmp_path / "first")
    assert [one["what"] for one in run_again(tmp_path, record)["differences"]][-1:] == ["line 3"]


def changed_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_stream, "WAITING", frozenset())


def changed_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_stream, "error_sentence", lambda _: "something else")


def changed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claude_stream, "STREAM_LINE_LIMIT_BYTES", 100)


def changed_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hive_agent.claude.wake_prompt", lambda *_: "Do it, please.")


@pytest.mark.parametrize(
    ("change", "what", "recorded", "now"),
    [
        (changed_limit, "outcome", "waiting", "failed"),
        (changed_words, "error", "API Error: slow down", "something else"),
        (changed_lines, "line 1", INIT, '{"type": "hive", "subtype": "line_too_long"'),
        (changed_prompt, "prompt", "sha256 ", "sha256 "),
    ],
)
def test_what_other_code_would_do_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[pytest.MonkeyPatch], None],
    what: str,
    recorded: str,
    now: str,
) -> None:
    assert claude_errors.WAITING is claude_stream.WAITING
    record = record_of(tmp_path, f"turn; {prints(limited())}; read _", A_LEASE)
    change(monkeypatch)
    found = run_again(tmp_path, record)
    assert not found["same"]
    told = next(one for one in found["differences"] if one["what"] == what)
    assert told["recorded"].startswith(recorded)
    assert told["now"].startswith(now)
    assert told["now"] != told["recorded"]
    assert ("Do it, please." in found["prompt"]) == (change is changed_prompt)


def test_what_the_record_has_not_is_said(tmp_path: Path) -> None:
    record = record_of(tmp_path, f"turn; {prints(SAY, result())}; read _", A_LEASE)
    dropped = json.dumps({"type": "hive", "subtype": "lines_dropped", "count": 3})
    record["lines"][1:2] = [dropped]
    record["missing"] = ["the body of its message"]
    found = run_again(tmp_path, record)
    assert found["missing"] == [
        "the body of its message",
        "3 lines, which were too many while the host was away",
    ]


def test_a_turn_whose_harness_died_is_compared_by_its_stream_alone(tmp_path: Path) -> None:
    record = record_of(tmp_path, f"turn; {prints(SAY)}; kill -{signal.SIGKILL} $$", A_LEASE)
    record |= {"state": "lost", "error": "its harness went away", "reason": None, "usage": None}
    assert run_again(tmp_path, record)["same"]
