"""The host of a simulated swarm: a daemon that dies and comes back on the same database, and doors to reach it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from hive_core.prices import load_prices
from hive_core.procedures.clock import serve_clock
from hive_core.protocol.words import AgentName
from hive_core.services.access import Access, Closed
from hive_core.services.agents import Agents
from hive_core.services.archive import Archive, Query
from hive_core.services.background import Background
from hive_core.services.breaker import Breaker
from hive_core.services.broker import Broker
from hive_core.services.freeze import Freeze
from hive_core.services.ledger import Ledger
from hive_core.services.reminders import Reminders
from hive_core.services.rests import Rests
from hive_core.services.retention import Retention
from hive_core.services.schedules import Schedules
from hive_core.services.steering import Steering
from hive_core.services.tool_calls import forget_old_tool_calls
from hive_core.services.turn_ends import TurnEnd
from hive_core.services.turns import Turns
from hive_core.sockets.harness import HarnessDesk
from hive_core.store.door import Store
from hive_core.store.writer import Transaction
from tests.simulation.books import Books
from tests.simulation.inline_store import DaemonDied
from tests.simulation.provider import Answer, OneKey, Provider, relay
from tests.simulation.weather import Chance, Weather
from tests.simulation.witness import NEVER, Witness

T = TypeVar("T")
LONGEST_OUTAGE_S = 120.0
HOUSE_KEPT_EVERY_S = 3600.0
NO_LARGE_BODIES = Path("/dev/null")
PRICES = load_prices()
HEARD_AGAIN_S = 30.0  # for how long a harness that lost its turn may yet be heard again

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]


class WatchedAccess(Access):
    """Tells the witness whom it keeps from the model, and when that may be over."""

    witness: Witness

    def closed(self, name: AgentName) -> Closed | None:
        closed = super().closed(name)
        self.witness.asked_for_the_way(name, closed is None)
        return closed

    def changed(self, *names: AgentName) -> None:
        self.witness.way_changed(names)
        super().changed(*names)


class WatchedLedger(Ledger):
    """Tells the witness for whom it sets nothing aside."""

    witness: Witness

    def to_reserve(self, agent: AgentName) -> int | None:
        amount = super().to_reserve(agent)
        self.witness.asked_for_the_way(agent, amount is not None)
        if amount is not None:
            self.witness.books.reserved()
        return amount


class _Watched:
    """Of a broker: tells which turns ended because the way to the model was closed, so that nobody rests from them."""

    excused: set[int]

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: TurnEnd) -> None:
        if ending.on_purpose:
            self.excused.add(turn_id)
        super().end_turn(tx, agent, turn_id, ending)  # type: ignore[misc]


@dataclass
class Daemon:
    """One life of the daemon."""

    store: Store
    broker: Broker
    access: Access
    breaker: Breaker
    freeze: Freeze
    ledger: Ledger
    steering: Steering
    agents: Agents
    turns: Turns
    reminders: Reminders
    schedules: Schedules
    tasks: trio.Nursery
    desks: dict[str, HarnessDesk]
    books: Books
    lives: bool = True
    calls: dict[trio.CancelScope, None] = field(default_factory=dict)  # requests that end with it, unanswered


class Host:
    def __init__(
        self,
        seed: int,
        weather: Weather,
        names: list[str],
        open_store: OpenStore,
        broker: type[Broker],
        witness: Witness,
    ) -> None:
        self.weather = weather
        self.witness = witness
        self.names = [AgentName(name) for name in names]
        self._open_store = open_store
        self._broker = broker
        self._chance = Chance(seed, "host")
        self._seed = seed
        self._lives = 0
        self.wanted_down: set[AgentName] = set()
        self.daemon: Daemon | None = None
        self._up = trio.Event()
        self.troubled = True  # until the end of a run, when things only come to rest
        self.at_rest = trio.Event()
        self.provider = Provider(weather, seed)
        self.containers: dict[AgentName, trio.CancelScope] = {}  # of the agents that run

    def now_ms(self) -> int:
        return self.witness.clock()

    # -- the daemon's lives -------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        while True:
            with trio.move_on_after(self._chance.rest_s(self.weather.restarts_in_all)) as life:
                try:
                    await self._live(life)
                except* DaemonDied:
                    pass  # whoever could not be cancelled is gone, too
            if life.cancelled_caught and self.troubled:
                self._lives += 1
                self.witness.counts["restarts"] += 1
                await trio.sleep(self._chance.random() * LONGEST_OUTAGE_S)

    async def _live(self, life: trio.CancelScope) -> None:
        async with self._open_store() as store, trio.open_nursery() as tasks:
            daemon = await self._open(store, tasks)
            self._serve(daemon)
            self.daemon = daemon
            self._up.set()
            self.witness.up_since_ms = self.now_ms()
            try:
                await trio.sleep_forever()
            finally:
                daemon.lives = False
                self.daemon, self._up = None, trio.Event()
                self.witness.free_since_ms.clear()
                self.witness.closed.clear()
                self.witness.up_since_ms = NEVER
                self.witness.books.daemon_died()
                for call in daemon.calls:
                    call.cancel()

    async def _open(self, store: Store, tasks: trio.Nursery) -> Daemon:
        """The services on one store, as the daemon has them."""
        limits, luck = self.weather.limits, f"{self._seed}/{self._lives}"
        access = WatchedAccess(store.bus)
        agents = Agents(store, manager_port=8000, agent_ports=range(8100, 9000), access=access)
        ledger = WatchedLedger(store, access, PRICES, limits, self.witness.wall)
        access.witness = ledger.witness = self.witness
        watched: Any = type(self._broker.__name__, (_Watched, self._broker), {"excused": self.witness.told.excused})
        broker = watched(
            store, limits, random.Random(luck), access=access, ledger=ledger, silent=partial(self._hear_silence, tasks)
        )
        freeze = Freeze(store, access)
        breaker = Breaker(store, OneKey(), access, limits, random.Random(f"{luck}/breaker"), self.witness.wall)
        ledger.windows = breaker.windows_used
        turns, background = Turns(store), Background(store, limits)
        desks = {
            n: HarnessDesk(
                n, "agent", broker, turns, agents, background, partial(breaker.kind_for, n), partial(breaker.claimed, n)
            )
            for n in self.names
        }
        for name in sorted(self.wanted_down):
            desks[name].ask_to_stop()
        for service in (agents, freeze, breaker, ledger):
            await service.load()
        self.witness.books.daemon_began()
        reminders, schedules = Reminders(store, limits), Schedules(store, limits)
        return Daemon(
            store=store,
            broker=broker,
            access=access,
            breaker=breaker,
            freeze=freeze,
            ledger=ledger,
            steering=Steering(store),
            agents=agents,
            turns=turns,
            reminders=reminders,
            schedules=schedules,
            tasks=tasks,
            desks=desks,
            books=self.witness.books,
        )

    def _serve(self, daemon: Daemon) -> None:
        store, tasks, limits = daemon.store, daemon.tasks, self.weather.limits
        if self.weather.backstop_s is not None:
            tasks.start_soon(store.serve_backstop, self.weather.backstop_s)
        tasks.start_soon(daemon.broker.serve_leases)
        tasks.start_soon(daemon.access.serve, store)
        tasks.start_soon(daemon.breaker.serve)
        tasks.start_soon(daemon.ledger.serve)
        tasks.start_soon(serve_clock, store, [Rests(limits), daemon.reminders, daemon.schedules])
        archive = Archive(store, limits, NO_LARGE_BODIES)
        tasks.start_soon(_keep_house, daemon.broker, daemon.turns, archive, Retention(store, limits, archive.index))
        tasks.start_soon(self._end_the_unheard, daemon)

    # -- containers ---------------------------------------------------------------------------------------------------

    def _hear_silence(self, tasks: trio.Nursery, name: AgentName, _: float) -> None:
        tasks.start_soon(self._end_container, name, self.now_ms())

    async def _end_container(self, name: AgentName, silent_since_ms: int) -> None:
        """End the container of a harness that is not heard again; another one will say hello."""
        await trio.sleep(HEARD_AGAIN_S)
        if self.witness.heard_ms.get(name, 0) < silent_since_ms and name in self.containers:
            self.containers[name].cancel()

    async def _end_the_unheard(self, daemon: Daemon) -> None:
        """Of the daemon before: whoever hangs says no hello to this one."""
        await trio.sleep(2 * self.weather.limits.lease_silence_s)
        for name, desk in daemon.desks.items():
            if not desk.said_hello.is_set() and name in self.containers:
                self.containers[name].cancel()

    async def wait_up(self) -> Daemon:
        while self.daemon is None:
            await self._up.wait()
        return self.daemon

    # -- doors --------------------------------------------------------------------------------------------------------

    async def call(self, request: Callable[[Daemon], Awaitable[T]], chance: random.Random) -> T:
        """Ask until a daemon has answered and the answer has arrived, as a bridge that holds on does."""
        while True:
            daemon = await self.wait_up()
            answers: list[T] = []
            with trio.CancelScope() as scope:
                daemon.calls[scope] = None
                try:
                    answers.append(await request(daemon))
                except DaemonDied:
                    pass
                finally:
                    daemon.calls.pop(scope, None)
            if answers and chance.random() >= self.weather.lost_answers:
                return answers[0]
            await trio.sleep(chance.random())

    async def call_model(self, name: AgentName, turn: int, chance: random.Random) -> Answer:
        """A call of a turn's program, which ends with the daemon."""
        daemon = await self.wait_up()
        with trio.CancelScope() as scope:
            daemon.calls[scope] = None
            try:
                return await relay(daemon, self.provider, name, turn, self.weather.median_work_s, chance)
            finally:
                daemon.calls.pop(scope, None)
        return Answer("overloaded")

    @asynccontextmanager
    async def connect(self, name: AgentName) -> AsyncIterator[trio.abc.Stream]:
        """A connection to the agent's harness.sock; it ends with the daemon."""
        daemon = await self.wait_up()
        ours, theirs = trio.testing.memory_stream_pair()
        daemon.tasks.start_soon(_serve_connection, daemon.desks[name], theirs)
        try:
            yield ours
        finally:
            self.witness.free_since_ms.pop(name, None)
            await trio.aclose_forcefully(ours)


async def _keep_house(broker: Broker, turns: Turns, archive: Archive, retention: Retention) -> None:
    """What the daemon does now and then for what is old. A search indexes what is new, and only then can it be old."""
    while True:
        await archive.search(Query("work"))
        now_ms = await retention.now_ms()
        await turns.prune(now_ms)
        await forget_old_tool_calls(broker._store, now_ms)
        await retention.forget_old()
        await trio.sleep(HOUSE_KEPT_EVERY_S)


async def _serve_connection(desk: HarnessDesk, stream: Any) -> None:
    try:
        await desk.serve(stream)
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # as serve_unix does
    finally:
        await trio.aclose_forcefully(stream)
