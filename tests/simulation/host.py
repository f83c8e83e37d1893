"""The host of a simulated swarm: a daemon that dies and comes back on the same database, and doors to reach it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio
import trio.testing

from hive_core.agents import Agents
from hive_core.archive import Archive, Query
from hive_core.background import Background
from hive_core.broker import Broker
from hive_core.procedures.clock import serve_clock
from hive_core.protocol.words import AgentName
from hive_core.reminders import Reminders
from hive_core.rests import Rests
from hive_core.retention import Retention
from hive_core.schedules import Schedules
from hive_core.sockets.harness import HarnessDesk
from hive_core.store.door import Store
from hive_core.tool_calls import forget_old_tool_calls
from hive_core.turns import Turns
from tests.simulation.weather import Chance, Weather
from tests.simulation.witness import NEVER, Witness

T = TypeVar("T")
BEGAN_AT_S = 1_800_000_000.0  # some day; the wall clock of a run goes with trio's
LONGEST_OUTAGE_S = 120.0
HOUSE_KEPT_EVERY_S = 3600.0
NO_LARGE_BODIES = Path("/dev/null")

OpenStore = Callable[[], AbstractAsyncContextManager[Store]]


def wall_clock() -> float:
    return BEGAN_AT_S + trio.current_time()


@dataclass
class Daemon:
    """One life of the daemon."""

    store: Store
    broker: Broker
    agents: Agents
    turns: Turns
    reminders: Reminders
    schedules: Schedules
    tasks: trio.Nursery
    desks: dict[str, HarnessDesk]
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

    def now_ms(self) -> int:
        self.witness.now_ms = int(wall_clock() * 1000)
        return self.witness.now_ms

    # -- the daemon's lives -------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        while True:
            with trio.move_on_after(self._chance.rest_s(self.weather.restarts_in_all)) as life:
                await self._live(life)
            if life.cancelled_caught and self.troubled:
                self._lives += 1
                self.witness.counts["restarts"] += 1
                await trio.sleep(self._chance.random() * LONGEST_OUTAGE_S)

    async def _live(self, life: trio.CancelScope) -> None:
        async with self._open_store() as store, trio.open_nursery() as tasks:
            broker = self._broker(store, self.weather.limits, random.Random(f"{self._seed}/{self._lives}"))
            agents = Agents(store, manager_port=8000, agent_ports=range(8100, 9000))
            turns = Turns(store)
            limits = self.weather.limits
            background = Background(store, limits)
            desks = {
                n: HarnessDesk(n, "agent", broker, turns, agents, background, lambda: "api_key") for n in self.names
            }
            daemon = Daemon(
                store, broker, agents, turns, Reminders(store, limits), Schedules(store, limits), tasks, desks
            )
            for name in self.wanted_down:
                desks[name].ask_to_stop()
            if self.weather.backstop_s is not None:
                tasks.start_soon(store.serve_backstop, self.weather.backstop_s)
            tasks.start_soon(broker.serve_leases)
            tasks.start_soon(serve_clock, store, [Rests(limits), daemon.reminders, daemon.schedules])
            archive = Archive(store, limits, NO_LARGE_BODIES)
            tasks.start_soon(_keep_house, broker, turns, archive, Retention(store, limits, archive.index))
            self.daemon = daemon
            self._up.set()
            self.witness.up_since_ms = self.now_ms()
            try:
                await trio.sleep_forever()
            finally:
                self.daemon, self._up = None, trio.Event()
                self.witness.free_since_ms.clear()
                self.witness.up_since_ms = NEVER
                for call in daemon.calls:
                    call.cancel()

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
                finally:
                    daemon.calls.pop(scope, None)
            if answers and chance.random() >= self.weather.lost_answers:
                return answers[0]
            await trio.sleep(chance.random())

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
