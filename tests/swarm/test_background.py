"""Commands that outlive the turn that began them: in real sandboxes, with a rehearsal as the program."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Daemon
from tests.processes import look_until, wait_gone
from tests.swarm.test_outlive import WELCOME, open_swarm, pid_of, spawn

TELL = {
    "from": "system",
    "match": "^background:",
    "do": [{"tool": "send", "args": {"to": "operator", "body": "{body}"}}],
}
UNTIL_GO = "echo $$ > pid; while [ ! -e go ]; do sleep 0.05; done; echo built; exit 3"


def begin(command: str, **arguments: str) -> dict[str, Any]:
    """A rule that begins a command and says so."""
    begun = {"tool": "run_in_background", "args": {"command": command, **arguments}, "save": "begun"}
    return {"from": "operator", "do": [begun, {"tool": "send", "args": {"to": "operator", "body": "begun {begun}"}}]}


def state_of(daemon: Daemon, name: str = "iris") -> Path:
    return daemon.state / "agents" / name / "state"


def ended_turn(daemon: Daemon, client: Any, after: int) -> None:
    daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris", after=after)


def test_a_command_outlives_its_turn_and_wakes_its_agent_when_it_ends() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, TELL, begin(UNTIL_GO, note="the build")])
        client.call("send", to="iris", body="build it")
        begun = json.loads(daemon.wait_message(client, "begun ")["body"].removeprefix("begun "))
        assert begun["output"] == f"/state/background/{begun['work']}.log"
        seq = daemon.events(client, lambda e: e["kind"] == "background_begun" and e["agent"] == "iris")["seq"]
        ended_turn(daemon, client, seq)
        (open_work,) = client.call("loose_ends", agent="iris")["you_wait_for"]["background"]
        assert (open_work["work"], open_work["note"]) == (begun["work"], "the build")
        (state_of(daemon) / "go").touch()
        told = daemon.wait_message(client, "background: ")["body"]
        assert f"work {begun['work']} has ended with exit code 3 after" in told
        assert ('command: "the build"' in told, 'tail: "built"' in told) == (True, True), told
        assert (state_of(daemon) / "background" / f"{begun['work']}.log").read_text() == "built\n"
        assert client.call("loose_ends", agent="iris")["you_wait_for"]["background"] == []
        woke = next(
            row
            for row in client.call("messages", agent="iris")["messages"]
            if row["sender"] == "system" and "work" in row["body"]
        )
        assert woke["cause"] == "turn"


def test_a_command_that_ends_while_the_daemon_is_away_wakes_its_agent_once() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, TELL, begin(UNTIL_GO)])
        client.call("send", to="iris", body="build it")
        daemon.wait_message(client, "begun ")
        daemon.kill()
        (state_of(daemon) / "go").touch()
        look_until(lambda: not list((state_of(daemon) / "background").glob("*.json")) or _ended(daemon))
        client = daemon.start()
        daemon.wait_message(client, "background: ")
        look_until(lambda: not list((state_of(daemon) / "background").glob("*.json")))
        woke = [
            row for row in client.call("messages", agent="iris")["messages"] if row["body"].startswith("background")
        ]
        assert [row["recipient"] for row in woke] == ["iris", "operator"]


def _ended(daemon: Daemon) -> bool:
    return any('"ended"' in path.read_text() for path in (state_of(daemon) / "background").glob("*.json"))


def test_what_a_restart_cut_off_is_told_by_the_next_harness() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, TELL, begin(UNTIL_GO)])
        client.call("send", to="iris", body="build it")
        begun = daemon.events(client, lambda e: e["kind"] == "background_begun")
        ended_turn(daemon, client, begun["seq"])
        os.kill(pid_of(daemon, "iris"), signal.SIGKILL)
        told = daemon.wait_message(client, "background: ")["body"]
        assert "was cut off by a restart\n" in told
        (state_of(daemon) / "go").touch()
        ended = daemon.events(client, lambda e: e["kind"] == "background_ended")
        assert ended["data"]["state"] == "cut_off"
        assert client.call("loose_ends", agent="iris")["you_wait_for"]["background"] == []


@pytest.mark.parametrize("flags", [(), ("--unsafe-no-sandbox",)], ids=["bwrap", "none"])
def test_a_command_ends_with_its_agent(flags: tuple[str, ...]) -> None:
    mark = f"31536007.{os.getpid()}{len(flags)}"  # of this one alone: the other may run beside it
    with open_swarm(*flags) as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, begin(f"exec sleep {mark}")])
        client.call("send", to="iris", body="build it")
        daemon.wait_message(client, "begun ")
        (pid,) = look_until(lambda: pids_of(mark))
        list(client.stream("down"))
        wait_gone(pid)


def pids_of(word: str) -> list[int]:
    """Processes with this as an argument of their own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if word.encode() in words:
            found.append(int(path.parent.name))
    return found
