from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hive_core.limits import Limits
from hive_core.protocol.call_key import CallKey
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_body
from hive_core.services.broker import Acked, Broker
from hive_core.services.leases import Lease, Turn, begin_turn
from hive_core.services.post import put_message
from hive_core.services.rests import REST_MOST_S, Rests, settle
from hive_core.services.tool_calls import forget_old_tool_calls
from hive_core.services.withdrawal import withdraw
from hive_core.store.writer import Transaction
from tests.hives import PATIENCE_S, Services, held_writer, open_services, second_look

IRIS, DAMOCLES, HM1ND, OPERATOR = (AgentName(name) for name in ("iris", "damocles", "hm1nd", "operator"))
LIMITS = Limits()


async def lease(hive: Services, agent: str = "iris", fence: str | None = None) -> Lease:
    with trio.fail_after(PATIENCE_S):
        return await hive.broker.lease(AgentName(agent), fence)


async def fail_until_dead(hive: Services, agent: str = "iris", error: str | None = "it broke") -> None:
    """Let every try of the first message of an agent fail."""
    for _ in range(hive.broker.limits.tries):
        begun = await lease(hive, agent)
        await hive.broker.ack(AgentName(agent), begun.turn, "failed", error=error)
        await hive.let_time_pass()


async def counts(hive: Services, message: int) -> tuple[int, int]:
    """How often a message was handed to a turn, and how many of those failed by their own doing."""
    (row,) = await hive.store.rows("SELECT attempts, failures FROM deliveries WHERE message_id = ?", (message,))
    return row[0], row[1]


@contextlib.contextmanager
def refused(code: str, words: str) -> Any:
    with pytest.raises(Refusal, match=words) as caught:
        yield
    assert caught.value.code == code


# -- sending ----------------------------------------------------------------------------------------------------------


