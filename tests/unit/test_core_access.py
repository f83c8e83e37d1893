"""Who may call the model: pause, the emergency stop, and what becomes of turns and mail meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
import trio
import trio.testing

from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.access import Access, Closed
from hive_core.services.agents import Agents
from hive_core.services.freeze import Freeze
from hive_core.services.leases import Lease
from hive_core.services.turn_ends import Told
from hive_core.store import writer
from hive_core.store.errors import StoreBusy
from tests.hives import PATIENCE_S, Services, held_writer

IRIS = AgentName("iris")
DAMOCLES = AgentName("damocles")


@asynccontextmanager
async def a_lease(hive: Services, agent: AgentName = IRIS) -> AsyncIterator[trio.MemoryReceiveChannel[Lease]]:
    """A lease that waits, as a harness's does, while the hive wakes those whose way has opened."""
    send, receive = trio.open_memory_channel[Lease](1)

    async def wait() -> None:
        await send.send(await hive.broker.lease(agent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.agents.access.serve, hive.store)
        nursery.start_soon(hive.agents.serve)
        nursery.start_soon(wait)
        with trio.fail_after(PATIENCE_S):
            yield receive
        nursery.cancel_scope.cancel()


async def test_no_turn_begins_while_the_way_is_closed_and_the_held_message_goes_on_by_itself(hive: Services) -> None:
    closed: list[Closed] = [Closed("over_budget", "the day's 5 USD are spent")]
    hive.agents.access.add(lambda name: closed[0] if closed and name == IRIS else None)
    await hive.say("operator", "iris", "hello")
    await hive.say("operator", "damocles", "hello")
    async with a_lease(hive) as leased:
        assert (await hive.broker.lease(DAMOCLES)).message["body"] == "hello"
        await hive.say("operator", "iris", "another")
        with pytest.raises(trio.WouldBlock):
            leased.receive_nowait()
        closed.clear()
        hive.agents.access.changed(IRIS)
        assert (await leased.receive()).message["id"] == 1


async def test_an_ack_begins_no_turn_while_the_way_is_closed(hive: Services) -> None:
    closed: list[Closed] = []
    hive.agents.access.add(lambda _: closed[0] if closed else None)
    await hive.say("operator", "iris", "one")
    await hive.say("operator", "iris", "two")
    turn = (await hive.broker.lease(IRIS)).turn
    closed.append(Closed("rate_limited", "the account's limit is reached", 5))
    assert (await hive.broker.ack(IRIS, turn, "done", next_fence="f")).lease is None


async def test_what_a_closed_way_cut_short_waits_for_nothing_else(hive: Services) -> None:
    closed: list[Closed] = []
    hive.agents.access.add(lambda _: closed[0] if closed else None)
    await hive.say("operator", "iris", "hello")
    turn = (await hive.broker.lease(IRIS)).turn
    closed.append(Closed("paused", "iris is paused"))
    await hive.broker.ack(IRIS, turn, "waiting", error="503")
    closed.clear()
    with trio.fail_after(PATIENCE_S):
        assert (await hive.broker.lease(IRIS)).message["attempt"] == 2


@pytest.mark.parametrize(
    ("state", "reason"), [("paused", "paused"), ("rate_limited", "overloaded"), (None, "overloaded")]
)
async def test_a_turn_that_the_hive_itself_has_cut_short_is_not_said_to_have_met_an_overloaded_provider(
    hive: Services, state: str | None, reason: str
) -> None:
    closed: list[Closed] = []
    hive.agents.access.add(lambda _: closed[0] if closed else None)
    await hive.say("operator", "iris", "hello")
    turn = (await hive.broker.lease(IRIS)).turn
    closed += [Closed(state, "not now")] if state else []
    await hive.broker.ack(IRIS, turn, "waiting", error="503 not now", told=Told(reason="overloaded"))
    assert await hive.value("SELECT reason FROM turns") == reason
    assert await hive.value("SELECT data ->> '$.reason' FROM events WHERE kind = 'turn_ended'") == reason


async def test_the_row_of_an_agent_at_rest_shows_why_its_way_is_closed_and_until_when(hive: Services) -> None:
    closed: list[Closed] = []
    hive.agents.access.add(lambda name: closed[0] if closed and name == IRIS else None)
    hive.agents.observe(IRIS, "idle", "its last turn failed")
    hive.agents.observe(DAMOCLES, "thinking")
    async with a_lease(hive):
        closed.append(Closed("rate_limited", "the account's limit is reached", 77))
        hive.agents.access.changed()
        await trio.testing.wait_all_tasks_blocked()
        live = hive.agents.live(IRIS)
        assert (live.state, live.detail, live.until_ms) == ("rate_limited", "the account's limit is reached", 77)
        closed.clear()
        hive.agents.access.changed()
        await trio.testing.wait_all_tasks_blocked()
        assert (hive.agents.live(IRIS).state, hive.agents.live(IRIS).until_ms) == ("idle", None)
    assert hive.agents.live(DAMOCLES).state == "thinking"


async def test_a_paused_agent_stays_paused_over_a_restart_of_the_daemon(hive: Services) -> None:
    await hive.agents.want(IRIS, "paused", OPERATOR)
    again = Agents(hive.store, manager_port=8000, agent_ports=range(8100, 8200))
    await again.load()
    closed = again.access.closed(IRIS)
    assert closed is not None
    assert closed.state == "paused"
    assert "hive start iris" in closed.sentence
    assert again.access.closed(DAMOCLES) is None
    await hive.agents.want(IRIS, "up", OPERATOR)
    assert hive.agents.access.closed(IRIS) is None


async def test_the_emergency_stop_closes_the_way_of_everybody_until_it_is_let_go(hive: Services) -> None:
    freeze = Freeze(hive.store, hive.agents.access)
    await hive.say("operator", "iris", "hello")
    assert (await freeze.estop(OPERATOR), await freeze.estop(OPERATOR)) == (True, False)
    again = Freeze(hive.store, Access(hive.store.bus))
    await again.load()
    assert (again.since_ms, freeze.since_ms) == (freeze.since_ms, again.since_ms)
    for name in (IRIS, DAMOCLES):
        closed = hive.agents.access.closed(name)
        assert closed is not None
        assert (closed.state, "hive thaw" in closed.sentence) == ("frozen", True)
    async with a_lease(hive) as leased:
        await hive.say("operator", "iris", "another")
        with pytest.raises(trio.WouldBlock):
            leased.receive_nowait()
        assert (await freeze.thaw(OPERATOR), await freeze.thaw(OPERATOR)) == (True, False)
        assert (await leased.receive()).message["id"] == 1
    assert (await hive.kinds()).count("swarm_frozen") == (await hive.kinds()).count("swarm_thawed") == 1


async def test_the_emergency_stop_holds_before_the_disk_has_taken_it(hive: Services) -> None:
    freeze = Freeze(hive.store, hive.agents.access)
    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        nursery.start_soon(freeze.estop, OPERATOR)
        await trio.testing.wait_all_tasks_blocked()
        assert hive.agents.access.closed(IRIS) is not None
    assert await hive.kinds() == ["agent_created", "settings_deployed"] * 3 + ["swarm_frozen"]


async def test_an_emergency_stop_that_no_disk_took_is_let_go_as_any_other(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze = Freeze(hive.store, hive.agents.access)
    await hive.say("operator", "iris", "hello")
    monkeypatch.setattr(writer, "LOCKED_MS", 10)
    with closing(sqlite3.connect(hive.state_dir / "hive.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreBusy):
            await freeze.estop(OPERATOR)
    async with a_lease(hive) as leased:
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(trio.WouldBlock):
            leased.receive_nowait()
        assert await freeze.thaw(OPERATOR), "it was stopped"
        assert (await leased.receive()).message["id"] == 1


async def test_an_emergency_stop_holds_though_a_thaw_before_it_is_still_being_written(hive: Services) -> None:
    freeze = Freeze(hive.store, hive.agents.access)
    await freeze.estop(OPERATOR)
    closed = []

    async def thaw() -> None:
        await freeze.thaw(OPERATOR)
        closed.append(hive.agents.access.closed(IRIS))

    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        nursery.start_soon(thaw)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(freeze.estop, OPERATOR)
        await trio.testing.wait_all_tasks_blocked()
    assert closed[0] is not None
    assert hive.agents.access.closed(IRIS) is not None
    assert await hive.value("SELECT frozen_at_ms FROM swarm") is not None
