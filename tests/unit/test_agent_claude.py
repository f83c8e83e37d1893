"""How a turn of Claude Code ended, read from streams that the real program printed (fixtures/claude/record.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from hive_agent.claude import environment, flags, session_flags
from hive_agent.claude_stream import Report
from hive_agent.runner import Ending, Seat
from hive_core.protocol.harness import STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import LineSplitter
from tests.harness_host import a_lease

FIXTURES = Path(__file__).parent / "fixtures" / "claude"
SEAT = Seat("iris", "/run/hive", "/state", "/root", "/root/.claude", "/usr/bin:/bin", "/opt/claude", True, 4000)


def replay(name: str) -> tuple[Report, Ending]:
    *lines, end = (FIXTURES / f"{name}.jsonl").read_bytes().splitlines()
    report = Report()
    for line in lines:
        assert report.read_stdout(line) == line.decode()
    told = json.loads(end)
    for line in told["stderr"].encode().splitlines():
        report.read_stderr(line)
    return report, report.ending(told["exit_code"])


def settings(**changes: Any) -> Any:
    return {**a_lease(program="claude", tools=["Bash", "Read"], prompt="You are iris.")["settings"], **changes}


def value_of(flag: str, chosen: list[str]) -> str:
    return chosen[chosen.index(flag) + 1]


def test_a_good_turn_is_done_and_tells_its_session_and_usage() -> None:
    _, ending = replay("success")
    assert (ending.outcome, ending.error) == ("done", None)
    assert ending.session == "00000000-0000-4000-8000-000000000001"
    assert ending.usage is not None
    assert (ending.usage["input_tokens"], ending.usage["output_tokens"], ending.usage["num_turns"]) == (20, 10, 3)
    assert ending.usage["cost_usd"] > 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unauthorized_401", "Invalid API key"),
        ("rate_limit_429", "Request rejected (429)"),
        ("overloaded_529", "529 Overloaded"),
        ("paused_503", "503 iris is paused"),
        ("no_credit_400", "Credit balance is too low"),
        ("stream_cut", "Unable to connect to API"),
    ],
)
def test_trouble_with_the_provider_makes_a_turn_wait(name: str, said: str) -> None:
    _, ending = replay(name)
    assert ending.outcome == "waiting"
    assert ending.error is not None
    assert said in ending.error
    assert ending.session is not None


def test_a_prompt_that_is_too_long_is_the_turns_own_failure() -> None:
    _, ending = replay("prompt_too_long_400")
    assert ending.outcome == "failed"
    assert ending.error is not None
    assert ending.error.startswith("Prompt is too long")


def test_a_lost_session_is_recognised() -> None:
    report, ending = replay("session_lost")
    assert report.session_lost
    assert ending.outcome == "failed"


@pytest.mark.parametrize("name", ["success", "unauthorized_401", "prompt_too_long_400"])
def test_a_session_that_began_is_not_lost(name: str) -> None:
    assert not replay(name)[0].session_lost


def test_an_error_in_the_middle_of_a_session_does_not_make_it_lost() -> None:
    report = Report()
    report.read_stdout(b'{"type":"system","subtype":"init","session_id":"s"}')
    report.read_stdout(b'{"type":"result","is_error":true,"errors":["No conversation found with session ID: s"]}')
    assert not report.session_lost


@pytest.mark.parametrize(
    ("status", "outcome"), [(401, "waiting"), (429, "waiting"), (502, "waiting"), (400, "failed"), (None, "failed")]
)
def test_an_error_without_a_word_is_judged_by_its_status(status: int | None, outcome: str) -> None:
    report = Report()
    report.read_stdout(json.dumps({"type": "result", "is_error": True, "api_error_status": status}).encode())
    assert report.ending(1).outcome == outcome


def test_a_program_that_ends_before_its_result_has_failed_with_its_last_words() -> None:
    report = Report()
    report.read_stdout(b'{"type":"system","subtype":"init","session_id":"s"}')
    report.read_stderr(b"Segmentation fault")
    report.read_stderr(b"")
    assert report.ending(139) == Ending("failed", "s", "Segmentation fault")


@pytest.mark.parametrize(("code", "said"), [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal 9")])
def test_a_silent_end_is_described(code: int, said: str) -> None:
    error = Report().ending(code).error
    assert error is not None
    assert said in error


def test_a_bad_exit_after_a_good_result_has_failed() -> None:
    report = Report()
    report.read_stdout(b'{"type":"result","is_error":false,"result":"ok"}')
    assert report.ending(1).outcome == "failed"
    assert report.ending(None).outcome == "done"


@pytest.mark.parametrize("servers", [[{"name": "hive", "status": "pending"}], [], None, 3, [3]])
def test_a_turn_without_the_hives_tools_waits_for_another(servers: object) -> None:
    report = Report()
    report.read_stdout(json.dumps({"type": "system", "subtype": "init", "mcp_servers": servers}).encode())
    report.read_stdout(b'{"type":"result","is_error":false,"result":"nobody heard me"}')
    assert report.ending(0).outcome == "waiting"


@pytest.mark.parametrize("line", [b"oops", b"[1]", b'{"type":', b'"\xff"', b"[" * 100_000])
def test_a_malformed_line_is_kept_as_such_and_breaks_nothing(line: bytes) -> None:
    event = json.loads(Report().read_stdout(line))
    assert (event["type"], event["subtype"]) == ("hive", "malformed")
    assert len(event["text"]) <= 2000


def test_a_long_line_is_replaced_by_its_length_and_still_counts() -> None:
    line = json.dumps({"type": "result", "is_error": False, "result": "x" * STREAM_LINE_LIMIT_BYTES}).encode()
    report = Report()
    passed = json.loads(report.read_stdout(line))
    assert passed == {"type": "hive", "subtype": "line_too_long", "bytes": len(line)}
    assert report.ending(0).outcome == "done"


def test_a_line_too_long_to_read_is_told() -> None:
    (refusal,) = LineSplitter(10).feed(b"x" * 20 + b"\n")
    assert json.loads(Report().read_stdout(refusal))["subtype"] == "line_too_long"


@pytest.mark.parametrize("event", [{"type": "result", "usage": [], "errors": 3}, {"type": "assistant"}, {"type": []}])
def test_events_of_another_shape_break_nothing(event: dict[str, Any]) -> None:
    report = Report()
    report.read_stdout(json.dumps(event).encode())
    report.ending(0)


def test_only_listed_tools_and_only_our_server_are_on() -> None:
    chosen = flags(SEAT, settings())
    assert value_of("--tools", chosen) == "Bash,Read"
    assert "--strict-mcp-config" in chosen
    assert list(json.loads(value_of("--mcp-config", chosen))["mcpServers"]) == ["hive"]
    assert value_of("--tools", flags(SEAT, settings(tools=[]))) == ""


def test_permissions_are_skipped_inside_a_sandbox_alone() -> None:
    bare = Seat("iris", "/r", "/s", "/h", "/h/.claude", "/bin", None, sandboxed=False, model_port=1)
    assert "--dangerously-skip-permissions" in flags(SEAT, settings())
    assert environment(SEAT, "api_key")["IS_SANDBOX"] == "1"
    assert "--dangerously-skip-permissions" not in flags(bare, settings())
    assert value_of("--allowedTools", flags(bare, settings())) == "mcp__hive__*"
    assert "IS_SANDBOX" not in environment(bare, "api_key")


def test_a_known_session_is_resumed_and_a_new_one_gets_an_id_of_its_own() -> None:
    assert session_flags("abc") == ["--resume", "abc"]
    first, second = (value_of("--session-id", session_flags(None)) for _ in range(2))
    assert first != second


def test_the_environment_holds_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-real")
    monkeypatch.setenv("HIVE_SECRET", "1")
    made = environment(SEAT, "oauth_token")
    assert "ANTHROPIC_API_KEY" not in made
    assert "HIVE_SECRET" not in made
    assert made["CLAUDE_CODE_OAUTH_TOKEN"].startswith("sk-ant-oat01-")
    assert environment(SEAT, "api_key")["ANTHROPIC_API_KEY"].startswith("sk-ant-api03-placeholder")
    assert made["GIT_COMMITTER_EMAIL"] == "iris@hive"


def test_an_at_sign_in_a_message_reads_no_file() -> None:
    assert environment(SEAT, "api_key")["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


def test_the_stream_holds_the_listed_tools_and_no_other() -> None:
    init = cast("dict[str, Any]", json.loads((FIXTURES / "success.jsonl").read_text().splitlines()[0]))
    assert set(init["tools"]) == {"Bash", "Read", "mcp__hive__send", "mcp__hive__fail"}
