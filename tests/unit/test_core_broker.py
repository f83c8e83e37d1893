from __future__ import annotations

import contextlib
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.broker import BACKOFF_S, TRIES, WAITING_S, Turn, put_message, settle
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_body
from hive_core.store.bus import mail
from tests.hives import PATIENCE_S, Services, run_in_hive, second_look

IRIS, DAMOCLES, HM1ND, OPERATOR = (AgentName(name) for name in ("iris", "damocles", "hm1nd", "operator"))


async def lease(hive: Services, agent: str = "iris") -> tuple[Turn, dict[str, Any]]:
    with trio.fail_after(PATIENCE_S):
        return await hive.broker.lease(AgentName(agent))


async def let_time_pass(hive: Services) -> None:
    """Every message that rests has rested."""
    await hive.sql("UPDATE deliveries SET available_at_ms = 0")
    recipients = await hive.store.rows("SELECT DISTINCT recipient FROM deliveries")
    hive.store.bus.publish(mail(row[0]) for row in recipients)


async def states(hive: Services, agent: str = "iris") -> dict[int, str]:
    sql = "SELECT message_id, state FROM deliveries WHERE recipient = ? ORDER BY message_id"
    return {row[0]: row[1] for row in await hive.store.rows(sql, (agent,))}


async def attempts(hive: Services, message: int) -> int:
    found: int = await hive.value("SELECT attempts FROM deliveries WHERE message_id = ?", message)
    return found


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
    turn, first = await lease(hive)
    more = await hive.broker.recv(IRIS, 32, 0)
    assert [first["id"], *(message["id"] for message in more["messages"])] == sent
    assert (first["waiting"], more["waiting"]) == (len(sent) - 1, 0)
    assert await hive.broker.ack(IRIS, turn, "done")


async def test_a_message_to_nobody_is_refused_by_name_and_leaves_nothing(hive: Services) -> None:
    with refused("not_found", "cannot send to argus: no agent has that name; `hive list` shows them"):
        await hive.say("hm1nd", "argus", "hello?")
    assert await hive.value("SELECT count(*) FROM messages") == 0
    assert "message_sent" not in await hive.kinds()


async def test_a_message_to_the_operator_waits_in_the_inbox_until_it_is_read(hive: Services) -> None:
    message = await hive.say("iris", "operator", "done")
    assert await hive.broker.unread() == 1
    assert [(m["id"], m["unread"]) for m in await hive.broker.inbox()] == [(message, True)]
    assert await hive.broker.unread() == 0
    assert [(m["id"], m["unread"]) for m in await hive.broker.inbox()] == [(message, False)]


@pytest.mark.parametrize(
    ("sender", "may"), [("hm1nd", True), ("iris", True), ("damocles", False), ("operator", True), ("system", True)]
)
async def test_one_replies_only_to_what_one_sent_or_received(hive: Services, sender: str, may: bool) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    if may:
        reply = await hive.say(sender, "iris", "yes", in_reply_to=message)
        assert (await hive.broker.message(reply) or {})["in_reply_to"] == message
    else:
        with refused("not_found", f"cannot reply to message {message}"):
            await hive.say(sender, "iris", "yes", in_reply_to=message)


async def test_a_reply_to_no_message_is_refused(hive: Services) -> None:
    with refused("not_found", "cannot reply to message 77"):
        await hive.say("iris", "hm1nd", "yes", in_reply_to=77)


async def test_the_same_key_sent_again_is_one_message_and_gets_the_first_answer(hive: Services) -> None:
    first = await hive.say("hm1nd", "iris", "hello", key="k")
    assert await hive.say("hm1nd", "iris", "hello", key="k") == first
    assert await hive.say("damocles", "iris", "hello", key="k") != first  # a key is its sender's own
    assert await hive.say("hm1nd", "iris", "hello") != first
    assert await hive.value("SELECT count(*) FROM messages") == 3


