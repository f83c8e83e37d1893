"""The hive's clock: what is due at an instant is done then, once, whatever happens to the wall clock."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from hive_core.limits import Limits
from hive_core.procedures import clock
from hive_core.procedures.clock import Timer, serve_clock
from hive_core.protocol.words import AgentName
from hive_core.services.rests import Rests
from hive_core.store.writer import Transaction
from tests.hives import PATIENCE_S, Services, wait_until

IRIS = AgentName("iris")


class Alarms:
    """Instants, kept in rows, each with what it tells when it is due."""

    topic = "alarms"

    def fire(self, tx: Transaction) -> None:
        sql = "SELECT digest FROM sign_ins WHERE expires_at_ms <= ? ORDER BY expires_at_ms"
        for row in tx.execute(sql, (tx.now_ms,)).fetchall():
            tx.execute("DELETE FROM sign_ins WHERE digest = ?", (row[0],))
            tx.emit(f"rang {row[0]}", "system")

    def next_after(self, tx: Transaction) -> int | None:
        at: int | None = tx.execute(
            "SELECT min(expires_at_ms) FROM sign_ins WHERE expires_at_ms > ?", (tx.now_ms,)
        ).fetchone()[0]
        return at


def alarm(name: str, in_ms: int, wakes: bool = True) -> Callable[[Transaction], None]:
    def write(tx: Transaction) -> None:
        tx.execute("INSERT INTO sign_ins VALUES (?, 0, ?)", (name, tx.now_ms + in_ms))
        if wakes:
            tx.wake(Alarms.topic)

    return write


@asynccontextmanager
async def served(hive: Services, *timers: Timer) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_clock, hive.store, timers)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


async def rung(hive: Services, count: int) -> list[str]:
    """The alarms that rang, once there are so many."""

    async def found() -> list[str] | None:
        names = [kind for kind in await hive.kinds() if kind.startswith("rang")]
        return names if len(names) >= count else None

    names: list[str] = await wait_until(hive.store, found)
    return names


async def test_what_is_due_at_an_instant_is_done_then_in_order_and_once(hive: Services) -> None:
    async with served(hive, Alarms()):
        # At one instant: else "late" may be due before "soon" is set.
        await hive.store.write(lambda tx: [alarm(*one)(tx) for one in (("late", 60), ("soon", 20), ("never", 10**9))])
        assert await rung(hive, 2) == ["rang soon", "rang late"]
    async with served(hive, Alarms()):
        await hive.store.write(alarm("now", 0))
        assert await rung(hive, 3) == ["rang soon", "rang late", "rang now"]


async def test_what_was_due_while_nobody_served_is_done_at_the_start(hive: Services) -> None:
    await hive.store.write(alarm("missed", 1000))
    hive.clock.ahead_s += 3600
    async with served(hive, Alarms()):
        assert await rung(hive, 1) == ["rang missed"]


async def test_a_wall_clock_that_was_set_is_seen_before_long(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "LOOK_AGAIN_S", 0.01)
    async with served(hive, Alarms()):
        await hive.store.write(alarm("in an hour", 3600_000))
        for _ in range(2):  # until the clock has seen it and sleeps
            await trio.testing.wait_all_tasks_blocked()
            await hive.store.write(lambda tx: None)
        hive.clock.ahead_s += 7200
        assert await rung(hive, 1) == ["rang in an hour"]


async def test_an_instant_that_nobody_told_of_is_found_before_long(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "LOOK_AGAIN_S", 0.01)
    async with served(hive, Alarms()):
        await hive.store.write(alarm("quiet", 5, wakes=False))
        assert await rung(hive, 1) == ["rang quiet"]


async def test_a_lease_wakes_by_itself_when_a_message_has_rested(hive: Services) -> None:
    hive.broker.limits = Limits(backoff_s=0.1)
    await hive.say("hm1nd", "iris", "hello")
    async with served(hive, Rests()):
        for attempt in (1, 2, 3):
            with trio.fail_after(PATIENCE_S):
                begun = await hive.broker.lease(IRIS)
            assert begun.message["attempt"] == attempt
            await hive.broker.ack(IRIS, begun.turn, "failed")


async def test_a_lease_wakes_by_itself_when_its_agent_has_rested(hive: Services) -> None:
    hive.broker.limits = Limits(provider_rest_s=0.1)
    for body in ("waits", "wakes nobody"):
        await hive.say("hm1nd", "iris", body)
    async with served(hive, Rests()):
        begun = await hive.broker.lease(IRIS)
        await hive.broker.ack(IRIS, begun.turn, "waiting")
        await hive.sql("UPDATE deliveries SET available_at_ms = available_at_ms + 3600000 WHERE message_id = 1")
        with trio.fail_after(PATIENCE_S):
            assert (await hive.broker.lease(IRIS)).message["body"] == "wakes nobody"


async def test_while_nothing_rests_the_clock_of_rests_has_no_next_instant(hive: Services) -> None:
    await hive.say("hm1nd", "iris", "hello")
    rests = Rests()
    assert await hive.store.write(rests.next_after) is None
    begun = await hive.broker.lease(IRIS)
    await hive.broker.ack(IRIS, begun.turn, "waiting")
    due_at = await hive.value(
        "SELECT min(available_at_ms, rests_until_ms) FROM deliveries JOIN agents ON name = 'iris'"
    )
    assert await hive.store.write(rests.next_after) == due_at
    await hive.let_time_pass()
    assert await hive.store.write(rests.next_after) is None
