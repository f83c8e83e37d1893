"""What turns of the real Claude Code cost, as the relay counts it, and how a budget stops one in the middle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hive_core.cli.client import Client
from tests.claude.test_story import step
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude
from tests.scripted_model import Answer, Request, ScriptedModel, say, tool

ALL = 70_000  # tokens of output: more than a USD


def answer(request: Request) -> Answer:
    """Two steps for each message; the first of dear work takes all that a budget has."""
    dear = "dear" in request.last_user_text and not any("dear" in text for text in request.user_texts[:-1])
    if step(request) == 0:
        command = tool("Bash", command="echo here", description="look")
        return say(command, input_tokens=1_000, output_tokens=ALL if dear else 70)
    return say("Done.", input_tokens=2_000, output_tokens=8)


@pytest.fixture
def stage() -> Iterator[tuple[Daemon, ScriptedModel]]:
    with ScriptedModel(answer) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        with open_daemon(*flags, ANTHROPIC_API_KEY="sk-ant-api03-of-a-test") as daemon:
            yield daemon, model


def event(daemon: Daemon, client: Client, kind: str, after: int = 0) -> dict[str, Any]:
    return daemon.events(client, lambda event: event["kind"] == kind, after)


def test_what_turns_cost_is_what_the_provider_told_also_when_the_daemon_was_killed(
    stage: tuple[Daemon, ScriptedModel],
) -> None:
    daemon, _ = stage
    client = daemon.start()
    seen = 0
    for number in range(2):  # the second one in the same process
        client.call("send", to="hm1nd", body=f"cheap work {number}")
        settled = event(daemon, client, "turn_settled", seen)
        seen = settled["seq"]
        assert settled["data"]["cost_micro_usd"] == 3 * 3_000 + 15 * 78, "of sonnet"
    (row,) = client.call("costs")["rows"]
    kinds = ("calls", "unknown_calls", "input_tokens", "output_tokens", "estimated_micro_usd")
    assert [row[kind] for kind in kinds] == [4, 0, 6_000, 156, 0]
    assert not [e for e in client.stream("events", limit=500) if e["kind"] == "usage_differs"]
    daemon.kill()
    client = daemon.start()
    assert client.call("costs")["rows"] == [row]
    assert client.call("costs", by="cause")["rows"][0]["key"] == "operator"


def test_a_turn_is_stopped_by_its_budget_and_its_message_goes_on_when_that_is_raised(
    stage: tuple[Daemon, ScriptedModel],
) -> None:
    daemon, model = stage
    client = daemon.start()
    client.call("budget_set", scope="hm1nd", total="1")
    message = client.call("send", to="hm1nd", body="dear work")["message"]
    stopped = daemon.wait_live(lambda agent: agent["state"] == "over_budget")
    assert "the budget of hm1nd in total, 1.00 USD, is spent" in stopped["detail"]
    ended = event(daemon, client, "turn_ended")
    assert ended["data"]["state"] == "waiting"
    asked = len(model.turns)
    assert asked == 1
    client.call("budget_set", scope="hm1nd", total="100")
    daemon.events(client, lambda e: e["kind"] == "turn_ended", ended["seq"])
    (delivery,) = client.call("explain", message=message)["deliveries"]
    assert (delivery["state"], delivery["failures"]) == ("acked", 0)
    assert len(model.turns) > asked
    told = {e["kind"] for e in client.stream("events", limit=500)}
    assert {"budget_set", "budget_spent"} <= told
    assert "usage_differs" not in told, "a call that was cut is counted by the relay alone"
