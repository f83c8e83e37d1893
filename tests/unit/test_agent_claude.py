"""How a turn of Claude Code ended, read from streams that the real program printed (fixtures/claude/record.py)."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from hive_agent.claude_command import environment, flags, session_flags
from hive_agent.claude_stream import Report
from hive_agent.claude_usage import window_of
from hive_agent.runner import Activity, Ending, Seat
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
    ("name", "reason", "said"),
    [
        ("unauthorized_401", "authentication", "Invalid API key"),
        ("rate_limit_429", "rate_limited", "Request rejected (429)"),
        ("rate_limit_event", "rate_limited", "You've hit your session limit"),
        ("overloaded_529", "overloaded", "529 Overloaded"),
        ("paused_503", "overloaded", "503 iris is paused"),
        ("no_credit_400", "billing", "Credit balance is too low"),
        ("stream_cut", "overloaded", "Unable to connect to API"),
    ],
)
def test_trouble_with_the_provider_makes_a_turn_wait(name: str, reason: str, said: str) -> None:
    _, ending = replay(name)
    assert (ending.outcome, ending.reason) == ("waiting", reason)
    assert ending.error is not None
    assert said in ending.error
    assert ending.session is not None


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        ("prompt_too_long_400", "prompt_too_long", "Prompt is too long"),
        ("blocking_limit", "prompt_too_long", "Prompt is too long"),
        ("refusal", "refusal", "API Error: Claude Code is unable to respond"),
    ],
)
def test_what_another_turn_would_meet_again_is_the_turns_own_failure(name: str, reason: str, said: str) -> None:
    _, ending = replay(name)
    assert (ending.outcome, ending.reason) == ("failed", reason)
    assert ending.error is not None
    assert ending.error.startswith(said)


def test_when_the_providers_limit_ends_is_told_where_the_stream_says_so() -> None:
    report, ending = replay("rate_limit_event")
    assert ending.limited_until_ms == 1_900_000_000_000
    assert replay("rate_limit_429")[1].limited_until_ms is None
    assert replay("success")[1].limited_until_ms is None
    assert report.result is not None


def test_words_about_a_limit_are_a_result_like_any_other() -> None:
    _, ending = replay("limit_as_text")
    assert (ending.outcome, ending.reason, ending.error) == ("done", None, None)


def test_a_result_that_says_success_and_is_an_error_is_an_error() -> None:
    for name in ("rate_limit_429", "rate_limit_event", "refusal"):
        report, ending = replay(name)
        assert report.result is not None
        assert report.result["subtype"] == "success"
        assert ending.outcome != "done"


def states(name: str) -> list[Activity]:
    """What the program did at each line, without repetitions."""
    report, seen = Report(), [Activity("starting")]
    for line in (FIXTURES / f"{name}.jsonl").read_bytes().splitlines()[:-1]:
        report.read_stdout(line)
        if report.activity != seen[-1]:
            seen.append(report.activity)
    return seen


def test_what_the_program_does_is_read_from_its_stream() -> None:
    assert [(one.state, one.detail) for one in states("success")] == [
        ("starting", ""),
        ("thinking", ""),
        ("tool", "Bash"),
        ("tool", "mcp__hive__send"),
        ("thinking", ""),
    ]


@pytest.mark.parametrize(
    ("name", "state", "detail"),
    [
        ("rate_limit_429_retried", "rate_limited", "attempt 1 of 1"),
        ("overloaded_529", "overloaded", "attempt 1 of 1"),
        ("stream_cut", "overloaded", "attempt 1 of 1"),
        ("rate_limit_event", "rate_limited", "five_hour"),
    ],
)
def test_a_wait_for_the_provider_is_shown_with_its_end(name: str, state: str, detail: str) -> None:
    (waits,) = [one for one in states(name) if one.state in ("rate_limited", "overloaded")]
    assert (waits.state, waits.detail) == (state, detail)
    assert waits.until_ms is not None
    assert waits.until_ms > 1_700_000_000_000


def test_a_compaction_is_seen_and_leaves_a_smaller_context() -> None:
    assert "compacting" in [one.state for one in states("compaction")]
    report, ending = replay("compaction")
    assert (report.compacted, ending.outcome) == ("success", "done")
    assert ending.context is not None
    assert ending.context["tokens"] == 176
    failed, _ = replay("compaction_failed")
    assert failed.compacted == "Not enough messages to compact."


def test_how_full_the_session_is_is_what_the_last_answer_counted() -> None:
    assert replay("success")[1].context == {"tokens": 11, "window": 200_000}
    answer = {
        "model": "claude-x",
        "usage": {
            "input_tokens": 1,
            "cache_read_input_tokens": 20,
            "cache_creation_input_tokens": 300,
            "output_tokens": 4000,
        },
    }
    report = Report(window=9_000)
    for parent in (None, "toolu_of_a_sub_agent"):
        report.read_stdout(json.dumps({"type": "assistant", "message": answer, "parent_tool_use_id": parent}).encode())
        answer = {**answer, "usage": {"input_tokens": 7}}
    report.read_stdout(b'{"type":"result","is_error":false}')
    assert report.ending(None).context == {"tokens": 4321, "window": 9_000}


@pytest.mark.parametrize(
    ("model", "window"), [("claude-sonnet-5", 200_000), ("sonnet[1m]", 1_000_000), ("gpt", None), ("", None)]
)
def test_windows_are_known_by_the_models_name(model: str, window: int | None) -> None:
    assert window_of(model) == window


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
    assert report.ending(139) == Ending("failed", "s", "Segmentation fault", reason="crashed")


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
    report = Report()
    report.read_stdout(line)
    event = json.loads(report.read_stdout(line))
    assert (event["type"], event["subtype"], event["count"]) == ("hive", "malformed", 2)
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


def test_a_tool_that_waits_for_a_person_is_off_whoever_lists_it() -> None:
    assert value_of("--tools", flags(SEAT, settings(tools=["Bash", "AskUserQuestion", "ExitPlanMode"]))) == "Bash"


def test_permissions_are_skipped_inside_a_sandbox_alone() -> None:
    bare = Seat("iris", "/r", "/s", "/h", "/h/.claude", "/bin", None, sandboxed=False, model_port=1)
    assert "--dangerously-skip-permissions" in flags(SEAT, settings())
    assert environment(SEAT, "api_key")["IS_SANDBOX"] == "1"
    assert "--dangerously-skip-permissions" not in flags(bare, settings())
    assert value_of("--allowedTools", flags(bare, settings())) == "mcp__hive__*"
    assert "IS_SANDBOX" not in environment(bare, "api_key")


def test_more_servers_of_tools_stand_beside_the_hives_own_and_never_in_its_place() -> None:
    extra = {name: {"command": "theirs", "args": ["-x"], "env": {"A": "b"}} for name in ("files", "hive")}
    config = json.loads(value_of("--mcp-config", flags(SEAT, settings(mcp_servers=extra))))
    assert config["mcpServers"]["files"] == extra["files"]
    assert config["mcpServers"]["hive"]["command"] != "theirs"
    bare = Seat("iris", "/r", "/s", "/h", "/h/.claude", "/bin", None, sandboxed=False, model_port=1)
    allowed = value_of("--allowedTools", flags(bare, settings(mcp_servers={"files": extra["files"]})))
    assert allowed == "mcp__hive__*,mcp__files__*"


def test_a_server_of_which_some_tools_are_allowed_stands_behind_what_keeps_it_to_them() -> None:
    server = {"command": "maps", "args": ["--at", "x"], "env": {"A": "1"}, "allowed_tools": ["find", "get"]}
    config = json.loads(value_of("--mcp-config", flags(SEAT, settings(mcp_servers={"maps": server}))))
    entry = config["mcpServers"]["maps"]
    assert entry["env"] == {"A": "1"}
    assert entry["args"][-6:] == ["only", "find,get", "--", "maps", "--at", "x"]


def test_what_agent_toml_can_say_of_servers_fits_into_one_argument() -> None:
    """The kernel takes 128 KiB of one, and agent.toml 64 KiB."""
    server = {"command": "maps", "args": ["世" * 4096] * 5, "env": {}}
    given = value_of("--mcp-config", flags(SEAT, settings(mcp_servers={"maps": server})))
    assert len(given.encode()) < 65_536


EXTRAS = {
    "digest": "d1",
    "skills": ["review"],
    "plugins": ["fmt"],
    "offered": [{"name": "own:review", "description": "Reviews."}, {"name": "fmt:fix", "description": "Fixes."}],
}


def test_skills_and_plugins_are_loaded_from_where_they_were_deployed_and_the_model_is_told_of_them() -> None:
    chosen = flags(SEAT, settings(extras=EXTRAS))
    given = [place for flag, place in itertools.pairwise(chosen) if flag == "--plugin-dir"]
    assert given == ["/extras/d1/own", "/extras/d1/fmt"]
    assert value_of("--add-dir", chosen) == "/extras/d1"
    assert value_of("--setting-sources", chosen) == ""
    assert value_of("--tools", chosen) == "Bash,Read,Skill"
    prompt = value_of("--append-system-prompt", chosen)
    assert prompt.startswith("You are iris.\n\nThe following skills")
    assert prompt.endswith("\n- own:review: Reviews.\n- fmt:fix: Fixes.")
    assert value_of("--append-system-prompt", flags(SEAT, settings(extras=EXTRAS, prompt=""))).startswith("The follow")
    # Another state of them is another command, for which a warm process is renewed.
    assert flags(SEAT, settings(extras={**EXTRAS, "digest": "d2"})) != chosen
    bare = replace(SEAT, sandboxed=False)
    assert value_of("--allowedTools", flags(bare, settings(extras=EXTRAS))) == "mcp__hive__*,Skill"


def test_without_skills_there_is_no_tool_for_them_and_no_word_of_them() -> None:
    hooks = {**EXTRAS, "skills": [], "offered": []}
    assert "Skill" not in value_of("--tools", flags(SEAT, settings(extras=hooks)))
    assert value_of("--append-system-prompt", flags(SEAT, settings(extras=hooks))) == "You are iris."
    assert value_of("--plugin-dir", flags(SEAT, settings(extras=hooks))) == "/extras/d1/fmt"
    assert "--plugin-dir" not in flags(SEAT, settings())


def test_what_an_agent_adds_to_the_environment_stands_there_but_never_in_the_place_of_ours() -> None:
    made = environment(SEAT, "api_key", {"TZ": "Europe/Berlin", "HOME": "/elsewhere", "ANTHROPIC_BASE_URL": "http://x"})
    assert made == {**environment(SEAT, "api_key"), "TZ": "Europe/Berlin"}


def test_programs_find_the_hives_proxy_where_there_is_one_and_the_loopback_without_it() -> None:
    made = environment(replace(SEAT, egress_port=4001), "api_key", {"HTTPS_PROXY": "http://elsewhere"})
    assert made["HTTPS_PROXY"] == made["https_proxy"] == made["HTTP_PROXY"] == made["http_proxy"]
    assert made["http_proxy"] == "http://127.0.0.1:4001"
    assert "127.0.0.1" in made["NO_PROXY"].split(",")  # where the model is
    assert made["no_proxy"] == made["NO_PROXY"]
    assert "--socket /run/hive/egress.sock %h %p" in made["GIT_SSH_COMMAND"]
    assert not [name for name in environment(SEAT, "api_key") if name.lower().endswith("_proxy")]


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


def test_the_program_does_not_compact_by_itself() -> None:
    assert environment(SEAT, "api_key")["DISABLE_AUTO_COMPACT"] == "1"


def test_an_at_sign_in_a_message_reads_no_file() -> None:
    assert environment(SEAT, "api_key")["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


def test_the_stream_holds_the_listed_tools_and_no_other() -> None:
    init = cast("dict[str, Any]", json.loads((FIXTURES / "success.jsonl").read_text().splitlines()[0]))
    assert set(init["tools"]) == {"Bash", "Read", "mcp__hive__send", "mcp__hive__fail"}
