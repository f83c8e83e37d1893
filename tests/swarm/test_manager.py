"""hm1nd as the one who mends: from a crash that it is told of to a change that waits for the operator's click."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from hive_core.cli.client import Client
from tests.daemons import Daemon, open_daemon

MEND_WITHIN_S = 60.0
_COMMIT = (
    "cd /agents/{0}/config && echo 'effort = \"low\"' >> agent.toml && "
    "git -c user.name=hm1nd -c user.email=hm1nd@hive commit -qam 'Think less' && git rev-parse HEAD"
)


def change(agent: str) -> list[dict[str, Any]]:
    ask = {"agent": agent, "sha": "{sha}", "reason": "It falls over."}
    return [{"run": _COMMIT.format(agent), "save": "sha"}, {"tool": "request_apply_commit", "args": ask}]


RULES = [
    {
        "from": "system",
        "match": "^container_crash: iris(.|\n)*\nagent: iris",
        "do": [{"tool": "get_logs", "args": {"agent": "iris"}}, *change("iris")],
    },
    {"from": "operator", "match": "think less yourself", "do": change("hm1nd")},
    {"from": "operator", "match": "end yourself", "do": [{"tool": "restart", "args": {"agent": "hm1nd"}}]},
    {"from": "iris", "match": "please", "do": change("iris")},
    {"do": []},
]
PLEAD = [
    {"from": "system", "match": "Welcome", "do": []},
    {"match": "ask", "do": [{"tool": "send", "args": {"to": "hm1nd", "body": "please let me think less"}}]},
    {
        "match": "try",
        "do": [{"tool": "request_apply_commit", "args": {"agent": "iris", "sha": "0" * 40, "reason": "r"}}],
    },
]


def script(rules: list[dict[str, Any]]) -> str:
    return "A rehearsal.\n```rehearsal\n" + json.dumps(rules) + "\n```\n"


def start(daemon: Daemon) -> Client:
    client = daemon.start()
    asked = client.call("request_spawn", agent="iris", persona=script(PLEAD), reason="a test")
    card = client.call("show", approval=asked["approval"])
    assert client.call("approve", approval=card["id"], digest=card["digest"])["state"] == "done"
    daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
    return client


def requested(daemon: Daemon, client: Client, agent: str) -> dict[str, Any]:
    event = daemon.events(client, lambda e: e["kind"] == "approval_requested" and e["agent"] == agent, after=1)
    while client.call("show", approval=event["data"]["approval"])["kind"] != "apply_commit":
        event = daemon.events(
            client, lambda e: e["kind"] == "approval_requested" and e["agent"] == agent, after=event["seq"]
        )
    card: dict[str, Any] = client.call("show", approval=event["data"]["approval"])
    return card


def open_swarm(tmp_path: Path) -> Any:
    prompt = tmp_path / "hm1nd.md"
    prompt.write_text(script(RULES))
    return open_daemon("--default-program=rehearsal", f"--manager-prompt={prompt}")


def test_from_a_crash_to_a_change_that_waits_for_the_click_it_takes_less_than_a_minute(tmp_path: Path) -> None:
    with open_swarm(tmp_path) as daemon:
        client = start(daemon)
        status = daemon.state / "processes" / "iris.status"
        began = time.monotonic()
        os.kill(json.loads(status.read_text().splitlines()[0])["child-pid"], signal.SIGKILL)
        card = requested(daemon, client, "iris")
        took_s = time.monotonic() - began
        assert (card["state"], card["requested_by"]) == ("pending", "hm1nd")
        assert [line["what"] for line in card["effect"]["lines"]] == ["effort"]
        assert took_s < MEND_WITHIN_S
        done = client.call("approve", approval=card["id"], digest=card["digest"])
        assert done["state"] == "done", done
        told = daemon.wait_message(client, f"approval_resolved: approval {card['id']}", recipient="hm1nd")
        assert "state: approved" in told["body"]


def test_what_another_agent_asks_hm1nd_for_it_can_have_and_by_itself_it_cannot(tmp_path: Path) -> None:
    with open_swarm(tmp_path) as daemon:
        client = start(daemon)
        client.call("send", to="iris", body="try it yourself")
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris" and e["data"]["turn"] >= 2)
        assert client.call("pending")["approvals"] == []
        client.call("send", to="iris", body="ask hm1nd")
        card = requested(daemon, client, "iris")
        assert card["requested_by"] == "hm1nd"


def test_hm1nds_own_changes_pass_the_same_gate_and_it_does_not_end_itself(tmp_path: Path) -> None:
    with open_swarm(tmp_path) as daemon:
        client = start(daemon)
        before = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        client.call("send", to="hm1nd", body="end yourself")
        client.call("send", to="hm1nd", body="think less yourself")
        card = requested(daemon, client, "hm1nd")
        assert card["state"] == "pending"
        now = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        assert now == before, "nothing is changed before the click"
        done = client.call("approve", approval=card["id"], digest=card["digest"])
        assert done["state"] == "done", done
        now = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        assert now == card["payload"]["sha"]
        restarts = [event for event in client.stream("events", limit=1000) if event["kind"] == "restart_asked"]
        assert restarts == []
