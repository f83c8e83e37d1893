"""Agents that are destroyed, revived and purged, with a real daemon that is killed in the middle of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.daemons import WITHIN_S, Daemon
from tests.processes import wait_gone
from tests.swarm.test_outlive import GATED, SAY_WHO, WELCOME, copies_of, open_swarm, pid_of, spawn

SAYS = {"from": "operator", "match": "who", "do": [SAY_WHO]}


def tombstones(client: Client) -> list[dict[str, Any]]:
    return list(client.call("tombstones")["tombstones"])


def names(client: Client) -> list[str]:
    return [agent["name"] for agent in client.call("list")["agents"]]


def idle(daemon: Daemon, client: Client, name: str = "iris") -> None:
    daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == name)


def hive(daemon: Daemon, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hive_core.cli", *words],
        env={**os.environ, "HIVE_RUNTIME_DIR": str(daemon.runtime)},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_an_agent_is_destroyed_at_its_turns_edge_revived_as_it_was_and_purged_for_good() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED, SAYS])
        idle(daemon, client)
        state = daemon.state / "agents" / "iris" / "state"
        (state / "notes").write_text("remember")
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        pid, port = pid_of(daemon, "iris"), client.call("list")["agents"][1]["page"]
        other = daemon.client()
        (state / "go").touch()
        gone = other.call("destroy", agent="iris")
        assert gone["state"] in ("destroying", "kept")
        daemon.events(client, lambda e: e["kind"] == "agent_destroyed")
        daemon.wait_message(client, "finished")  # its turn was not cut
        wait_gone(pid)
        assert names(client) == ["hm1nd"]
        (tomb,) = tombstones(client)
        assert (tomb["name"], tomb["state"], tomb["bytes"] > 0) == ("iris", "kept", True)
        room = daemon.state / "tombstones" / tomb["tombstone"]
        assert sorted(os.listdir(room)) == ["agent", "applied.git", "proposed"]
        for place in ("agents/iris", "proposed/iris", "applied/iris.git"):
            assert not (daemon.state / place).exists()
        assert not (daemon.runtime / "agents" / "iris").exists()
        with pytest.raises(Refusal, match="cannot send to iris: it was destroyed; `hive revive iris` brings it back"):
            client.call("send", to="iris", body="are you there?")
        assert "finished" in [row["body"] for row in client.call("messages", agent="iris")["messages"]]
        assert client.call("revive", tombstone="iris")["name"] == "iris"
        assert tombstones(client) == []
        assert (state / "notes").read_text() == "remember"
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")
        assert client.call("list")["agents"][1]["page"].rpartition("/")[2] or port
        client.call("destroy", agent="iris", now=True)
        daemon.events(client, lambda e: e["kind"] == "agent_destroyed", after=0)
        removed = hive(daemon, "purge", "iris", "--yes")
        assert removed.returncode == 0, removed.stderr
        assert tombstones(client) == []
        assert os.listdir(daemon.state / "tombstones") == []


def test_now_does_not_wait_for_the_turn_and_its_message_is_dead() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        idle(daemon, client)
        sent = client.call("send", to="iris", body="work")["message"]
        daemon.wait_message(client, "begun")
        pid = pid_of(daemon, "iris")
        assert client.call("destroy", agent="iris", now=True)["state"] == "kept"
        wait_gone(pid)
        (dead,) = client.call("dead")["messages"]
        assert (dead["id"], dead["note"]) == (sent, "iris was destroyed")
        daemon.wait_message(client, f"message_dead: your message {sent} to iris will not be read: iris was destroyed")


STRIKE = """
import os, signal, sys

ARMED = os.path.join(os.path.dirname(__file__), "armed")

def strike(event, arguments):
    if event == {event!r} and {word!r} in " ".join(str(argument) for argument in arguments[:2]):
        if os.path.exists(ARMED):
            os.remove(ARMED)
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(strike)
"""


@pytest.mark.parametrize(
    ("event", "word"),
    [("os.rename", "agents/iris"), ("os.rename", "proposed/iris"), ("os.rename", "applied/iris.git")],
)
def test_a_destruction_whose_daemon_is_killed_in_the_middle_is_completed_by_the_next(
    tmp_path: Path, event: str, word: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE.format(event=event, word=word))
    with open_swarm(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, SAYS])
        idle(daemon, client)
        (tmp_path / "armed").touch()
        with pytest.raises(Refusal):
            client.call("destroy", agent="iris")
        assert daemon.process.wait(WITHIN_S) == -signal.SIGKILL
        client = daemon.start()
        daemon.events(client, lambda e: e["kind"] == "agent_destroyed")
        (tomb,) = tombstones(client)
        room = daemon.state / "tombstones" / tomb["tombstone"]
        assert sorted(os.listdir(room)) == ["agent", "applied.git", "proposed"]
        assert names(client) == ["hm1nd"]
        assert copies_of(daemon, "iris") == []
        (tmp_path / "armed").touch()
        with pytest.raises(Refusal):
            client.call("revive", tombstone="iris")
        assert daemon.process.wait(WITHIN_S) == -signal.SIGKILL
        client = daemon.start()
        daemon.events(client, lambda e: e["kind"] == "agent_revived")
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")


def test_a_purge_whose_daemon_is_killed_in_the_middle_is_completed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE.format(event="os.rmdir", word="agent"))
    with open_swarm(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        idle(daemon, client)
        client.call("destroy", agent="iris", now=True)
        (tmp_path / "armed").touch()
        with pytest.raises(Refusal):
            client.call("purge", tombstone="iris")
        assert daemon.process.wait(WITHIN_S) == -signal.SIGKILL
        client = daemon.start()
        daemon.events(client, lambda e: e["kind"] == "agent_purged")
        assert tombstones(client) == []
        assert os.listdir(daemon.state / "tombstones") == []
        spawn(client, "iris", [WELCOME])
        idle(daemon, client)


def test_a_purge_takes_a_name_and_never_a_path_or_a_link_and_asks_before_it_removes() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        idle(daemon, client)
        client.call("destroy", agent="iris", now=True)
        (tomb,) = tombstones(client)
        room = daemon.state / "tombstones" / tomb["tombstone"]
        for bad in ("..", "../agents", "/", "iris@../..", "iris@2026/../x", "", "agents/hm1nd", "iris@\n"):
            with pytest.raises(Refusal):
                client.call("purge", tombstone=bad)
        asked = hive(daemon, "purge", "iris")
        assert asked.returncode == 2
        assert f"cannot ask whether to remove {tomb['tombstone']}" in asked.stderr
        assert room.is_dir()
        elsewhere = daemon.folder / "elsewhere"
        room.rename(elsewhere)
        room.symlink_to(elsewhere)
        with pytest.raises(Refusal, match="it is no directory, so it is not what the hive keeps there"):
            client.call("purge", tombstone="iris")
        assert sorted(os.listdir(elsewhere)) == ["agent", "applied.git", "proposed"]
        room.unlink()
        elsewhere.rename(room)
        assert client.call("purge", tombstone=tomb["tombstone"])["bytes"] > 0
        shutil.rmtree(elsewhere, ignore_errors=True)
        assert tombstones(client) == []
