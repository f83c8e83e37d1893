"""The demo's story with the real Claude Code, through the relay, against a scripted model, in each sandbox."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.containers.drivers import need
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude
from tests.scripted_model import Answer, Request, ScriptedModel, say, tool

SECRET = "sk-ant-api03-the-real-one-stays-on-the-host"
SEND = "mcp__hive__send"


def who(request: Request) -> str:
    """The agent that asks, known by its system prompt."""
    found = re.search(r"You are (\w+),", request.system)
    assert found, request.system[-500:]
    return found[1]


def step(request: Request) -> int:
    """How many answers this turn has had already."""
    count = 0
    for message in reversed(request.messages):
        if message["role"] == "assistant":
            count += 1
        elif not any(block.get("type") == "tool_result" for block in message["content"] if isinstance(block, dict)):
            return count
    return count


def play(scenes: dict[tuple[str, str], list[Any]], request: Request) -> Answer:
    """The answer of the scene whose agent asks and whose words are in the message that woke it."""
    agent, woken_by = who(request), request.last_user_text
    for (name, words), answers in scenes.items():
        if name == agent and words in woken_by:
            number = step(request)
            if number >= len(answers):
                return "Done."
            answer: Answer = answers[number](request) if callable(answers[number]) else answers[number]
            return answer
    return "Nothing to do."


def result_text(request: Request) -> str:
    return request.tool_results[-1].text


CHANGE = """cd /agents/iris/config && sed -i 's/^model = .*/model = "haiku"/' agent.toml &&
git commit --quiet --all --message 'Run iris on haiku' && git rev-parse HEAD"""

SCENES: dict[tuple[str, str], list[Any]] = {
    ("hm1nd", "get the login module reviewed"): [
        say(
            "A reviewer is needed.",
            tool("mcp__hive__request_spawn", name="argus", persona="You review code.", reason="a review"),
        ),
    ],
    ("argus", "Welcome to the hive"): [say(tool(SEND, to="operator", body="argus is here"))],
    ("hm1nd", "the new agent argus: approved"): [say(tool(SEND, to="iris", body="Please mend login.py."))],
    ("iris", "Please mend login.py"): [
        say(
            tool(
                "Bash",
                command="printf 'expires = None\\nprint(expires)\\n' > login.py; ls -a / ; id -u",
                description="make",
            )
        ),
        say(tool("Read", file_path="/state/login.py")),
        say(tool("Edit", file_path="/state/login.py", old_string="None", new_string="3600")),
        say(
            tool(
                "Bash",
                command="python3 login.py; env | grep -c the-real-one; ip link 2>/dev/null || cat /proc/net/dev",
                description="run",
            )
        ),
        lambda request: say(tool(SEND, to="hm1nd", body=f"mended; it prints:\n{result_text(request)}")),
    ],
    ("hm1nd", "mended; it prints"): [
        say(tool("Bash", command=CHANGE, description="commit")),
        lambda request: say(
            tool("mcp__hive__request_apply_commit", agent="iris", sha=result_text(request).split()[0], reason="cheaper")
        ),
    ],
    ("hm1nd", "for iris: approved"): [say(tool(SEND, to="operator", body="the story is over"))],
    ("iris", "which model"): [lambda request: say(tool(SEND, to="operator", body=f"I think with {request.model}"))],
}


@pytest.fixture(params=["bwrap", "nspawn"])
def stage(request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, ScriptedModel]]:
    with ScriptedModel(lambda request: play(SCENES, request)) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        flags = (*flags, f"--sandbox={need(request.param)}")
        with open_daemon(*flags, ANTHROPIC_API_KEY=SECRET) as daemon:
            yield daemon, model


def approve(client: Any, approval_id: int) -> None:
    digest = client.call("show", approval=approval_id)["digest"]
    assert client.call("approve", approval=approval_id, digest=digest)["state"] == "done"


def next_request(daemon: Daemon, client: Any, agent: str, kind: str) -> int:
    event = daemon.events(
        client, lambda e: e["kind"] == "approval_requested" and e["agent"] == agent and e["data"]["what"] == kind
    )
    return int(event["data"]["approval"])


def test_the_story_runs_with_the_real_claude(stage: tuple[Daemon, ScriptedModel]) -> None:
    daemon, model = stage
    client = daemon.start()
    asked = client.call("request_spawn", agent="iris", persona="You write code.", reason="the story begins with it")
    approve(client, asked["approval"])
    client.call("send", to="hm1nd", body="Please get the login module reviewed.")

    approve(client, next_request(daemon, client, "argus", "spawn"))
    assert daemon.wait_message(client, "argus is here")["sender"] == "argus"

    approve(client, next_request(daemon, client, "iris", "apply_commit"))
    assert daemon.wait_message(client, "the story is over")["sender"] == "hm1nd"
    assert {agent["name"]: agent["model"] for agent in client.call("list")["agents"]}["iris"] == "haiku"

    mended = daemon.wait_message(client, "mended; it prints", recipient="hm1nd")["body"]
    assert mended.splitlines()[1:3] == ["3600", "0"], "the edit did not count, or the credential is in the sandbox"
    assert "eth" not in mended, "the sandbox sees a network of the host's"
    assert (daemon.state / "agents" / "iris" / "state" / "login.py").read_text().startswith("expires = 3600")

    client.call("send", to="iris", body="which model are you?")
    assert "haiku" in daemon.wait_message(client, "I think with")["body"]

    ended = [e for e in client.stream("events", after=0) if e["kind"] == "turn_ended"]
    assert ended
    assert all(event["data"]["state"] == "done" for event in ended), ended
    assert {request.headers["x-api-key"] for request in model.turns} == {SECRET}
    tools = {name for request in model.turns if who(request) == "iris" for name in request.tools}
    assert {name for name in tools if not name.startswith("mcp__hive__")} == {
        "Bash",
        "Read",
        "Edit",
        "Write",
        "Glob",
        "Grep",
    }
    assert "mcp__hive__request_spawn" not in tools
    assert SECRET not in daemon.log.read_text()