async def test_when_send_has_answered_the_message_its_delivery_and_its_event_are_on_disk(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    with second_look(hive.state_dir / "hive.sqlite") as disk:
        assert disk.execute("SELECT sender, body FROM messages WHERE id = ?", (message,)).fetchone() == (
            "hm1nd",
            "hello",
        )
        assert disk.execute("SELECT recipient, state FROM deliveries").fetchall() == [("iris", "queued")]
        assert disk.execute("SELECT actor, agent FROM events WHERE kind = 'message_sent'").fetchone() == (
            "hm1nd",
            "iris",
        )


async def test_messages_of_one_sender_come_in_the_order_they_were_sent(hive: Services) -> None:
    sent = [await hive.say(sender, "iris", f"{n}") for n in range(4) for sender in ("hm1nd", "operator")]
    first = await lease(hive)
    more = await hive.broker.recv(IRIS, 32, 0)
    assert [first.message["id"], *(message["id"] for message in more["messages"])] == sent
    assert (first.waiting, more["waiting"]) == (len(sent) - 1, 0)
    assert (await hive.broker.ack(IRIS, first.turn, "done")).counted


async def test_a_message_to_the_operator_waits_in_the_inbox_until_it_is_read(hive: Services) -> None:
    message = await hive.say("iris", "operator", "done")
    assert await hive.broker.messages.unread() == 1
    assert [(m["id"], m["unread"]) for m in await hive.broker.messages.inbox()] == [(message, True)]
    assert await hive.broker.messages.unread() == 0
    assert [(m["id"], m["unread"]) for m in await hive.broker.messages.inbox()] == [(message, False)]


async def test_what_its_sender_took_back_just_before_the_operator_read_it_is_not_shown(hive: Services) -> None:
    kept = await hive.say("iris", "operator", "please look")
    taken_back = await hive.say("iris", "operator", "please pay")
    shown: list[int] = []

    async def read() -> None:
        shown.extend(message["id"] for message in await hive.broker.messages.inbox())

    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        nursery.start_soon(hive.store.write, lambda tx: withdraw(tx, IRIS, [(taken_back, OPERATOR)]))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
    assert shown == [kept]
    assert await hive.states("operator") == {kept: "acked", taken_back: "dropped"}


async def test_the_answers_of_old_tool_calls_are_forgotten_and_new_ones_are_kept(hive: Services) -> None:
    for body in ("begin", "old", "new"):
        await hive.say("hm1nd", "iris", body)
    await lease(hive)
    await hive.broker.recv(IRIS, 1, 0, key="old")
    await hive.sql("UPDATE tool_calls SET at_ms = 0")
    second = await hive.broker.recv(IRIS, 1, 0, key="new")
    await forget_old_tool_calls(hive.store, hive.now_ms())
    assert await hive.broker.recv(IRIS, 1, 0, key="new") == second
    assert (await hive.broker.recv(IRIS, 1, 0, key="old"))["messages"] == []


# -- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_waits_and_a_send_wakes_it(hive: Services) -> None:
    leased: list[dict[str, Any]] = []

    async def wait() -> None:
        leased.append((await lease(hive)).message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "damocles", "not for iris")
        assert leased == []
        await hive.say("hm1nd", "iris", "for iris")
    assert [(m["body"], m["sender"], m["attempt"], m["in_reply_to"]) for m in leased] == [
        ("for iris", "hm1nd", 1, None)
    ]


async def test_the_attempt_and_its_turn_are_on_disk_before_the_message_is_handed_out(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    begun = await lease(hive, fence="f-1")
    with second_look(hive.state_dir / "hive.sqlite") as disk:
        sql = "SELECT state, attempts, turn_id FROM deliveries"
        assert disk.execute(sql).fetchone() == ("leased", 1, begun.turn.id)
        sql = "SELECT agent, fence, state, message_id FROM turns WHERE id = ?"
        assert disk.execute(sql, (begun.turn.id,)).fetchone() == ("iris", "f-1", "running", message)
        assert disk.execute("SELECT turn_id, message_id, attempt FROM leases").fetchall() == [
            (begun.turn.id, message, 1)
        ]


async def test_an_agent_runs_one_turn_at_a_time(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    begun = await lease(hive)
    with refused("conflict", f"turn {begun.turn.id} of iris still runs; ack it first"):
        await lease(hive)
    await hive.broker.ack(IRIS, begun.turn, "done")
    assert (await lease(hive)).message["body"] == "1"


async def test_two_leases_that_wait_at_once_get_one_turn_between_them(hive: Services) -> None:
    outcomes: list[str] = []

    async def wait() -> None:
        try:
            await lease(hive)
            outcomes.append("leased")
        except Refusal as refusal:
            outcomes.append(refusal.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "iris", "hello")
    assert sorted(outcomes) == ["conflict", "leased"]


async def test_a_lease_asked_again_with_its_fence_is_the_same_turn_also_after_a_restart(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    first = await lease(hive, fence="f-1")
    assert first.turn.fence == "f-1"
    assert await lease(hive, fence="f-1") == first
    hive.broker = Broker(hive.store)
    assert await lease(hive, fence="f-1") == first
    with refused("conflict", f"turn {first.turn.id} of iris still runs"):
        await lease(hive, fence="f-2")
    assert await hive.states() == {1: "leased", 2: "queued", 3: "queued"}
    assert await counts(hive, 1) == (1, 0)
    assert (await hive.kinds()).count("turn_started") == 1


async def test_a_lease_asked_again_still_shows_the_first_message_when_recv_took_more(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    first = await lease(hive, fence="f-1")
    await hive.broker.recv(IRIS, 1, 0)
    again = await lease(hive, fence="f-1")
    assert (again.turn, again.message, again.waiting) == (first.turn, first.message, 1)


async def test_a_turn_survives_a_restart_of_the_daemon_and_its_ack_counts(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.add_agents("hm1nd", "iris")
        await hive.say("hm1nd", "iris", "hello")
        begun = await lease(hive, fence="f-1")
    async with open_services(tmp_path) as hive:
        assert await lease(hive, fence="f-1") == begun
        assert (await hive.broker.ack(IRIS, begun.turn, "done")).counted
    async with open_services(tmp_path) as hive:
        assert await hive.states() == {1: "acked"}
        assert await hive.broker.ack(IRIS, begun.turn, "done") == Acked(True)


async def test_a_message_that_came_before_the_clock_was_set_back_is_handed_out_at_once(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    hive.clock.ahead_s = -60.0
    assert (await lease(hive)).message["id"] == message
    await hive.broker.close_lost_turns(IRIS)  # which costs no rest
    hive.clock.ahead_s = -120.0
    assert (await lease(hive)).message["id"] == message


# -- ends of turns ----------------------------------------------------------------------------------------------------

REST, AWAY = LIMITS.backoff_s, LIMITS.provider_rest_s


@pytest.mark.parametrize(
    ("outcome", "failures", "expected"),
    [
        ("done", 0, ("acked", 0, 0.0)),
        ("done", 4, ("acked", 4, 0.0)),
        ("cancelled", 0, ("acked", 0, 0.0)),
        ("cancelled", 4, ("acked", 4, 0.0)),
        ("failed", 0, ("queued", 1, REST)),
        ("failed", 1, ("queued", 2, 2 * REST)),
        ("failed", 3, ("queued", 4, 8 * REST)),
        ("failed", 4, ("dead", 5, 0.0)),
        ("failed", 7, ("dead", 8, 0.0)),
        ("waiting", 0, ("queued", 0, AWAY)),
        ("waiting", 4, ("queued", 4, AWAY)),
        ("failed", 20, ("dead", 21, 0.0)),
        ("lost", 0, ("queued", 1, 0.0)),
        ("lost", 1, ("queued", 2, 2 * REST)),
        ("lost", 4, ("dead", 5, 0.0)),
    ],
)
def test_what_becomes_of_a_message_follows_from_how_its_turn_ended(
    outcome: str, failures: int, expected: tuple[str, int, float]
) -> None:
    assert settle(outcome, failures, LIMITS, 0.5) == expected


@pytest.mark.parametrize("failures", [20, 100, 10**6])
def test_a_rest_does_not_grow_for_ever(failures: int) -> None:
    assert settle("failed", failures, Limits(tries=2**31 - 1), 0.5).rest_s == REST_MOST_S
    longer_s = 2 * REST_MOST_S
    assert settle("failed", failures, Limits(tries=2**31 - 1, backoff_s=longer_s), 0.5).rest_s == longer_s


@given(
    outcome=st.sampled_from(["failed", "waiting", "lost"]),
    failures=st.integers(0, 30),
    tries=st.integers(1, 31),
    chance=st.floats(0, 1),
)
def test_a_rest_is_spread_by_half_of_itself_and_no_more(outcome: str, failures: int, tries: int, chance: float) -> None:
    limits = Limits(tries=tries)
    state, _, rest_s = settle(outcome, failures, limits, chance)
    middle = settle(outcome, failures, limits, 0.5).rest_s
    assert middle / 2 <= rest_s <= middle * 3 / 2
    assert settle(outcome, failures, limits, 0).rest_s == middle / 2
    assert rest_s == 0 or state == "queued"


async def test_done_acks_every_message_of_the_turn_and_keeps_the_session_and_the_usage(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    begun = await lease(hive)
    await hive.broker.recv(IRIS, 1, 0)
    await hive.broker.ack(IRIS, begun.turn, "done", usage={"output_tokens": 7}, session="s-1")
    assert await hive.states() == {1: "acked", 2: "acked", 3: "queued"}
    assert (await hive.agents.get("iris")).session == "s-1"
    assert (await hive.turns.recent("iris"))[0]["usage"] == {"output_tokens": 7}
    assert (await hive.kinds())[-1] == "turn_ended"


async def test_an_ack_without_a_session_keeps_the_one_before(hive: Services) -> None:
    for session in ("s-1", None):
        await hive.say("hm1nd", "iris", "hello")
        await hive.broker.ack(IRIS, (await lease(hive)).turn, "done", session=session)
    assert (await hive.agents.get("iris")).session == "s-1"


async def test_a_failed_turn_puts_its_messages_back_to_rest_longer_each_time(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    for attempt in range(1, LIMITS.tries):
        begun = await lease(hive)
        assert begun.message["attempt"] == attempt
        await hive.broker.ack(IRIS, begun.turn, "failed", error="it broke")
        sql = "SELECT d.available_at_ms - t.ended_at_ms FROM deliveries d JOIN turns t ON t.id = d.turn_id"
        middle_ms = LIMITS.backoff_s * 1000 * 2 ** (attempt - 1)
        assert middle_ms / 2 <= await hive.value(sql) <= middle_ms * 3 / 2
        await hive.let_time_pass()


async def test_the_messages_of_one_turn_do_not_all_come_back_at_the_same_instant(hive: Services) -> None:
    for n in range(10):
        await hive.say("hm1nd", "iris", str(n))
    begun = await lease(hive)
    await hive.broker.recv(IRIS, 9, 0)
    await hive.broker.ack(IRIS, begun.turn, "failed")
    assert await hive.value("SELECT count(DISTINCT available_at_ms) FROM deliveries") > 5


async def test_nothing_waits_behind_a_message_that_rests(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "breaks")
    await hive.broker.ack(IRIS, (await lease(hive)).turn, "failed")
    await hive.say("hm1nd", "iris", "works")
    begun = await lease(hive)
    assert (begun.message["body"], begun.waiting) == ("works", 1)
    assert (await hive.broker.recv(IRIS, 32, 0))["messages"] == []
    await hive.let_time_pass()
    again = (await hive.broker.recv(IRIS, 32, 0))["messages"]
    assert [(m["body"], m["attempt"]) for m in again] == [("breaks", 2)]


async def test_after_five_failed_tries_a_message_is_dead_and_an_event_tells(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "poison")
    await fail_until_dead(hive)
    assert await hive.states() == {message: "dead"}
    sql = "SELECT data, message_id FROM events WHERE kind = 'message_dead'"
    assert [tuple(row) for row in await hive.store.rows(sql)] == [('{"message":1,"attempts":5,"turn":5}', message)]
    ((dead),) = await hive.broker.messages.aside("dead")
    assert (dead["id"], dead["recipient"], dead["failures"], dead["note"]) == (message, "iris", 5, "it broke")
    assert dead["settled_at_ms"] is not None
    await hive.say("hm1nd", "iris", "next")
    assert (await lease(hive)).message["body"] == "next"


async def test_tries_is_a_setting(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(tries=1)) as hive:
        await hive.add_agents("hm1nd", "iris")
        message = await hive.say("hm1nd", "iris", "poison")
        await hive.broker.ack(IRIS, (await lease(hive)).turn, "failed")
        assert await hive.states() == {message: "dead"}


async def test_a_turn_that_had_to_wait_costs_no_try_and_yet_its_message_says_that_it_comes_again(
    hive: Services,
) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    for attempt in range(1, LIMITS.tries + 3):
        begun = await lease(hive)
        assert begun.message["attempt"] == attempt
        await hive.broker.ack(IRIS, begun.turn, "waiting", error="no login")
        assert await counts(hive, message) == (attempt, 0)
        sql = "SELECT d.available_at_ms - t.ended_at_ms FROM deliveries d JOIN turns t ON t.id = d.turn_id"
        assert AWAY * 500 <= await hive.value(sql) <= AWAY * 1500
        await hive.let_time_pass()
    assert await hive.states() == {message: "queued"}


async def begins(hive: Services, agent: AgentName = IRIS) -> int | None:
    """The message that a turn of the agent begins with now; None when none does."""
    begun = await hive.store.write(lambda tx: begin_turn(tx, agent, "f-now", Limits()))
    return begun.message["id"] if begun else None


async def wait_turn(hive: Services, next_fence: str | None = None) -> Acked:
    """A turn of iris that could not run."""
    return await hive.broker.ack(IRIS, (await lease(hive)).turn, "waiting", "no login", next_fence=next_fence)


async def test_after_a_turn_that_had_to_wait_its_agent_rests_whatever_else_waits_for_it(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    await hive.say("hm1nd", "damocles", "hello")
    assert await wait_turn(hive, "f-2") == Acked(True)
    await hive.say("hm1nd", "iris", "another")
    assert await begins(hive) is None
    assert await begins(hive, DAMOCLES) == 4
    rest_ms = await hive.value("SELECT rests_until_ms - ended_at_ms FROM agents JOIN turns ON agent = name")
    assert AWAY * 500 <= rest_ms <= AWAY * 1500
    assert (await hive.agents.get("iris")).rests_until_ms is not None
    hive.clock.ahead_s += AWAY / 2 - 1
    assert await begins(hive) is None
    hive.clock.ahead_s += AWAY + 1
    assert await begins(hive) is not None


@pytest.mark.parametrize("outcome", ["done", "failed"])
async def test_an_agent_whose_turn_could_run_rests_no_more(hive: Services, outcome: str) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    await wait_turn(hive)
    await hive.let_time_pass()
    acked = await hive.broker.ack(IRIS, (await lease(hive)).turn, outcome, next_fence="f-3")
    assert acked.lease is not None
    assert (await hive.agents.get("iris")).rests_until_ms is None


async def test_an_agent_that_is_started_or_resumed_rests_no_more(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    await wait_turn(hive)
    await hive.agents.want(IRIS, "paused", "operator")
    await hive.agents.want(IRIS, "up", "operator")
    assert await begins(hive) == 2


async def test_an_agent_that_was_ended_on_purpose_needs_no_rest(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    await lease(hive)
    await hive.store.write(lambda tx: hive.broker.put_back(tx, IRIS))
    assert await begins(hive) == 1


async def test_an_agent_that_rested_before_the_clock_was_set_back_takes_a_turn_at_once(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    await wait_turn(hive)
    hive.clock.ahead_s -= 24 * 3600
    assert await begins(hive) is not None


async def test_a_message_whose_turns_always_have_to_wait_keeps_no_other_back(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    had = []
    for _ in range(3):
        begun = await lease(hive)
        had.append(begun.message["id"])
        await hive.broker.ack(IRIS, begun.turn, "waiting")
        await hive.let_time_pass()
    assert had == [1, 2, 3]


async def test_recv_in_a_turn_that_runs_asks_for_no_rest(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    await lease(hive)
    await hive.sql("UPDATE agents SET rests_until_ms = ?", int(hive.clock() * 1000) + 60_000)
    assert [message["id"] for message in (await hive.broker.recv(IRIS, 32, 0))["messages"]] == [2]


async def test_an_unknown_outcome_is_refused_and_the_turn_goes_on(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    begun = await lease(hive)
    for outcome in ("lost", "running", "", "DONE"):
        with refused("usage", "cancelled, done, failed, waiting"):
            await hive.broker.ack(IRIS, begun.turn, outcome)
    assert (await hive.broker.ack(IRIS, begun.turn, "done")).counted


async def test_an_ack_that_comes_late_or_from_another_changes_nothing_and_says_so(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    old = (await lease(hive)).turn
    other = (await lease(hive, "damocles")).turn
    await hive.broker.close_lost_turns(IRIS)
    turn = (await lease(hive)).turn
    before = await hive.kinds()
    late = [
        (old, "done"),
        (Turn(turn.id, old.fence), "done"),
        (Turn(old.id, turn.fence), "done"),
        (other, "done"),
        (Turn(99, turn.fence), "failed"),
        (old, "cancelled"),
    ]
    for stale, outcome in late:
        acked = await hive.broker.ack(IRIS, stale, outcome, session="stolen", next_fence="f-9")
        assert acked == Acked(False)
    assert await hive.kinds() == before
    assert await hive.states() == {1: "leased"}
    assert (await hive.agents.get("iris")).session is None
    assert (await hive.broker.ack(IRIS, turn, "done")).counted


async def test_the_same_ack_again_gets_the_same_answer_also_after_a_restart(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    first = await hive.broker.ack(IRIS, turn, "failed", error="it broke", session="s-1")
    await hive.sql("UPDATE agents SET session = 's-2'")
    before = await hive.kinds()
    assert await hive.broker.ack(IRIS, turn, "failed", error="it broke", session="s-1") == first == Acked(True)
    hive.broker = Broker(hive.store)
    assert await hive.broker.ack(IRIS, turn, "failed", error="it broke", session="s-1") == first
    # Another word on the same turn is not the same ack.
    assert await hive.broker.ack(IRIS, turn, "done") == Acked(False)
    assert await hive.kinds() == before
    assert (await counts(hive, message), (await hive.agents.get("iris")).session) == ((1, 1), "s-2")


async def test_an_ack_begins_the_next_turn_in_the_same_commit(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    turn = (await lease(hive)).turn
    acked = await hive.broker.ack(IRIS, turn, "done", session="s-1", next_fence="f-2")
    assert acked.lease is not None
    assert (acked.lease.turn.fence, acked.lease.message["body"], acked.lease.session) == ("f-2", "1", "s-1")
    instants = "SELECT (SELECT ended_at_ms FROM turns WHERE id = 1) = (SELECT started_at_ms FROM turns WHERE id = 2)"
    assert await hive.value(instants) == 1
    # The connection broke before the answer: the ack, the lease and a restart all find the turn that began.
    assert await hive.broker.ack(IRIS, turn, "done", session="s-1", next_fence="f-2") == acked
    hive.broker = Broker(hive.store)
    assert await hive.broker.ack(IRIS, turn, "done", session="s-1", next_fence="f-2") == acked
    assert await lease(hive, fence="f-2") == acked.lease
    assert await hive.states() == {1: "acked", 2: "leased"}
    assert await counts(hive, 2) == (1, 0)


async def test_an_ack_begins_no_turn_when_nothing_is_due_or_the_agent_is_paused(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    assert await hive.broker.ack(IRIS, turn, "failed", next_fence="f-2") == Acked(True)
    await hive.let_time_pass()
    await hive.say("hm1nd", "iris", "another")
    turn = (await lease(hive)).turn
    await hive.agents.want(IRIS, "paused", "operator")
    assert await hive.broker.ack(IRIS, turn, "done", next_fence="f-3") == Acked(True)
    assert await hive.value("SELECT count(*) FROM turns WHERE state = 'running'") == 0


async def test_an_old_ack_sent_again_while_another_turn_runs_begins_none(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    turn = (await lease(hive)).turn
    await hive.broker.ack(IRIS, turn, "done")
    await lease(hive, fence="f-other")
    assert await hive.broker.ack(IRIS, turn, "done", next_fence="f-2") == Acked(True)
    assert await hive.states() == {1: "acked", 2: "leased", 3: "queued"}


async def test_an_ack_wakes_no_agent(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    await hive.broker.ack(IRIS, turn, "done")
    assert await hive.states("hm1nd") == await hive.states("operator") == {}


# -- hello ------------------------------------------------------------------------------------------------------------


async def test_a_hello_closes_the_turn_it_does_not_know_and_its_messages_go_back(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    assert await hive.broker.close_lost_turns(IRIS) == (None, [turn.id])
    assert await hive.states() == {message: "queued"}
    assert (await lease(hive)).message["attempt"] == 2


async def test_a_hello_with_the_fence_of_the_turn_that_runs_keeps_it(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    turn, other = (await lease(hive)).turn, (await lease(hive, "damocles")).turn
    assert await hive.broker.close_lost_turns(IRIS, [turn.fence]) == (turn.id, [])
    assert await hive.broker.close_lost_turns(IRIS, ["unknown", turn.fence]) == (turn.id, [])
    assert await hive.broker.close_lost_turns(IRIS, ["forged", other.fence]) == (None, [turn.id])
    assert not (await hive.broker.ack(IRIS, turn, "done")).counted
    assert (await hive.broker.ack(DAMOCLES, other, "done")).counted


async def test_a_hello_of_an_agent_without_a_turn_finds_none(hive: Services) -> None:
    assert await hive.broker.close_lost_turns(IRIS, ["f-1"]) == (None, [])


# -- cancel -----------------------------------------------------------------------------------------------------------


async def test_a_turn_cancelled_by_the_operator_acks_its_messages_as_cancelled(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    begun = await lease(hive)
    await hive.broker.recv(IRIS, 1, 0)
    assert hive.broker.renew(IRIS, begun.turn.id)
    assert await hive.broker.cancel_turn(IRIS, OPERATOR) == begun.turn.id
    assert not hive.broker.renew(IRIS, begun.turn.id)
    assert await hive.states() == {1: "acked", 2: "acked", 3: "queued"}
    notes = await hive.store.rows("SELECT note FROM deliveries WHERE state = 'acked'")
    assert [row[0] for row in notes] == ["cancelled", "cancelled"]
    assert (await hive.turns.recent("iris"))[0]["error"] == "cancelled by operator"
    # What its harness says of the turn counts no more, and the next begins all the same.
    assert await hive.broker.ack(IRIS, begun.turn, "done", session="s-1") == Acked(False)
    assert (await hive.agents.get("iris")).session is None
    assert (await lease(hive)).message["body"] == "2"


async def test_a_turn_that_is_cancelled_in_the_commit_that_began_it_is_over_for_its_harness(hive: Services) -> None:
    """Which of the two is answered first is chance. Told that it runs, the harness would go on for ever."""
    for number in range(20):
        await hive.say("hm1nd", "iris", f"{number}")
        cancelled: list[int] = []

        async def cancel(turns: list[int] = cancelled) -> None:
            turns.append(await hive.broker.cancel_turn(IRIS, OPERATOR))

        async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
            for one in (partial(lease, hive), cancel):
                nursery.start_soon(one)
                await trio.testing.wait_all_tasks_blocked()
        assert not hive.broker.renew(IRIS, cancelled[0])
        assert hive.broker.ledger.running(IRIS) is None


async def test_cancelling_where_no_turn_runs_is_refused(hive: Services) -> None:
    with refused("not_found", "cannot cancel: no turn of iris runs"):
        await hive.broker.cancel_turn(IRIS, OPERATOR)


# -- a silent harness -------------------------------------------------------------------------------------------------

SILENCE_S = 0.2


@asynccontextmanager
async def watched(hive: Services, silence_s: float = SILENCE_S) -> AsyncIterator[Broker]:
    """A broker that takes turns away from harnesses that are silent for so long."""
    broker = hive.broker = Broker(hive.store, Limits(lease_silence_s=silence_s))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(broker.serve_leases)
        yield broker
        nursery.cancel_scope.cancel()


async def speak(broker: Broker, agent: AgentName, turn: Turn) -> None:
    """What a harness does that lives."""
    while True:
        assert broker.renew(agent, turn.id)
        await trio.sleep(SILENCE_S / 20)


async def wait_lost(hive: Services) -> None:
    with trio.fail_after(PATIENCE_S), hive.store.bus.listen("events") as listener:
        while not await hive.value("SELECT count(*) FROM turns WHERE state = 'lost'"):
            await listener.wait()


async def test_a_silent_harness_loses_its_turn_and_one_that_renews_keeps_it(
    hive: Services, caplog: pytest.LogCaptureFixture
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    async with watched(hive) as broker, trio.open_nursery() as nursery:
        alive = (await lease(hive, "damocles")).turn

        nursery.start_soon(speak, broker, DAMOCLES, alive)
        silent = (await lease(hive)).turn
        await wait_lost(hive)
        assert not broker.renew(IRIS, silent.id)
        assert await hive.states() == {1: "queued"}
        assert (await hive.turns.recent("iris"))[0]["error"] == "its harness was silent for 0 s"
        assert await broker.ack(IRIS, silent, "done") == Acked(False)
        nursery.cancel_scope.cancel()
    assert await hive.states("damocles") == {2: "leased"}
    assert f"turn {silent.id} of iris was taken away" in caplog.text


async def test_a_turn_of_the_daemon_before_is_lost_too_when_nobody_comes_for_it(hive: Services) -> None:
    for agent in ("iris", "damocles"):
        await hive.say("hm1nd", agent, "hello")
    silent, alive = (await lease(hive)).turn, (await lease(hive, "damocles", "f-d")).turn
    async with watched(hive) as broker, trio.open_nursery() as nursery:
        assert await broker.close_lost_turns(DAMOCLES, ["f-d"]) == (alive.id, [])
        nursery.start_soon(speak, broker, DAMOCLES, alive)
        await wait_lost(hive)
        nursery.cancel_scope.cancel()
    assert (await hive.turns.recent("iris"))[0]["id"] == silent.id
    assert await hive.states("damocles") == {2: "leased"}


async def test_a_turn_that_was_begun_for_a_harness_that_had_just_left_is_lost_too(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with watched(hive):
        await trio.testing.wait_all_tasks_blocked()
        # As a lease does that is cancelled while its commit is under way: begun, and nobody was told.
        await hive.store.write(lambda tx: begin_turn(tx, IRIS, "f", Limits()))
        await wait_lost(hive)
    assert await hive.states() == {1: "queued"}


async def test_an_agent_cannot_end_the_turn_of_another_nor_make_it_look_silent(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    assert await hive.broker.ack(DAMOCLES, turn, "done") == Acked(False)
    assert await hive.broker.ack(DAMOCLES, Turn(turn.id, "guessed"), "done") == Acked(False)
    assert hive.broker.renew(IRIS, turn.id)


async def test_a_turn_that_was_ended_on_purpose_costs_no_try(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    await hive.store.write(lambda tx: hive.broker.put_back(tx, IRIS))
    assert await hive.value("SELECT state || failures FROM deliveries") == "queued0"
    assert await hive.broker.ack(IRIS, turn, "done") == Acked(False)
    await hive.store.write(lambda tx: hive.broker.put_back(tx, IRIS))  # nothing runs: nothing to do


async def test_an_agent_cannot_renew_the_turn_of_another(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await lease(hive)).turn
    assert not hive.broker.renew(DAMOCLES, turn.id)
    assert hive.broker.renew(IRIS, turn.id)
    await hive.broker.ack(IRIS, turn, "done")
    assert not hive.broker.renew(IRIS, turn.id)
    assert not hive.broker.renew(IRIS, 99)


# -- recv -------------------------------------------------------------------------------------------------------------


async def test_mail_is_received_in_a_turn_alone(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    for wait_s in (0, PATIENCE_S):
        with refused("refused", "no turn runs"):
            await hive.broker.recv(IRIS, 32, wait_s)
    assert await hive.states() == {1: "queued"}


async def test_what_was_received_belongs_to_the_turn_and_goes_back_with_it(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    begun = await lease(hive)
    got = await hive.broker.recv(IRIS, 1, 0)
    assert [(m["body"], m["attempt"]) for m in got["messages"]] == [("1", 1)]
    assert got["waiting"] == 1
    await hive.broker.ack(IRIS, begun.turn, "failed")
    assert await hive.states() == {1: "queued", 2: "queued", 3: "queued"}
    assert [await counts(hive, n) for n in (1, 2, 3)] == [(1, 1), (1, 1), (0, 0)]


async def test_recv_waits_for_the_first_message_and_a_send_wakes_it(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "first")
    await lease(hive)
    got: list[Any] = []

    async def wait() -> None:
        got.append(await hive.broker.recv(IRIS, 32, PATIENCE_S))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "iris", "second")
    assert [m["body"] for m in got[0]["messages"]] == ["second"]


async def test_recv_that_waited_in_vain_comes_back_empty(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "first")
    await lease(hive)
    assert await hive.broker.recv(IRIS, 32, 0.001) == {"messages": [], "waiting": 0}


async def test_the_same_recv_sent_again_gets_the_same_messages(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    await lease(hive)
    first = await hive.broker.recv(IRIS, 1, 0, key="k")
    assert [m["body"] for m in first["messages"]] == ["1"]
    assert await hive.broker.recv(IRIS, 1, 0, key="k") == first
    hive.broker = Broker(hive.store)
    assert await hive.broker.recv(IRIS, 1, PATIENCE_S, key="k") == first
    assert await hive.states() == {1: "leased", 2: "leased", 3: "queued"}
    assert [m["body"] for m in (await hive.broker.recv(IRIS, 1, 0, key="k2"))["messages"]] == ["2"]


async def test_the_key_of_a_recv_holds_in_its_turn_and_another_turn_gets_its_own_mail(hive: Services) -> None:
    for body in ("one", "two"):
        await hive.say("hm1nd", "iris", body)
    first = await lease(hive)
    assert [m["id"] for m in (await hive.broker.recv(IRIS, 5, 0, CallKey("inbox", {"max": 5})))["messages"]] == [2]
    await hive.broker.ack(IRIS, first.turn, "failed", "boom")
    for body in ("three", "four"):
        await hive.say("hm1nd", "iris", body)
    second = await lease(hive)
    assert second.message["id"] == 3
    taken = await hive.broker.recv(IRIS, 9, 0, CallKey("inbox", {"max": 9}))
    assert [(m["id"], m["attempt"]) for m in taken["messages"]] == [(4, 1)]
    assert await hive.broker.recv(IRIS, 9, 0, CallKey("inbox", {"max": 9})) == taken
    await hive.broker.ack(IRIS, second.turn, "done")
    assert await hive.states() == {1: "queued", 2: "queued", 3: "acked", 4: "acked"}


async def test_the_chain_of_a_turn_is_the_longest_of_all_that_it_took(hive: Services) -> None:
    """Not that of what came first: a loop would go on behind a message of the operator's."""
    for body in ("go", "short", "long"):
        await hive.say("operator", "iris", body)
    await hive.sql("UPDATE messages SET hops = 5, chain_id = 7 WHERE body = 'long'")
    turn = (await lease(hive)).turn
    await hive.broker.recv(IRIS, 5, 0)
    sent = await hive.say("iris", "damocles", "on and on")
    assert tuple(await hive.store.row("SELECT hops, chain_id FROM messages WHERE id = ?", (sent,)) or ()) == (6, 7)
    assert await hive.value("SELECT hops FROM turns WHERE id = ?", turn.id) == 5


async def test_a_recv_that_waits_ends_with_its_turn_and_takes_nothing_from_the_next(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "first")
    turn = (await lease(hive)).turn
    told: list[str] = []

    async def wait() -> None:
        try:
            told.append(str(await hive.broker.recv(IRIS, 32, PATIENCE_S)))
        except Refusal as refusal:
            told.append(refusal.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        # All that follows is one commit, so that the recv looks again only when the next turn runs.
        async with held_writer(hive.store, nursery):
            for body in ("second", "third"):
                nursery.start_soon(hive.say, "hm1nd", "iris", body)
                await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(partial(hive.broker.ack, IRIS, turn, "done", next_fence="f-2"))
            await trio.testing.wait_all_tasks_blocked()
    assert told == ["refused"]
    assert await hive.states() == {1: "acked", 2: "leased", 3: "queued"}


async def test_one_recv_brings_no_more_than_a_tools_answer_holds(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "begin")
    for size in (60 * 1024, 60 * 1024, 8 * 1024, 1, 60 * 1024):
        await hive.say("hm1nd", "iris", "x" * size)
    await lease(hive)
    sizes = []
    while messages := (await hive.broker.recv(IRIS, 32, 0))["messages"]:
        sizes.append([len(m["body"]) for m in messages])
    assert sizes == [[60 * 1024, 60 * 1024, 8 * 1024], [1, 60 * 1024]]


# -- aside: held and dead ---------------------------------------------------------------------------------------------


async def test_a_dead_letter_tells_its_sender_in_the_thread(hive: Services) -> None:
    message = await hive.say("damocles", "iris", "poison")
    await fail_until_dead(hive)
    (letter,) = await hive.broker.messages.newest("damocles", before=99, limit=1)
    assert (letter["sender"], letter["recipient"], letter["in_reply_to"]) == ("system", "damocles", message)
    assert letter["body"] == (
        f"message_dead: your message {message} to iris was given up after 5 failed turns\nagent: iris\n"
        'error: "it broke"'
    )
    assert (letter["cause"], letter["state"]) == ("system", "queued")


async def test_a_dead_letter_to_the_operator_is_in_his_inbox(hive: Services) -> None:
    await hive.say("operator", "iris", "poison")
    await fail_until_dead(hive, error=None)
    assert [m["body"] for m in await hive.broker.messages.inbox()] == [
        "message_dead: your message 1 to iris was given up after 5 failed turns\nagent: iris"
    ]


async def test_a_dead_letter_of_the_hive_itself_tells_nobody(hive: Services) -> None:
    await hive.store.write(lambda tx: put_message(tx, AgentName("system"), IRIS, parse_body("approval_resolved")))
    await fail_until_dead(hive)
    assert await hive.states() == {1: "dead"}
    assert await hive.value("SELECT count(*) FROM messages") == 1


async def test_a_dead_message_that_is_requeued_has_all_its_tries_again(hive: Services) -> None:
    message = await hive.say("operator", "iris", "poison")
    await fail_until_dead(hive)
    with hive.store.bus.listen("mail:iris") as listener:
        assert await hive.broker.messages.requeue(message, OPERATOR) == ["iris"]
        with trio.fail_after(PATIENCE_S):
            await listener.wait()
    assert await counts(hive, message) == (5, 0)
    begun = await lease(hive)
    assert (begun.message["id"], begun.message["attempt"]) == (message, 6)
    await hive.broker.ack(IRIS, begun.turn, "failed")
    assert await hive.states() == {message: "queued"}
    sql = "SELECT kind FROM events WHERE message_id = ? ORDER BY seq"
    assert [row[0] for row in await hive.store.rows(sql, (message,))] == ["message_dead", "message_requeued"]


async def test_a_dead_message_that_is_dropped_is_gone_from_view_and_never_comes_again(hive: Services) -> None:
    message = await hive.say("operator", "iris", "poison")
    await fail_until_dead(hive)
    assert await hive.broker.messages.drop(message, OPERATOR) == ["iris"]
    assert await hive.states() == {message: "dropped"}
    assert await hive.broker.messages.aside("dead") == []
    for again in (hive.broker.messages.requeue, hive.broker.messages.drop, hive.broker.messages.release):
        with refused("not_found", f"message {message}"):
            await again(message, OPERATOR)
    await hive.say("hm1nd", "iris", "next")
    assert (await lease(hive)).message["body"] == "next"


@pytest.mark.parametrize("verb", ["requeue", "release", "drop"])
async def test_only_what_is_aside_can_be_moved(hive: Services, verb: str) -> None:
    message = await hive.say("operator", "iris", "fine")
    for number in (message, 77):
        with refused("not_found", f"cannot {verb} message {number}: it is not "):
            await getattr(hive.broker.messages, verb)(number, OPERATOR)
    assert await hive.states() == {message: "queued"}


async def test_of_a_message_to_many_only_the_dead_delivery_is_requeued(hive: Services) -> None:
    message = (await hive.broker.send(OPERATOR, [IRIS, DAMOCLES], parse_body("poison")))["message"]
    await fail_until_dead(hive)
    await hive.broker.ack(DAMOCLES, (await lease(hive, "damocles")).turn, "done")
    assert await hive.broker.messages.requeue(message, OPERATOR) == ["iris"]
    assert (await hive.states(), await hive.states("damocles")) == ({message: "queued"}, {message: "acked"})


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_messages_are_shown_newest_last_and_for_one_agent_those_to_and_from_it(hive: Services) -> None:
    ids = [
        await hive.say("hm1nd", "iris", "a"),
        await hive.say("iris", "damocles", "b"),
        await hive.say("hm1nd", "damocles", "c"),
    ]
    assert [m["id"] for m in await hive.broker.messages.newest()] == ids
    assert [m["id"] for m in await hive.broker.messages.newest("iris")] == ids[:2]
    assert [m["id"] for m in await hive.broker.messages.newest(limit=1)] == ids[2:]
    assert [m["id"] for m in await hive.broker.messages.newest(before=ids[1])] == ids[:1]


@pytest.mark.parametrize("number", [2, 10**6, 2**62, 2**63 - 1])
async def test_a_message_that_is_not_there_is_none(hive: Services, number: int) -> None:
    await hive.say("hm1nd", "iris", "a")
    assert await hive.broker.messages.one(number) is None
    assert (await hive.broker.messages.one(1) or {})["body"] == "a"


# -- who left, and clocks that were set back --------------------------------------------------------------------------


async def test_a_lease_whose_caller_left_before_it_ran_begins_no_turn(hive: Services) -> None:
    await hive.say("operator", "iris", "x")
    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as inner:
                inner.start_soon(hive.broker.lease, IRIS, "f")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
    await hive.store.write(lambda tx: None)
    assert await hive.value("SELECT count(*) FROM turns") == 0


@pytest.mark.parametrize("back_s", [3600.0, 5 * 3600.0])
async def test_a_clock_that_is_set_back_lengthens_no_rest_of_an_agent(hive: Services, back_s: float) -> None:
    await hive.say("operator", "iris", "one")
    lease = await hive.broker.lease(IRIS, "f1")
    await hive.broker.ack(IRIS, lease.turn, "waiting")
    hive.clock.ahead_s -= back_s
    await hive.say("operator", "iris", "two")
    await hive.store.write(Rests().fire)
    assert (await hive.broker.lease(IRIS, "f2")).message["id"] == 2


@pytest.mark.parametrize("how", ["cancelled", "lost"])
async def test_a_turn_that_ends_by_any_way_but_waiting_ends_the_rest_of_its_agent(hive: Services, how: str) -> None:
    await hive.say("operator", "iris", "one")
    lease = await hive.broker.lease(IRIS, "f1")
    await hive.broker.ack(IRIS, lease.turn, "waiting")
    hive.clock.ahead_s += 60
    await hive.broker.lease(IRIS, "f2")
    if how == "cancelled":
        await hive.broker.cancel_turn(IRIS, OPERATOR)
    else:
        await hive.broker.close_lost_turns(IRIS)
    assert await hive.value("SELECT rests_until_ms FROM agents WHERE name = 'iris'") is None


async def test_what_a_recv_has_taken_that_was_cancelled_meanwhile_waits_again(hive: Services) -> None:
    """Its client takes the call back just while the commit with its mail is on its way."""
    await hive.say("operator", "iris", "go")
    lease = await hive.broker.lease(IRIS)
    with trio.CancelScope() as scope:

        def let_go(tx: Transaction) -> bool | None:
            if tx.execute("SELECT 1 FROM messages WHERE body = 'not to be missed'").fetchone() is None:
                return None
            scope.cancel()
            return True

        async def send() -> None:
            async with held_writer(hive.store, nursery):
                nursery.start_soon(hive.say, "damocles", "iris", "not to be missed")
                nursery.start_soon(hive.store.write, lambda tx: tx.wake("z"))
                await trio.testing.wait_all_tasks_blocked()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.store.write_when, "z", let_go)
            nursery.start_soon(send)
            await hive.broker.recv(IRIS, 5, 60)
    assert scope.cancelled_caught
    assert await hive.states() == {1: "leased", 2: "queued"}
    assert (await hive.broker.recv(IRIS, 5, 0))["messages"][0]["attempt"] == 1
    await hive.broker.ack(IRIS, lease.turn, "done")
    assert set((await hive.states()).values()) == {"acked"}


async def test_what_a_cancelled_recv_took_waits_again_when_the_disk_takes_writes_again(
    hive: Services, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hive_core.store.writer.LOCKED_MS", 1)
    monkeypatch.setattr("hive_core.store.door.BUSY_REST_S", 0.0)
    for body in ("go", "not to be missed"):
        await hive.say("operator", "iris", body)
    await hive.broker.lease(IRIS)
    other = sqlite3.connect(hive.state_dir / "hive.sqlite", isolation_level=None)

    def taken_back() -> bool:
        other.execute("BEGIN IMMEDIATE")
        return True

    async def give_way() -> None:
        while not caplog.messages:
            await trio.lowlevel.checkpoint()
        other.execute("ROLLBACK")

    with contextlib.closing(other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_way)
            with refused("refused", "the call was cancelled; its messages wait again"):
                await hive.broker.recv(IRIS, 5, 0, "k", taken_back)
    assert "cannot write now" in caplog.messages[0]
    assert await hive.states() == {1: "leased", 2: "queued"}
