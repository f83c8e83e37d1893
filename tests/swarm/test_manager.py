"""hm1nd as the one who mends: from a crash that it is told of to a change that waits for the operator's click."""

from __future__ import annotations

from typing import Any

from tests.mending import change, crash_to_card, open_mending, requested, start

MEND_WITHIN_S = 60.0
RULES: list[dict[str, Any]] = [
    {"from": "operator", "match": "think less yourself", "do": change("hm1nd")},
    {"from": "operator", "match": "end yourself", "do": [{"tool": "restart", "args": {"agent": "hm1nd"}}]},
    {"from": "iris", "match": "please", "do": change("iris")},
]
PLEAD: list[dict[str, Any]] = [
    {"from": "system", "match": "Welcome", "do": []},
    {"match": "ask", "do": [{"tool": "send", "args": {"to": "hm1nd", "body": "please let me think less"}}]},
    {
        "match": "try",
        "do": [{"tool": "request_apply_commit", "args": {"agent": "iris", "sha": "0" * 40, "reason": "r"}}],
    },
]


def test_from_a_crash_to_a_change_that_waits_for_the_click_it_takes_less_than_a_minute() -> None:
    with open_mending() as daemon:
        client = start(daemon)
        card, took_s = crash_to_card(daemon, client)
        assert took_s < MEND_WITHIN_S
        assert (card["state"], card["requested_by"]) == ("pending", "hm1nd")
        assert [line["what"] for line in card["effect"]["lines"]] == ["effort"]
        done = client.call("approve", approval=card["id"], digest=card["digest"])
        assert done["state"] == "done", done
        told = daemon.wait_message(client, f"approval_resolved: approval {card['id']}", recipient="hm1nd")
        assert "state: approved" in told["body"]


def test_what_another_agent_asks_hm1nd_for_it_can_have_and_by_itself_it_cannot() -> None:
    with open_mending(*RULES) as daemon:
        client = start(daemon, *PLEAD)
        client.call("send", to="iris", body="try it yourself")
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris" and e["data"]["turn"] >= 2)
        assert client.call("pending")["approvals"] == []
        client.call("send", to="iris", body="ask hm1nd")
        card, _ = requested(daemon, client, "iris")
        assert card["requested_by"] == "hm1nd"


def test_hm1nds_own_changes_pass_the_same_gate_and_it_does_not_end_itself() -> None:
    with open_mending(*RULES) as daemon:
        client = start(daemon)
        before = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        client.call("send", to="hm1nd", body="end yourself")
        client.call("send", to="hm1nd", body="think less yourself")
        card, _ = requested(daemon, client, "hm1nd")
        assert card["state"] == "pending"
        now = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        assert now == before, "nothing is changed before the click"
        done = client.call("approve", approval=card["id"], digest=card["digest"])
        assert done["state"] == "done", done
        now = {agent["name"]: agent["deployed_sha"] for agent in client.call("list")["agents"]}["hm1nd"]
        assert now == card["payload"]["sha"]
        restarts = [event for event in client.stream("events", limit=1000) if event["kind"] == "restart_asked"]
        assert restarts == []
