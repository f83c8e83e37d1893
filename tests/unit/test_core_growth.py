"""What is done for each message costs the same however many are old: counted in steps of sqlite's own machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from trio_asyncio import aio_as_trio

from hive_core.limits import Limits
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.services.archive import _NEWEST_OF_AGENT, Archive, Query, _whose
from hive_core.services.leases import begin_turn
from hive_core.services.post import Letter, forget_depth, post
from hive_core.services.question_words import Ask
from hive_core.services.rests import Rests
from hive_core.services.retention import Retention
from hive_core.services.turn_ends import TurnEnd
from hive_core.store.door import READERS, _wake_recipients
from hive_core.store.writer import Transaction
from tests.hives import Services

IRIS, HM1ND, DAMOCLES = AgentName("iris"), AgentName("hm1nd"), AgentName("damocles")
OLD = 3_000
Work = Callable[[Services, Transaction], Any]


def send(hive: Services, tx: Transaction) -> None:
    post(tx, [Letter(HM1ND, (IRIS,), parse_body("hello"), client_id="k")], Limits())[0].unwrap()


def lease_and_end(hive: Services, tx: Transaction) -> None:
    lease = begin_turn(tx, IRIS, "f", Limits())
    assert lease is not None
    hive.broker.end_turn(tx, IRIS, lease.turn.id, TurnEnd("done"))


def look_again(hive: Services, tx: Transaction) -> None:
    _wake_recipients(tx)


def rests(hive: Services, tx: Transaction) -> None:
    Rests().fire(tx)
    Rests().next_after(tx)


async def steps(hive: Services, work: Work) -> int:
    """How many steps of sqlite's machine it takes."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    def measure(tx: Transaction) -> None:
        connection = tx.execute.__self__  # type: ignore[attr-defined]
        connection.set_progress_handler(count, 1)
        try:
            work(hive, tx)
        finally:
            connection.set_progress_handler(None, 1)

    await hive.store.write(measure)
    return counted


async def add_old(hive: Services) -> None:
    """Acked messages of hm1nd to iris of long ago, and mail that the operator has not read."""

    def write(tx: Transaction) -> None:
        for _ in range(OLD):
            send_old(tx, IRIS)
            send_old(tx, OPERATOR)
        tx.execute("UPDATE deliveries SET state = 'acked' WHERE recipient = 'iris'")
        tx.execute("UPDATE deliveries SET sent_at_ms = 1")

    def send_old(tx: Transaction, to: AgentName) -> None:
        post(
            tx, [Letter(OPERATOR if to == IRIS else HM1ND, (to,), parse_body("old"))], Limits(pair_rate_per_hour=10**6)
        )

    await hive.store.write(write)


def newest_of_damocles(hive: Services, tx: Transaction) -> None:
    given = {"agent": "damocles", "whose": _whose("damocles"), "before": 2**62, "limit": 50}
    assert len(tx.execute(_NEWEST_OF_AGENT, given).fetchall()) == 1


@pytest.mark.parametrize("work", [send, lease_and_end, look_again, rests])
async def test_it_costs_the_same_with_many_old_messages(hive: Services, work: Work) -> None:
    if work is lease_and_end:
        await hive.say("hm1nd", "iris", "due")
    few = await steps(hive, work)
    if work is send:
        await hive.sql("UPDATE messages SET client_id = NULL")
    await add_old(hive)
    if work is lease_and_end:
        await hive.say("hm1nd", "iris", "due")
    assert await steps(hive, work) < 3 * few + 200


async def test_the_list_of_an_agent_that_is_silent_costs_the_same_with_many_messages_of_others(hive: Services) -> None:
    archive = Archive(hive.store, Limits(), hive.state_dir / "bodies")
    await hive.say("damocles", "iris", "once")
    few = await steps(hive, newest_of_damocles)
    await add_old(hive)
    while "unindexed" in await archive.search(Query("old")):
        pass
    assert await steps(hive, newest_of_damocles) < 3 * few + 200


