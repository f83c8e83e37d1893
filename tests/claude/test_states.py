"""How turns of the real Claude Code go wrong, and how its session is looked after: against a scripted model."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from hive_agent import claude, claude_command
from hive_agent.errands import GO_ON, SAVE_NOTES
from hive_core.settings import DEFAULT_TOOLS
from tests.claude_desk import Desk, a_desk
from tests.scripted_model import Answer, Request, fail, say, tool

TOO_LONG = "prompt is too long: 219000 tokens > 200000 maximum"
SUMMARY = "<summary>We said hello.</summary>"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that asks the provider once more, a harness that waits for no program for long."""
    monkeypatch.setattr(claude_command, "MAX_RETRIES", 1)
    monkeypatch.setattr(claude, "INTERRUPT_S", 1.0)
    monkeypatch.setattr("hive_agent.program.LINGER_S", 1.0)


async def test_only_the_tools_that_are_named_and_those_of_the_hive_are_on(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one"]) as desk:
        await desk.turn("hello", tools=DEFAULT_TOOLS)
        (init,) = [line for line in desk.lines if line.get("subtype") == "init"]
        mine = {name for name in init["tools"] if not name.startswith("mcp__hive__")}
        assert mine == {"Bash", "Read", "Edit", "Write"} | (mine & {"Glob", "Grep"})
        assert "mcp__hive__send" in init["tools"]
        asked = {name for name in desk.model.turns[0].tools if not name.startswith("mcp__hive__")}
        assert asked <= set(DEFAULT_TOOLS)


SERVER = """
import json, os, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    result = {
        "initialize": {
            "protocolVersion": "2025-06-18",
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "files", "version": "1"},
        },
        "tools/list": {
            "tools": [{"name": each, "description": "", "inputSchema": {"type": "object"}} for each in ("where", "rm")]
        },
        "tools/call": {"content": [{"type": "text", "text": "it is " + os.environ["PLACE"]}]},
    }.get(asked["method"], {})
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


async def test_variables_and_servers_of_tools_from_agent_toml_reach_the_program(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    files = {"command": sys.executable, "args": [str(tmp_path / "server.py")], "env": {"PLACE": "on a shelf"}}
    calls = say(tool("mcp__files__where"), tool("Bash", command='echo "$GREETING"', description="greet"))
    async with a_desk(tmp_path, [calls, "done"]) as desk:
        ending = await desk.turn("hello", tools=["Bash"], mcp_servers={"files": files}, env={"GREETING": "moin"})
        assert ending.outcome == "done"
        assert [result.text for result in desk.model.turns[-1].tool_results] == ["it is on a shelf", "moin"]


async def test_of_a_servers_tools_the_model_has_those_that_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    files = {"command": sys.executable, "args": [str(tmp_path / "server.py")], "env": {"PLACE": "here"}}
    calls = say(tool("mcp__files__where"), tool("mcp__files__rm"))
    async with a_desk(tmp_path, [calls, "done"]) as desk:
        await desk.turn("hello", tools=["Bash"], mcp_servers={"files": {**files, "allowed_tools": ["where"]}})
        offered = {each["name"] for each in desk.model.turns[0].body["tools"]}
        assert {name for name in offered if name.startswith("mcp__files__")} == {"mcp__files__where"}
        done, refused = desk.model.turns[-1].tool_results
        assert (done.text, done.is_error) == ("it is here", False)
        assert refused.is_error


# -- the provider -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason", "shown"),
    [
        (fail(529, "Overloaded"), "overloaded", ["thinking", "overloaded", "thinking"]),
        (fail(429, "slow down", retry=True, retry_after="1"), "rate_limited", ["thinking", "rate_limited", "thinking"]),
        (fail(401, "invalid x-api-key"), "authentication", ["thinking"]),
        (say("I begin", cut_after=2), "overloaded", ["thinking", "overloaded", "thinking"]),
    ],
    ids=["529", "429", "401", "cut"],
)
async def test_trouble_with_the_provider_is_shown_and_makes_the_turn_wait(
    tmp_path: Path, impatient: None, answer: Answer, reason: str, shown: list[str]
) -> None:
    async with a_desk(tmp_path, [answer] * 9) as desk:
        ending = await desk.turn("hello")
        assert (ending.outcome, ending.reason, desk.states) == ("waiting", reason, shown)


async def test_a_refusal_is_told_as_one(tmp_path: Path) -> None:
    async with a_desk(tmp_path, [say("No.", stop="refusal"), "two"]) as desk:
        ending = await desk.turn("hello")
        assert (ending.outcome, ending.reason) == ("failed", "refusal")
        assert (await desk.turn("again")).outcome == "done"


# -- stuck ------------------------------------------------------------------------------------------------------------


async def test_a_model_that_sends_no_byte_makes_a_turn_stuck(tmp_path: Path, impatient: None) -> None:
    over = threading.Event()

    def answer(request: Request) -> Answer:
        if "hello" in request.last_user_text:
            return "hello"
        over.wait()
        return "too late"

    async with a_desk(tmp_path, answer) as desk:
        await desk.turn("hello")  # the program has started, however long that took
        try:
            ending = await desk.turn("and now?", turn_silence_s=2)
        finally:
            over.set()
        assert (ending.outcome, ending.reason) == ("failed", "stuck")
        assert [line["kind"] for line in desk.of_hive() if line["subtype"] == "stuck"] == ["silent"]
        assert desk.pid is None


async def test_a_program_that_hangs_behind_its_result_is_ended_and_its_turn_counts(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claude, "LATE_S", 0.1)
    async with a_desk(tmp_path, ["one", "two"]) as desk:
        desk.on_line = lambda line: line["type"] == "result" and os.kill(pid_of(desk), signal.SIGSTOP)
        ending = await desk.turn("hello", turns="cold")
        assert ending.outcome == "done"
        assert [line["kind"] for line in desk.of_hive() if line["subtype"] == "stuck"] == ["not_ending"]
        desk.on_line = lambda line: None
        # It may not have written its session down by then: that is noticed and said.
        second = await desk.turn("again", turns="cold")
        assert (second.outcome, second.session_lost) == ("done", second.session != ending.session)


def pid_of(desk: Desk) -> int:
    assert desk.pid is not None
    return desk.pid


# -- the session ------------------------------------------------------------------------------------------------------


async def test_a_session_is_compacted_and_goes_on(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two", SUMMARY, "three"]) as desk:
        for word in ("first", "second"):
            await desk.turn(word)
        desk.states.clear()
        ending = await desk.errand("compact")
        assert (ending.outcome, desk.states[0]) == ("done", "compacting")
        assert ending.context is not None
        third = await desk.turn("third")
        assert (third.outcome, third.session) == ("done", ending.session)
        asked = json.dumps(desk.model.turns[-1].messages)
        assert "We said hello." in asked
        assert "first" not in asked


async def test_a_session_that_cannot_be_compacted_fails_the_errand_and_nothing_else(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two"]) as desk:
        await desk.turn("first")
        ending = await desk.errand("compact")
        assert (ending.outcome, ending.reason) == ("failed", "error")
        assert ending.error == "the session was not compacted: Not enough messages to compact."
        assert (await desk.turn("second")).outcome == "done"


async def test_a_session_that_is_nearly_full_saves_its_notes_before_it_is_compacted(tmp_path: Path) -> None:
    full = say("two", input_tokens=160_000)
    async with a_desk(tmp_path, ["one", full, "They are saved.", SUMMARY, "three"]) as desk:
        await desk.turn("first")
        second = await desk.turn("second")
        assert second.context == {"tokens": 160_001, "window": 200_000}
        ending = await desk.errand("save_and_compact")
        assert (ending.outcome, ending.error) == ("done", None)
        assert ending.context is not None
        assert ending.context["tokens"] < 10_000
        assert desk.prompts()[2].strip() == SAVE_NOTES.strip()
        assert (await desk.turn("third")).outcome == "done"


async def test_a_prompt_that_is_too_long_is_compacted_and_tried_once_more(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two", fail(400, TOO_LONG), SUMMARY, "three"]) as desk:
        for word in ("first", "second"):
            await desk.turn(word)
        third = await desk.turn("third")
        assert (third.outcome, third.reason) == ("done", None)
        assert [line["subtype"] for line in desk.of_hive()] == ["too_long"]
        assert "compacting" in desk.states
        assert GO_ON.strip() not in desk.prompts()[-1]
        assert third.usage is not None
        assert third.usage["input_tokens"] == 10


async def test_a_turn_that_is_full_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    works = say("I look.", tool("Bash", command="echo once >> done"))
    async with a_desk(tmp_path, ["one", works, fail(400, TOO_LONG), SUMMARY, "The rest."]) as desk:
        await desk.turn("first")
        second = await desk.turn("second")
        assert (second.outcome, second.reason) == ("done", None)
        assert GO_ON.strip() in desk.prompts()[-1]
        assert "second" in desk.prompts()[-1]


async def test_a_prompt_that_is_still_too_long_fails_the_turn(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two", fail(400, TOO_LONG), SUMMARY, fail(400, TOO_LONG)]) as desk:
        for word in ("first", "second"):
            await desk.turn(word)
        third = await desk.turn("third")
        assert (third.outcome, third.reason) == ("failed", "prompt_too_long")


async def test_the_program_never_compacts_by_itself(tmp_path: Path) -> None:
    """It sees that the next prompt would be too long, and says so: then the harness compacts, and tells it."""
    full = say("two", input_tokens=199_000)
    async with a_desk(tmp_path, ["one", full, SUMMARY, "three"]) as desk:
        for word in ("first", "second"):
            await desk.turn(word)
        assert "compacting" not in desk.states
        assert (await desk.turn("third")).outcome == "done"
        assert [line["subtype"] for line in desk.of_hive()] == ["too_long"]


async def test_another_model_goes_on_in_the_same_session_and_a_new_session_knows_nothing(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two", "three"]) as desk:
        first = await desk.turn("first")
        second = await desk.turn("second", model="haiku")
        assert second.session == first.session
        assert "haiku" in desk.model.turns[1].model
        assert "first" in json.dumps(desk.model.turns[1].messages)
        desk.begin_new_session()
        third = await desk.turn("third", model="haiku")
        assert third.session not in (None, first.session)
        assert "first" not in json.dumps(desk.model.turns[2].messages)
