"""Many turns of one real Claude Code process, against a scripted model."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from hive_agent.background import Background
from hive_agent.reports import Reports
from hive_agent.runner import Ending
from tests.claude_desk import a_desk
from tests.harness_host import a_lease
from tests.processes import PATIENCE_S, look_until
from tests.scripted_model import Answer, fail, say, tool


async def test_one_process_takes_many_turns_and_each_tells_what_it_cost_alone(tmp_path: Path) -> None:
    async with a_desk(
        tmp_path, ["one", say("I say it.", tool("mcp__hive__send", to="operator", body="x")), "It is said.", "three"]
    ) as desk:
        first = await desk.turn("first")
        pid = desk.pid
        second = await desk.turn("second")
        third = await desk.turn("third")
        assert desk.pid == pid is not None
        assert {ending.outcome for ending in (first, second, third)} == {"done"}
        assert {ending.session for ending in (first, second, third)} == {first.session}
        usages = [ending.usage or {} for ending in (first, second, third)]
        assert [usage["input_tokens"] for usage in usages] == [10, 20, 10]
        assert usages[1]["cost_usd"] == pytest.approx(2 * usages[0]["cost_usd"])
        assert usages[2]["cost_usd"] == pytest.approx(usages[0]["cost_usd"])
        (told,) = usages[1]["models"].values()
        assert (told["inputTokens"], told["outputTokens"]) == (20, 10)


async def test_no_words_of_a_message_make_the_program_read_a_file_or_run_a_command_of_its_own(tmp_path: Path) -> None:
    """It knows @paths, /commands and !commands in what a person types."""
    (tmp_path / "secret.txt").write_text("what stands in the file")
    async with a_desk(tmp_path, ["one", "two"]) as desk:
        for body in ("look at @secret.txt and @./secret.txt", "/compact\n!touch ran\n@secret.txt"):
            assert (await desk.turn(body)).outcome == "done"
        asked = json.dumps([request.body for request in desk.model.turns])
        assert len(desk.model.turns) == 2
    assert "@./secret.txt" in asked
    assert "what stands in the file" not in asked
    assert not (tmp_path / "ran").exists()


async def test_a_turn_that_the_provider_refuses_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", fail(429, "slow down"), "three"]) as desk:
        await desk.turn("first")
        pid = desk.pid
        refused = await desk.turn("second")
        assert (refused.outcome, desk.pid) == ("waiting", pid)
        assert (await desk.turn("third")).outcome == "done"


async def test_an_interrupted_turn_ends_in_a_moment_and_its_session_goes_on(tmp_path: Path) -> None:
    async with a_desk(
        tmp_path, ["one", say("I wait.", tool("Bash", command="echo $$ > here; sleep 600")), "three"]
    ) as desk:
        first = await desk.turn("first")
        async with trio.open_nursery() as nursery:
            endings: list[Ending] = []

            async def take() -> None:
                endings.append(await desk.turn("second"))

            nursery.start_soon(take)
            await trio.to_thread.run_sync(look_until, (tmp_path / "here").exists)
            desk.runner.interrupt()
        assert (endings[0].outcome, endings[0].session) == ("cancelled", first.session)
        assert desk.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "here").read_text()), 0)
        third = await desk.turn("third")
        assert (third.outcome, third.session) == ("done", first.session)
        assert "third" in desk.prompts()[-1]


async def test_a_session_goes_on_in_a_new_process_when_the_old_one_was_killed(tmp_path: Path) -> None:
    async with a_desk(tmp_path, ["one", "two"]) as desk:
        first = await desk.turn("first")
        pid = desk.pid
        assert pid is not None
        # It writes its session down a moment after it has told the result.
        await trio.to_thread.run_sync(look_until, lambda: list(tmp_path.rglob(f"{first.session}.jsonl")))
        os.kill(pid, signal.SIGKILL)
        second = await desk.turn("second")
        assert (second.outcome, second.session) == ("done", first.session)
        assert desk.pid not in (None, pid)
        messages = json.dumps(desk.model.turns[-1].messages)
        assert "first" in messages
        assert "second" in messages


async def test_the_programs_own_background_is_off_and_the_harness_runs_what_outlives_a_turn(tmp_path: Path) -> None:
    answers = [
        say("I start it.", tool("mcp__hive__run_in_background", command="echo $HIVE_AGENT > ran; sleep 600")),
        "It runs.",
        say("I wait.", tool("Bash", command="sleep 0.1; echo over", run_in_background=True)),
        "It is over.",
    ]
    reports = Reports()
    background = Background(str(tmp_path), reports)
    async with trio.open_nursery() as nursery:
        await nursery.start(background.serve)
        async with a_desk(tmp_path, cast("list[Answer]", answers), background.address) as desk:
            background.begin_turn(cast("Any", a_lease(1)))
            assert (await desk.turn("start the build")).outcome == "done"
            offered = {one["name"]: one for one in desk.model.turns[0].body["tools"]}
            assert "run_in_background" not in offered["Bash"]["input_schema"]["properties"]
            assert "mcp__hive__run_in_background" in offered
            await trio.to_thread.run_sync(look_until, lambda: (tmp_path / "ran").read_text() == "iris\n")
            assert (await desk.turn("and now wait")).outcome == "done"
            assert "parameter `run_in_background` was provided" in json.dumps(desk.model.turns[-1].messages[-1])
            assert desk.pid is not None
        nursery.cancel_scope.cancel()


async def test_a_check_tells_whether_the_tools_are_reached_without_a_call_of_the_model_or_a_session(
    tmp_path: Path,
) -> None:
    async with a_desk(tmp_path, ["one", "two"]) as desk:
        first = await desk.turn("first")
        settings = a_lease(9, program="claude", prompt="You are iris, changed.")["settings"]
        for credential in ("api_key", "oauth_token"):
            asked = {"check": "k", "settings": settings, "credential": credential}
            with trio.fail_after(PATIENCE_S):
                assert await desk.runner.check(cast("Any", asked)) == ("", None, ())
            assert desk.pid is None
        maps = {"maps": {"command": "/no/such/maps", "args": [], "env": {}}}
        asked = {"check": "k", "settings": {**settings, "mcp_servers": maps}, "credential": "api_key"}
        with trio.fail_after(PATIENCE_S):
            assert await desk.runner.check(cast("Any", asked)) == ("", None, ("maps",))
        assert len(desk.model.turns) == 1
        second = await desk.turn("second")
        assert (second.outcome, second.session) == ("done", first.session)
    # The program writes the file of its session when it likes, but it has ended now.
    assert [path.stem for path in (tmp_path / ".claude" / "projects").rglob("*.jsonl")] == [first.session]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("ready", None),
        (fail(429, "slow down"), "rate_limited"),
        (fail(401, "who are you"), "authentication"),
        (fail(529, "too many"), "overloaded"),
        (fail(400, "no such model"), "error"),
    ],
)
async def test_a_check_with_a_prompt_takes_a_turn_and_tells_the_providers_fault_from_its_own(
    tmp_path: Path, answer: Answer, outcome: str | None
) -> None:
    async with a_desk(tmp_path, lambda request: answer) as desk:
        settings = a_lease(9, program="claude", prompt="You are iris.")["settings"]
        asked = {"check": "k", "settings": settings, "credential": "api_key", "prompt": "Answer with ready."}
        with trio.fail_after(4 * PATIENCE_S):  # 529 is tried again for 17 s
            error, reason, _ = await desk.runner.check(cast("Any", asked))
        assert (reason, bool(error)) == (outcome, outcome is not None)
        assert desk.prompts()[0] == "Answer with ready."
