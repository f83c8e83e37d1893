"""What is done for each message costs the same however many are old: counted in steps of sqlite's own machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hive_core.archive import _NEWEST_OF_AGENT, Archive, Query, _whose
from hive_core.broker import Rests, _Ending, _lease
from hive_core.limits import Limits
from hive_core.post import Letter, post
from hive_core.protocol.words import OPERATOR, AgentName, parse_body
from hive_core.store.door import _wake_recipients
from hive_core.store.writer import Transaction
from tests.hives import Services

IRIS, HM1ND = AgentName("iris"), AgentName("hm1nd")
OLD = 3_000
Work = Callable[[Services, Transaction], Any]


def send(hive: Services, tx: Transaction) -> None:
    post(tx, [Letter(HM1ND, (IRIS,), parse_body("hello"), client_id="k")], Limits())[0].unwrap()


def lease_and_end(hive: Services, tx: Transaction) -> None:
    lease = _lease(tx, IRIS, "f", Limits())
    assert lease is not None
    hive.broker.end_turn(tx, IRIS, lease.turn.id, _Ending("done"))


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
