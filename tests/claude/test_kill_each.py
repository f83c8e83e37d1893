"""Each process around a turn of the real Claude Code is killed in the middle of it; the work is done all the same."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator

import pytest

from hive_core.cli.client import Client
from hive_core.containers.process_tree import parent_of
from tests.claude.test_story import step
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude
from tests.processes import children_of, look_until, pids_naming
from tests.scripted_model import Answer, Request, ScriptedModel, say, tool

WAITS = "touch begun; while [ ! -e go ]; do sleep 0.05; done; echo went on"


def answer(request: Request) -> Answer:
    """A message that asks for work: a tool that waits for the test, then a word to the operator. A word for others."""
    if "some work" not in request.last_user_text:
        return f"I have heard {len(request.user_texts)} messages."
    steps = [
        say(tool("Bash", command=WAITS, description="wait")),
        say(tool("mcp__hive__send", to="operator", body="the work is done")),
        say("Done."),
    ]
    return steps[min(step(request), 2)]


@pytest.fixture
def stage() -> Iterator[tuple[Daemon, ScriptedModel]]:
    with ScriptedModel(answer) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--backoff-s=0.1")
        with open_daemon(*flags, ANTHROPIC_API_KEY="sk-ant-api03-of-a-test") as daemon:
            yield daemon, model


def process(daemon: Daemon, victim: str) -> int:
    """The pid of one of the processes around hm1nd's turn."""
    bwrap = int(json.loads((daemon.state / "processes" / "hm1nd.json").read_text())["pid"])
    (harness,) = children_of(bwrap)
    if victim in ("bwrap", "harness"):
        return bwrap if victim == "bwrap" else harness
    words = "claude\0--print\0" if victim == "claude" else "\0mcp\0--socket\0"
    # The program's own command line names the bridge, too, but in one word.
    found = [pid for pid in pids_naming(words) if in_sandbox_of(harness, pid)]
    # Nor is it what it forks, which is called as it is until it runs another.
    (pid,) = [pid for pid in found if parent_of(pid) not in found]
    return pid


def in_sandbox_of(harness: int, pid: int) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{harness}/ns/pid")
    return False


def end_of(daemon: Daemon, client: Client, message: int) -> None:
    """Wait until the message was acked."""
    acked = f"message {message} is not acked"
    look_until(lambda: client.call("explain", message=message)["deliveries"][0]["state"] == "acked")
    assert client.call("explain", message=message)["deliveries"][0]["state"] == "acked", acked


@pytest.mark.parametrize("victim", ["claude", "bridge", "harness", "bwrap", "daemon"])
def test_the_work_is_done_although_a_process_was_killed_in_it(stage: tuple[Daemon, ScriptedModel], victim: str) -> None:
    daemon, model = stage
    client = daemon.start()
    for number in range(2):
        end_of(daemon, client, client.call("send", to="hm1nd", body=f"hello {number}")["message"])
    home = daemon.state / "agents" / "hm1nd" / "state"
    work = client.call("send", to="hm1nd", body="some work")["message"]
    look_until((home / "begun").exists)
    if victim == "daemon":
        daemon.kill()
    else:
        os.kill(process(daemon, victim), signal.SIGKILL)
    (home / "go").touch()
    if victim == "daemon":
        client = daemon.start()
    assert daemon.wait_message(client, "the work is done")["sender"] == "hm1nd"
    end_of(daemon, client, work)
    last = client.call("send", to="hm1nd", body="how many?")["message"]
    end_of(daemon, client, last)
    assert any("hello 0" in text for text in model.turns[-1].user_texts), "the session was lost"
    assert len(pids_naming(f"--bind\0{home}\0")) == 1, "two sandboxes of one agent run"
