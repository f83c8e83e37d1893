"""A message tells its life: first the words for plain rows, then the rows of real ones."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli import show
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.services.broker import Broker
from hive_core.services.life import life_of, tell_life, tell_sending
from tests.hives import Services, open_services

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")

MESSAGE: dict[str, Any] = {
    "id": 7,
    "sender": "iris",
    "in_reply_to": None,
    "cause": "turn",
    "cause_id": 12,
    "chain_id": 7,
    "hops": 0,
    "sent_at_ms": 1000,
    "turn_message": None,
}
DELIVERY: dict[str, Any] = {
    "recipient": "damocles",
    "state": "queued",
    "held": None,
    "attempts": 0,
    "available_at_ms": 1000,
    "settled_at_ms": None,
    "note": None,
}


def lease(turn: int, attempt: int, at_ms: int, state: str, ended_at_ms: int | None, error: str | None = None) -> Any:
    return {
        "turn_id": turn,
        "attempt": attempt,
        "at_ms": at_ms,
        "agent": "damocles",
        "state": state,
        "ended_at_ms": ended_at_ms,
        "error": error,
    }


def event(kind: str, at_ms: int, data: str = "{}", actor: str = "operator", agent: str = "damocles") -> dict[str, Any]:
    return {"kind": kind, "at_ms": at_ms, "actor": actor, "agent": agent, "data": data}


def told(delivery: dict[str, Any], *rows: dict[str, Any]) -> list[str]:
    leases = [row for row in rows if "turn_id" in row]
    events = [row for row in rows if "kind" in row]
    return [f"{moment.at_ms} {moment.text}" for moment in tell_life(MESSAGE, {**DELIVERY, **delivery}, leases, events)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "sent by iris in turn 12"),
        ({"turn_message": 5}, "sent by iris in turn 12, which message 5 began"),
        ({"cause_id": None}, "sent by iris outside any turn"),
        ({"sender": "operator", "cause": "operator", "cause_id": None}, "sent by operator"),
        ({"sender": "system", "cause": "reminder", "cause_id": 3}, "sent by system, reminder 3"),
        ({"sender": "system", "cause": "schedule", "cause_id": 4}, "sent by system, schedule 4"),
        ({"sender": "system", "cause": "system", "cause_id": None}, "sent by system"),
        ({"in_reply_to": 2}, "sent by iris in turn 12; an answer to message 2"),
        (
            {"hops": 3, "chain_id": 1},
            "sent by iris in turn 12; 3 turns after message 1, with which its chain began",
        ),
        ({"hops": 1, "chain_id": 1}, "sent by iris in turn 12; 1 turn after message 1, with which its chain began"),
    ],
)
def test_who_sent_it_and_why(changes: dict[str, Any], sentence: str) -> None:
    assert tell_sending({**MESSAGE, **changes}).text == sentence


def test_a_message_that_waits_has_said_all() -> None:
    assert told({}) == ["1000 queued for damocles"]


def test_a_good_turn_is_two_lines() -> None:
    assert told({"state": "acked", "settled_at_ms": 3000}, lease(4, 1, 2000, "done", 3000)) == [
        "1000 queued for damocles",
        "2000 leased by turn 4 of damocles",
        "3000 acked: turn 4 ended well",
    ]


def test_a_turn_that_runs_has_no_end_yet() -> None:
    assert told({"state": "leased"}, lease(4, 1, 2000, "running", None))[-1] == "2000 leased by turn 4 of damocles"


def test_each_turn_that_put_it_back_says_why_and_the_last_line_when_it_is_due_again() -> None:
    rows = (
        lease(4, 1, 2000, "failed", 3000, "exit code 1"),
        lease(5, 2, 4000, "lost", 5000, "its harness was silent for 60 s"),
        lease(6, 3, 6000, "waiting", 7000, "rate limit"),
    )
    assert told({"state": "queued", "available_at_ms": 9000}, *rows) == [
        "1000 queued for damocles",
        "2000 leased by turn 4 of damocles",
        "3000 turn 4 failed: exit code 1",
        "4000 leased by turn 5 of damocles, for the 2nd time",
        "5000 turn 5 was lost: its harness was silent for 60 s",
        "6000 leased by turn 6 of damocles, for the 3rd time",
        "7000 turn 6 could not run, which is no try: rate limit",
        "9000 put back; due again",
    ]


def test_a_turn_that_was_cancelled_acked_it() -> None:
    row = lease(4, 1, 2000, "cancelled", 3000, "cancelled by operator")
    assert told({"state": "acked", "settled_at_ms": 3000, "note": "cancelled"}, row)[1:] == [
        "2000 leased by turn 4 of damocles",
        "3000 acked as cancelled: turn 4 was cancelled by operator",
    ]


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ("hops", "held for the operator: too many turns lay between it and what its chain began with (hops)"),
        (
            "rate",
            "held for the operator: its sender had written to damocles too often within an hour (pair_rate_per_hour)",
        ),
    ],
)
def test_what_was_held_says_why_and_who_let_it_go(held: str, why: str) -> None:
    row = lease(4, 1, 2000, "done", 3000)
    delivery = {"held": held, "state": "acked", "settled_at_ms": 3000}
    # The release and the lease that it wakes are of one transaction, so of one instant.
    assert told(delivery, row, event("message_released", 2000)) == [
        f"1000 {why}",
        "2000 released by operator; the chain begins anew with it",
        "2000 leased by turn 4 of damocles",
        "3000 acked: turn 4 ended well",
    ]


@pytest.mark.parametrize(
    ("data", "chain"),
    [
        ({"chain": 3, "hops": 25}, "; its chain, which had begun with message 3, was 25 turns long, and begins anew"),
        ({"chain": 3, "hops": 1}, "; its chain, which had begun with message 3, was 1 turn long, and begins anew"),
        ({"chain": 7, "hops": 0}, ""),  # it had begun its chain itself
        ({}, "; the chain begins anew with it"),  # of a version that did not note it
    ],
)
def test_a_release_tells_the_chain_that_the_message_came_from(data: dict[str, int], chain: str) -> None:
    released = event("message_released", 2000, json.dumps(data))
    assert told({"held": "hops"}, released)[-1] == f"2000 released by operator{chain}"


async def test_a_released_message_tells_its_old_chain(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(hops=1)) as hive:
        await hive.add_agents("iris", "damocles")
        first = await hive.say("operator", "iris", "go")
        for sender, recipient in (("iris", "damocles"), ("damocles", "iris"), ("iris", "damocles")):
            turn = await hive.broker.lease(AgentName(sender))
            held = await hive.say(sender, recipient, "on")
            await hive.broker.ack(AgentName(sender), turn.turn, "done")
            if await hive.value("SELECT state FROM deliveries WHERE message_id = ?", held) == "held":
                break
        await hive.broker.messages.release(held, OPERATOR)
        (delivery,) = (await life_of(hive.store, held))["deliveries"]
    assert [moment["text"] for moment in delivery["life"]] == [
        "held for the operator: too many turns lay between it and what its chain began with (hops)",
        f"released by operator; its chain, which had begun with message {first}, was 2 turns long, and begins anew",
    ]


def test_death_comes_after_the_turn_that_brought_it_and_can_be_undone() -> None:
    rows = (
        lease(4, 1, 2000, "failed", 2000, "no"),
        event("message_dead", 2000, '{"attempts": 1, "turn": 4}', "system"),
        event("message_requeued", 5000),
        lease(5, 2, 5000, "failed", 6000, "no again"),
        event("message_dead", 6000, '{"attempts": 1, "turn": 5}', "system"),
        event("message_dropped", 8000),
    )
    assert told({"state": "dropped", "settled_at_ms": 8000}, *rows)[1:] == [
        "2000 leased by turn 4 of damocles",
        "2000 turn 4 failed: no",
        "2000 dead after 1 failed turn; it waits for `hive requeue` or `hive drop`",
        "5000 put back by operator, with all its tries",
        "5000 leased by turn 5 of damocles, for the 2nd time",
        "6000 turn 5 failed: no again",
        "6000 dead after 1 failed turn; it waits for `hive requeue` or `hive drop`",
        "8000 dropped by operator",
    ]


def test_what_happened_to_others_is_none_of_its_life() -> None:
    others = {**lease(4, 1, 2000, "done", 3000), "agent": "argus"}
    assert told({}, others, event("message_released", 2000, agent="argus")) == ["1000 queued for damocles"]


def test_what_the_operator_read_says_so() -> None:
    read = {"recipient": "operator", "state": "acked", "settled_at_ms": 4000}
    assert told(read) == ["1000 queued for operator", "4000 read by the operator"]


def test_a_message_older_than_the_leases_still_has_an_end() -> None:
    assert told({"state": "dead", "settled_at_ms": 4000, "note": "it crashed"})[-1] == "4000 dead: it crashed"


async def test_a_real_message_tells_of_its_turns_its_death_and_its_second_life(hive: Services) -> None:
    broker = Broker(hive.store, Limits(tries=2, backoff_s=0.001), random.Random(1))
    await broker.send(OPERATOR, (IRIS, DAMOCLES), parse_body("work"))
    for n in range(2):
        taken = await broker.lease(IRIS)
        await broker.ack(IRIS, taken.turn, "failed", f"error {n}")
        await hive.sql("UPDATE deliveries SET available_at_ms = 0 WHERE state = 'queued'")
    await broker.messages.requeue(1, OPERATOR)
    taken = await broker.lease(IRIS)
    await broker.ack(IRIS, taken.turn, "done")
    life = await life_of(hive.store, 1)
    assert life["message"]["sender"] == "operator"
    assert life["sent"]["text"] == "sent by operator"
    damocles, iris = life["deliveries"]
    assert (damocles["recipient"], [one["what"] for one in damocles["life"]]) == ("damocles", ["queued"])
    assert (iris["state"], iris["attempts"]) == ("acked", 3)
    whats = [one["what"] for one in iris["life"]]
    assert whats == ["queued", "leased", "failed", "leased", "failed", "dead", "requeued", "leased", "acked"]
    assert "turn 2 failed: error 1" in show.life(life)


async def test_a_clock_that_was_set_back_turns_no_life_around(hive: Services) -> None:
    broker = Broker(hive.store, Limits(tries=1, pair_rate_per_hour=1))
    for body in ("fills the rate", "again"):
        await broker.send(DAMOCLES, IRIS, parse_body(body))
    await broker.messages.drop(2, OPERATOR)
    await broker.send(DAMOCLES, IRIS, parse_body("once more"))
    hive.clock.ahead_s -= 3600
    await broker.messages.release(3, OPERATOR)
    for outcome in ("failed", "done"):
        taken = await broker.lease(IRIS)
        await broker.recv(IRIS, 5, 0)
        hive.clock.ahead_s -= 3600
        await broker.ack(IRIS, taken.turn, outcome)
        hive.clock.ahead_s -= 3600
        if outcome == "failed":
            await broker.messages.requeue(3, OPERATOR)
            await broker.messages.requeue(1, OPERATOR)
            hive.clock.ahead_s -= 3600
    (delivery,) = (await life_of(hive.store, 3))["deliveries"]
    whats = [one["what"] for one in delivery["life"]]
    assert whats == ["held", "released", "leased", "failed", "dead", "requeued", "leased", "acked"]


async def test_an_answer_tells_the_turn_and_the_message_that_caused_it(hive: Services) -> None:
    await hive.say("operator", "iris", "question")
    taken = await hive.broker.lease(IRIS)
    await hive.say("iris", "damocles", "what do you think?")
    life = await life_of(hive.store, 2)
    assert life["sent"]["text"] == (
        f"sent by iris in turn {taken.turn.id}, which message 1 began; "
        "1 turn after message 1, with which its chain began"
    )
    assert life["sent"]["turn"] == taken.turn.id


async def test_a_released_message_tells_who_released_it(hive: Services) -> None:
    await hive.say("iris", "damocles", "again")
    await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate'")
    await hive.broker.messages.release(1, OPERATOR)
    (delivery,) = (await life_of(hive.store, 1))["deliveries"]
    assert [one["what"] for one in delivery["life"]] == ["held", "released"]


async def test_a_message_that_is_not_there_is_refused_with_the_reason(hive: Services) -> None:
    with pytest.raises(Refusal, match=r"cannot explain message 5: .* kept for a while \(kept_s\)") as caught:
        await life_of(hive.store, 5)
    assert caught.value.code == "not_found"


async def test_what_an_agent_said_stays_text_in_the_terminal(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    taken = await hive.broker.lease(IRIS)
    await hive.broker.ack(IRIS, taken.turn, "failed", "\x1b[2J\nfake line")
    text = show.life(await life_of(hive.store, 1))
    assert "\x1b" not in text
    assert "\nfake line" not in text
