"""The operator's hand through a whole daemon: told in the middle of a turn, in force behind it, whoever dies."""

from __future__ import annotations

import os
import signal
from typing import Any

from hive_core.cli.client import Client
from tests.daemons import Daemon
from tests.swarm.test_outlive import GATED, SAY_WHO, WELCOME, open_swarm, pid_of, spawn

WHICH = {"from": "operator", "match": "which", "do": [{"tool": "send", "args": {"to": "operator", "body": "{model}"}}]}


def is_end(event: dict[str, Any]) -> bool:
    return event["kind"] == "turn_ended" and event["agent"] == "iris"


def begin_gated_turn(daemon: Daemon, client: Client) -> str:
    """Let iris be in the middle of a turn; the session it has by then."""
    spawn(client, "iris", [WELCOME, GATED, WHICH, {"do": [SAY_WHO]}])
    session = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["session"] is not None)["session"]
    client.call("send", to="iris", body="work")
    daemon.wait_message(client, "begun")
    return str(session)


def let_go(daemon: Daemon) -> None:
    (daemon.state / "agents" / "iris" / "state" / "go").touch()


def test_what_is_told_in_the_middle_of_a_turn_outlives_the_daemon_and_holds_behind_it() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        session = begin_gated_turn(daemon, client)
        client.call("model", agent="iris", model="opus")
        client.call("compact", agent="iris")
        daemon.kill()
        client = daemon.start()
        let_go(daemon)
        daemon.wait_message(client, "finished")
        errand = daemon.events(client, lambda event: event["kind"] == "turn_started" and "errand" in event["data"])
        assert (errand["data"]["errand"], errand["data"]["by"]) == ("compact", "operator")
        ended = daemon.events(client, is_end, after=errand["seq"])
        assert (ended["data"]["turn"], ended["data"]["state"]) == (errand["data"]["turn"], "done")
        client.call("send", to="iris", body="which model?")
        daemon.wait_message(client, "opus")
        iris = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        assert (iris["session"], iris["errand"], iris["context_tokens"]) == (session, None, 1)


def test_a_new_session_is_begun_behind_the_turn_that_runs_and_by_another_harness_alike() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        session = begin_gated_turn(daemon, client)
        assert client.call("new_session", agent="iris")["turn"] is not None
        let_go(daemon)
        daemon.wait_message(client, "finished")
        iris = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        assert iris["session"] is None
        os.kill(pid_of(daemon, "iris"), signal.SIGKILL)
        client.call("send", to="iris", body="who?")
        daemon.wait_message(client, "it is me")
        again = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["session"] is not None)
        assert again["session"] != session