async def test_the_same_key_sent_twice_at_once_is_one_message(hive: Services) -> None:
    answers: list[int] = []

    async def say() -> None:
        answers.append(await hive.say("hm1nd", "iris", "hello", key="k"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(say)
    assert len(set(answers)) == 1
    assert await hive.value("SELECT count(*) FROM messages") == 1


async def test_a_send_that_was_refused_does_not_use_its_key_up(hive: Services) -> None:
    with refused("not_found", "argus"):
        await hive.say("hm1nd", "argus", "hello", key="k")
    await hive.add_agents("argus")
    await hive.say("hm1nd", "argus", "hello", key="k")
    assert await states(hive, "argus") == {1: "queued"}


async def test_a_key_that_was_used_for_another_tool_is_refused(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello", key="k")
    await hive.say("hm1nd", "hm1nd", "hello")
    await lease(hive, "hm1nd")
    with refused("usage", "it was used for a call of send"):
        await hive.broker.recv(HM1ND, 1, 0, key="k")


async def test_old_answers_are_forgotten_and_new_ones_are_kept(hive: Services) -> None:
    first = await hive.say("hm1nd", "iris", "hello", key="old")
    await hive.sql("UPDATE tool_calls SET at_ms = 0")
    second = await hive.say("hm1nd", "iris", "hello", key="new")
    await hive.broker.forget_old_tool_calls()
    assert await hive.say("hm1nd", "iris", "hello", key="new") == second
    assert await hive.say("hm1nd", "iris", "hello", key="old") > first + 1


# -- leases -----------------------------------------------------------------------------------------------------------


async def test_a_lease_waits_and_a_send_wakes_it(hive: Services) -> None:
    leased: list[dict[str, Any]] = []

    async def wait() -> None:
        leased.append((await lease(hive))[1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "damocles", "not for iris")
        assert leased == []
        await hive.say("hm1nd", "iris", "for iris")
    assert [(m["body"], m["sender"], m["attempt"], m["in_reply_to"]) for m in leased] == [
        ("for iris", "hm1nd", 1, None)
    ]


async def test_an_agent_runs_one_turn_at_a_time(hive: Services) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    turn, _ = await lease(hive)
    with refused("conflict", f"turn {turn.id} of iris still runs; ack it first"):
        await lease(hive)
    await hive.broker.ack(IRIS, turn, "done")
    assert (await lease(hive))[1]["body"] == "1"


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


@pytest.mark.parametrize(
    ("outcome", "tried", "expected"),
    [
        ("done", 1, ("acked", 1, 0.0)),
        ("done", TRIES, ("acked", TRIES, 0.0)),
        ("failed", 1, ("queued", 1, BACKOFF_S)),
        ("failed", 2, ("queued", 2, 2 * BACKOFF_S)),
        ("failed", TRIES - 1, ("queued", TRIES - 1, 2 ** (TRIES - 2) * BACKOFF_S)),
        ("failed", TRIES, ("dead", TRIES, 0.0)),
        ("failed", TRIES + 3, ("dead", TRIES + 3, 0.0)),
        ("waiting", 1, ("queued", 0, WAITING_S)),
        ("waiting", TRIES, ("queued", TRIES - 1, WAITING_S)),
        ("lost", 1, ("queued", 1, 0.0)),
        ("lost", 2, ("queued", 2, 4.0)),
        ("lost", 5, ("dead", 5, 0.0)),
    ],
)
def test_what_becomes_of_a_message_follows_from_how_its_turn_ended(
    outcome: str, tried: int, expected: tuple[str, int, float]
) -> None:
    assert settle(outcome, tried) == expected


async def test_done_acks_every_message_of_the_turn_and_keeps_the_session_and_the_usage(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    turn, _ = await lease(hive)
    await hive.broker.recv(IRIS, 1, 0)
    assert await hive.broker.ack(IRIS, turn, "done", usage={"output_tokens": 7}, session="s-1")
    assert await states(hive) == {1: "acked", 2: "acked", 3: "queued"}
    assert (await hive.agents.get("iris")).session == "s-1"
    assert (await hive.turns.recent("iris"))[0]["usage"] == {"output_tokens": 7}
    assert (await hive.kinds())[-1] == "turn_ended"


async def test_an_ack_without_a_session_keeps_the_one_before(hive: Services) -> None:
    for session in ("s-1", None):
        await hive.say("hm1nd", "iris", "hello")
        turn, _ = await lease(hive)
        await hive.broker.ack(IRIS, turn, "done", session=session)
    assert (await hive.agents.get("iris")).session == "s-1"


async def test_a_failed_turn_puts_its_messages_back_to_rest_longer_each_time(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    rests = []
    for attempt in range(1, TRIES):
        turn, message = await lease(hive)
        assert message["attempt"] == attempt
        await hive.broker.ack(IRIS, turn, "failed", error="it broke")
        sql = "SELECT d.available_at_ms - t.ended_at_ms FROM deliveries d JOIN turns t ON t.id = d.turn_id"
        rests.append(await hive.value(sql))
        await let_time_pass(hive)
    assert rests == [int(BACKOFF_S * 1000 * 2**n) for n in range(TRIES - 1)]


async def test_a_message_that_rests_is_not_handed_out_before_its_time_and_others_are(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "breaks")
    turn, _ = await lease(hive)
    await hive.broker.ack(IRIS, turn, "failed")
    await hive.say("hm1nd", "iris", "works")
    turn, message = await lease(hive)
    assert (message["body"], message["waiting"]) == ("works", 1)
    assert (await hive.broker.recv(IRIS, 32, 0))["messages"] == []
    await let_time_pass(hive)
    assert [m["body"] for m in (await hive.broker.recv(IRIS, 32, 0))["messages"]] == ["breaks"]


async def test_a_lease_wakes_by_itself_when_a_message_has_rested(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn, _ = await lease(hive)
    await hive.broker.ack(IRIS, turn, "failed")
    # Due within the moment; nothing is published.
    await hive.sql("UPDATE deliveries SET available_at_ms = available_at_ms - ?", int(BACKOFF_S * 1000) - 30)
    assert (await lease(hive))[1]["attempt"] == 2


async def test_after_five_failed_tries_a_message_is_dead_and_an_event_tells(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "poison")
    for _ in range(TRIES):
        assert await states(hive) == {message: "queued"}
        turn, _ = await lease(hive)
        await hive.broker.ack(IRIS, turn, "failed", error="it broke")
        await let_time_pass(hive)
    assert await states(hive) == {message: "dead"}
    events = [row["data"] for row in await hive.store.rows("SELECT data FROM events WHERE kind = 'message_dead'")]
    assert len(events) == 1
    assert "it broke" in events[0]
    await hive.say("hm1nd", "iris", "next")
    assert (await lease(hive))[1]["body"] == "next"


async def test_a_turn_that_had_to_wait_costs_no_try(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    for _ in range(TRIES + 2):
        turn, leased = await lease(hive)
        assert leased["attempt"] == 1
        await hive.broker.ack(IRIS, turn, "waiting", error="no login")
        assert await attempts(hive, message) == 0
        await let_time_pass(hive)


async def test_an_unknown_outcome_is_refused_and_the_turn_goes_on(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn, _ = await lease(hive)
    for outcome in ("lost", "running", "", "DONE"):
        with refused("usage", "done, failed, waiting"):
            await hive.broker.ack(IRIS, turn, outcome)
    assert await hive.broker.ack(IRIS, turn, "done")


async def test_an_ack_that_comes_late_or_from_another_changes_nothing(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    old, _ = await lease(hive)
    other, _ = await lease(hive, "damocles")
    await hive.broker.close_lost_turns(IRIS, None)
    turn, _ = await lease(hive)
    before = await hive.kinds()
    assert not await hive.broker.ack(IRIS, old, "done", session="stolen")
    assert not await hive.broker.ack(IRIS, Turn(turn.id, old.fence), "done", session="stolen")
    assert not await hive.broker.ack(IRIS, Turn(old.id, turn.fence), "done", session="stolen")
    assert not await hive.broker.ack(IRIS, other, "done", session="stolen")
    assert not await hive.broker.ack(IRIS, Turn(99, turn.fence), "failed")
    assert await hive.kinds() == before
    assert await states(hive) == {1: "leased"}
    assert (await hive.agents.get("iris")).session is None
    assert await hive.broker.ack(IRIS, turn, "done")
    assert not await hive.broker.ack(IRIS, turn, "done")


async def test_a_hello_closes_the_turn_it_does_not_know_and_its_messages_go_back(hive: Services) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    turn, _ = await lease(hive)
    assert await hive.broker.close_lost_turns(IRIS, None) == [turn.id]
    assert await states(hive) == {message: "queued"}
    assert (await lease(hive))[1]["attempt"] == 2


async def test_a_hello_with_the_turn_that_runs_keeps_it(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    turn, _ = await lease(hive)
    other, _ = await lease(hive, "damocles")
    assert await hive.broker.close_lost_turns(IRIS, turn) == []
    assert await hive.broker.close_lost_turns(IRIS, Turn(turn.id, "forged")) == [turn.id]
    assert not await hive.broker.ack(IRIS, turn, "done")
    assert await hive.broker.ack(DAMOCLES, other, "done")


# -- recv -------------------------------------------------------------------------------------------------------------


async def test_mail_is_received_in_a_turn_alone(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    with refused("refused", "no turn runs"):
        await hive.broker.recv(IRIS, 32, 0)
    assert await states(hive) == {1: "queued"}


async def test_what_was_received_belongs_to_the_turn_and_goes_back_with_it(hive: Services) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    turn, _ = await lease(hive)
    got = await hive.broker.recv(IRIS, 1, 0)
    assert [(m["body"], m["attempt"]) for m in got["messages"]] == [("1", 1)]
    assert got["waiting"] == 1
    await hive.broker.ack(IRIS, turn, "failed")
    assert await states(hive) == {1: "queued", 2: "queued", 3: "queued"}
    assert [await attempts(hive, n) for n in (1, 2, 3)] == [1, 1, 0]


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
    assert await states(hive) == {1: "leased", 2: "leased", 3: "queued"}
    assert [m["body"] for m in (await hive.broker.recv(IRIS, 1, 0, key="k2"))["messages"]] == ["2"]


async def test_a_recv_that_waits_ends_with_its_turn_and_takes_nothing_from_the_next(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "first")
    turn, _ = await lease(hive)
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
        def next_turn(tx: Any) -> None:
            from hive_core.broker import _lease_first, end_turn

            end_turn(tx, "iris", turn.id, "done", None, None)
            put_message(tx, HM1ND, IRIS, parse_body("second"))
            put_message(tx, HM1ND, IRIS, parse_body("third"))
            assert isinstance(_lease_first(tx, "iris"), tuple)

        await hive.store.write(next_turn)
    assert told == ["refused"]
    assert await states(hive) == {1: "acked", 2: "leased", 3: "queued"}


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_messages_are_shown_newest_last_and_for_one_agent_those_to_and_from_it(hive: Services) -> None:
    ids = [
        await hive.say("hm1nd", "iris", "a"),
        await hive.say("iris", "damocles", "b"),
        await hive.say("hm1nd", "damocles", "c"),
    ]
    assert [m["id"] for m in await hive.broker.messages()] == ids
    assert [m["id"] for m in await hive.broker.messages("iris")] == ids[:2]
    assert [m["id"] for m in await hive.broker.messages(limit=1)] == ids[2:]
    assert [m["id"] for m in await hive.broker.messages(before=ids[1])] == ids[:1]


@pytest.mark.parametrize("number", [2, 10**6, 2**62, 2**63 - 1])
async def test_a_message_that_is_not_there_is_none(hive: Services, number: int) -> None:
    await hive.say("hm1nd", "iris", "a")
    assert await hive.broker.message(number) is None
    assert (await hive.broker.message(1) or {})["body"] == "a"


# -- all of it against a model ----------------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(["iris", "damocles"])),
    st.tuples(st.just("lease"), st.sampled_from(["iris", "damocles"])),
    st.tuples(st.just("recv"), st.sampled_from(["iris", "damocles"])),
    st.tuples(st.sampled_from(["done", "failed", "waiting", "lost"]), st.sampled_from(["iris", "damocles"])),
    st.tuples(st.just("time"), st.just("")),
)


class Model:
    """One agent's queue in plain words: message → [state, tries, rests]."""

    def __init__(self) -> None:
        self.boxes: dict[str, dict[int, list[Any]]] = {"iris": {}, "damocles": {}}
        self.turns: dict[str, Turn | None] = {"iris": None, "damocles": None}

    def due(self, agent: str) -> list[int]:
        return [n for n, (state, _, rests) in self.boxes[agent].items() if state == "queued" and not rests]

    def take(self, agent: str, numbers: list[int]) -> None:
        for number in numbers:
            entry = self.boxes[agent][number]
            entry[0], entry[1] = "leased", entry[1] + 1

    def end(self, agent: str, how: str) -> None:
        for entry in self.boxes[agent].values():
            if entry[0] == "leased":
                state, entry[1], rest_s = settle(how, entry[1])
                entry[0], entry[2] = state, rest_s > 0
        self.turns[agent] = None


@settings(deadline=None, max_examples=25)
@given(st.lists(ACTIONS, max_size=40))
def test_the_broker_does_what_a_plain_model_does(actions: list[tuple[str, str]]) -> None:
    async def check(hive: Services) -> None:
        model = Model()
        for action, agent in actions:
            await step(hive, model, action, agent)
            for name, box in model.boxes.items():
                sql = "SELECT message_id, state, attempts FROM deliveries WHERE recipient = ? ORDER BY 1"
                rows = [tuple(row) for row in await hive.store.rows(sql, (name,))]
                assert rows == [(number, state, tries) for number, (state, tries, _) in box.items()]

    async def step(hive: Services, model: Model, action: str, agent: str) -> None:
        turn = model.turns.get(agent)
        if action == "send":
            model.boxes[agent][await hive.say("hm1nd", agent, "body")] = ["queued", 0, False]
        elif action == "time":
            await let_time_pass(hive)
            for box in model.boxes.values():
                for entry in box.values():
                    entry[2] = False
        elif action == "lease" and turn is None and model.due(agent):
            model.turns[agent], message = await lease(hive, agent)
            assert message["id"] == model.due(agent)[0]
            model.take(agent, [message["id"]])
        elif action == "recv" and turn is not None:
            got = await hive.broker.recv(AgentName(agent), 2, 0)
            assert [m["id"] for m in got["messages"]] == model.due(agent)[:2]
            model.take(agent, model.due(agent)[:2])
        elif action == "lost":
            assert await hive.broker.close_lost_turns(AgentName(agent), None) == ([turn.id] if turn else [])
            model.end(agent, "lost")
        elif action in ("done", "failed", "waiting") and turn is not None:
            assert await hive.broker.ack(AgentName(agent), turn, action)
            model.end(agent, action)

    run_in_hive(check, "hm1nd", "iris", "damocles")