async def read_steps(hive: Services, read: Callable[[], Awaitable[Any]]) -> int:
    """How many steps of sqlite's machine a reader takes."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 1
        return 0

    async def watch(handler: Callable[[], int] | None) -> None:
        readers = [await hive.store._free_receive.receive() for _ in range(READERS)]
        for reader in readers:
            await aio_as_trio(reader.set_progress_handler)(handler, 1)  # type: ignore[arg-type]
            hive.store._free_send.send_nowait(reader)

    await watch(count)
    await read()
    await watch(None)
    return counted


async def add_settled_questions(hive: Services) -> None:
    """Questions of iris to everybody, answered long ago, as are the messages that put and answered them."""

    def write(tx: Transaction) -> None:
        free = Limits(pair_rate_per_hour=10**6, inbox_depth=10**6)
        for number in range(OLD):
            to = (HM1ND, DAMOCLES, OPERATOR)[number % 3]
            put, answered = (
                post(tx, [Letter(sender, (recipient,), parse_body("old"))], free)[0].unwrap()["message"]
                for sender, recipient in ((IRIS, to), (to, IRIS))
            )
            row = (IRIS, to, "old?", "[]", 0, 1, put, "answered", 1, 2, 3, "[]", "yes", answered)
            tx.insert("questions", _ANSWERED, [row])
        tx.execute("UPDATE deliveries SET state = 'acked', settled_at_ms = 1 WHERE state = 'queued'")

    await hive.store.write(write)
    await hive.store.write(lambda tx: [forget_depth(tx, name) for name in (IRIS, HM1ND, DAMOCLES)])


# fmt: off
_ANSWERED = ("asker", "answerer", "text", "options", "multi", "free_text", "message_id", "state", "asked_at_ms",
             "expires_at_ms", "settled_at_ms", "choices", "answer", "answer_id")
# fmt: on


async def test_what_is_asked_of_open_questions_costs_the_same_with_many_settled_ones(hive: Services) -> None:
    questions = hive.questions

    async def lists() -> None:
        for who in (OPERATOR, IRIS, DAMOCLES):
            await hive.loose_ends.of(who)
            await questions.held_from(who)
        question = await questions.put_with(1)
        assert question is not None
        assert await questions.reaches(question)

    def clock(hive: Services, tx: Transaction) -> None:
        questions.fire(tx)
        questions.next_after(tx)

    for asker, to in ((IRIS, OPERATOR), (IRIS, DAMOCLES), (DAMOCLES, OPERATOR)):
        await questions.ask(asker, Ask(to, "open?"))
    few, few_of_clock = await read_steps(hive, lists), await steps(hive, clock)
    await add_settled_questions(hive)
    assert await read_steps(hive, lists) < 2 * few
    assert await steps(hive, clock) < 2 * few_of_clock + 50


async def test_forgetting_looks_at_each_message_of_a_question_once(hive: Services) -> None:
    await add_settled_questions(hive)
    archive = Archive(hive.store, Limits(), hive.state_dir / "bodies")
    retention = Retention(hive.store, Limits(kept_s=1.0), archive.index)
    while "unindexed" in await archive.search(Query("old")):
        pass
    hive.clock.ahead_s = 60
    assert await read_steps(hive, retention.forget_old) < 100 * 2 * OLD
    assert await hive.value("SELECT count(*) FROM messages") == 2 * OLD


async def test_the_next_messages_to_index_are_found_as_fast_with_many_that_are_indexed(hive: Services) -> None:
    archive = Archive(hive.store, Limits(), hive.state_dir / "bodies")
    await hive.say("damocles", "iris", "new")
    few = await read_steps(hive, archive.index._index_some)
    await add_old(hive)
    while "unindexed" in await archive.search(Query("old")):
        pass
    await hive.say("damocles", "iris", "new")
    assert await read_steps(hive, archive.index._index_some) < 2 * few
