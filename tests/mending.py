"""A hive whose hm1nd mends: told of a crash it looks at the logs, commits a change and asks for it. For tests and
benchmarks."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hive_core.cli.client import Client
from tests.daemons import Daemon, open_daemon

_COMMIT = (
    "cd /agents/{0}/config && echo 'effort = \"low\"' >> agent.toml && "
    "git -c user.name=hm1nd -c user.email=hm1nd@hive commit -qam 'Think less' && git rev-parse HEAD"
)


def change(agent: str) -> list[dict[str, Any]]:
    ask = {"agent": agent, "sha": "{sha}", "reason": "It falls over."}
    return [{"run": _COMMIT.format(agent), "save": "sha"}, {"tool": "request_apply_commit", "args": ask}]


MENDS = {
    "from": "system",
    "match": "^container_crash: iris(.|\n)*\nagent: iris",
    "do": [{"tool": "get_logs", "args": {"agent": "iris"}}, *change("iris")],
}


def script(*rules: dict[str, Any]) -> str:
    return "A rehearsal.\n```rehearsal\n" + json.dumps(rules) + "\n```\n"


@contextmanager
def open_mending(*rules: dict[str, Any]) -> Iterator[Daemon]:
    """A daemon that is not started yet, whose hm1nd follows these rules beside the one that mends iris."""
    with tempfile.NamedTemporaryFile("w", prefix="hm1nd-", suffix=".md") as prompt:
        prompt.write(script(MENDS, *rules, {"do": []}))
        prompt.flush()
        with open_daemon("--default-program=rehearsal", f"--manager-prompt={prompt.name}") as daemon:
            yield daemon


def start(daemon: Daemon, *rules: dict[str, Any]) -> Client:
    """The operator of the hive once iris is there, which follows these rules, and has had its first turn."""
    client = daemon.start()
    asked = client.call("request_spawn", agent="iris", persona=script(*rules, {"do": []}), reason="a test")
    card = client.call("show", approval=asked["approval"])
    assert client.call("approve", approval=card["id"], digest=card["digest"])["state"] == "done"
    daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
    return client


def requested(daemon: Daemon, client: Client, agent: str) -> tuple[dict[str, Any], int]:
    """The card of the first commit of an agent that is asked for, and when it was there; waits for it."""
    card: dict[str, Any] = {}

    def wanted(event: dict[str, Any]) -> bool:
        nonlocal card
        if (event["kind"], event["agent"]) != ("approval_requested", agent):
            return False
        card = client.call("show", approval=event["data"]["approval"])
        return card["kind"] == "apply_commit"

    at_ms = int(daemon.events(client, wanted)["at_ms"])
    return card, at_ms


def crash_to_card(daemon: Daemon, client: Client) -> tuple[dict[str, Any], float]:
    """Kill iris. The card of what hm1nd asks for then, and the seconds from the crash's event to its own."""
    status = daemon.state / "processes" / "iris.status"
    os.kill(json.loads(status.read_text().splitlines()[0])["child-pid"], signal.SIGKILL)
    crash = daemon.events(client, lambda e: (e["kind"], e["agent"]) == ("agent_ended", "iris"))
    assert crash["data"]["expected"] is False
    card, at_ms = requested(daemon, client, "iris")
    return card, (at_ms - crash["at_ms"]) / 1000
