"""Agents' containers in virtual time: the reconciler and the rows are the shipped ones, and containers end as told."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

from hive_core.containers.mounts import AgentDirs, agent_dirs
from hive_core.containers.running import Exit
from hive_core.limits import Limits
from hive_core.procedures.desk import Desk
from hive_core.procedures.reconcile import Reconciler
from hive_core.protocol.words import AgentName
from hive_core.services.agents import Agent, Agents, Live, set_deployed
from hive_core.services.background import Background
from hive_core.services.broker import Broker
from hive_core.services.turns import Turns
from hive_core.sockets.harness import HarnessDesk
from hive_core.store.bus import Bus
from hive_core.store.writer import Batches, Transaction
from tests.hives import SETTINGS
from tests.simulation.inline_store import InlineStore, InlineWriter, open_memory

BEGAN_AT_S = 1_800_000_000.0


class Container:
    """One that runs: it ends when the test says so, or is killed."""

    def __init__(self, pid: int, mortal: bool) -> None:
        self.pid = pid
        self.began_s = trio.current_time()
        self._mortal = mortal
        self._exit: Exit | None = None
        self._ended = trio.Event()

    def end(self, code: int | None = 1) -> None:
        self._exit = Exit(code)
        self._ended.set()

    def unit(self) -> dict[str, str]:
        return {}

    def kill(self) -> None:
        if self._mortal and not self._ended.is_set():
            self.end(137)

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self._exit is not None
        return self._exit


class ScriptedDriver:
    """Meets what the reconciler asks of a driver. `life` decides over each container that begins, by its agent."""

    sandbox = "scripted"

    def __init__(self) -> None:
        self.life: Callable[[AgentName, Container], None] = lambda *_: None
        self.begun: list[tuple[AgentName, Container]] = []
        self.left: dict[AgentName, Container] = {}  # by an earlier daemon
        self.missed: dict[AgentName, Exit] = {}
        self.shape = "one"
        self.shapes: dict[str, str] = {}  # of agents that have another
        self.broken = ""  # why none can be started
        self.failing: dict[tuple[str, str], Exception] = {}  # (agent, what is asked of the driver) → what it raises
        self.stuck: set[str] = set()  # whose start does not come back
        self.mortal = True

    def _may(self, name: AgentName, what: str) -> None:
        if (trouble := self.failing.get((name, what))) is not None:
            raise trouble

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        self._may(name, "generation")
        return self.shapes.get(name, self.shape)

    async def start(self, name: AgentName, dirs: AgentDirs) -> Container:
        self._may(name, "start")
        if name in self.stuck:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        if self.broken:
            raise OSError(self.broken)
        container = Container(len(self.begun) + 1, self.mortal)
        self.begun.append((name, container))
        self.life(name, container)
        return container

    async def find(self, name: AgentName, dirs: AgentDirs) -> Container | None:
        self._may(name, "find")
        return self.left.pop(name, None)

    async def missed_exit(self, name: AgentName) -> Exit | None:
        self._may(name, "missed_exit")
        return self.missed.pop(name, None)

    async def forget(self, name: AgentName) -> None:
        self._may(name, "forget")

    async def destroy(self, name: AgentName) -> None:
        self._may(name, "destroy")

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        self._may(name, "last_words")
        return f"{name} fell over"


@dataclass
class House:
    """A hive's rows, and a daemon on them that can be ended and begun again."""

    store: InlineStore
    driver: ScriptedDriver
    limits: Limits
    set_s: float = 0.0  # how far somebody has set the wall clock
    unfit: dict[str, str] = field(default_factory=dict)  # why these agents may not be started here
    unserved: str = ""  # why no agent's sockets can be opened
    desks: dict[AgentName, HarnessDesk] = field(default_factory=dict)
    agents: Agents = field(init=False)
    broker: Broker = field(init=False)
    reconciler: Reconciler = field(init=False)
    _life: trio.CancelScope = field(default_factory=trio.CancelScope)

    def wall_clock(self) -> float:
        return BEGAN_AT_S + self.set_s + trio.current_time()

    async def add_agents(self, *names: str) -> None:
        def write(tx: Transaction) -> None:
            for name in names:
                self.agents.create(tx, AgentName(name), "operator")
                set_deployed(tx, name, "0" * 40, SETTINGS)

        await self.store.write(write)

    def open(self) -> None:
        """The services of one life of the daemon."""
        store, limits = self.store, self.limits
        self.agents = Agents(store, manager_port=8000, agent_ports=range(8100, 9000))
        self.broker = Broker(store, limits, random.Random(0))
        background, turns = Background(store, limits), Turns(store)
        self.desks.clear()

        async def serve(agent: Agent, task_status: trio.TaskStatus[Desk]) -> None:
            if self.unserved:
                raise OSError(self.unserved)
            desk = HarnessDesk(agent.name, agent.role, self.broker, turns, self.agents, background, lambda: "api_key")
            self.desks[agent.name] = desk
            task_status.started(desk)
            await trio.sleep_forever()

        def dirs(name: AgentName) -> AgentDirs:
            return agent_dirs(Path("state"), Path("run"), name)

        def may_run(agent: Agent) -> str | None:
            return self.unfit.get(agent.name)

        driver: Any = self.driver
        self.reconciler = Reconciler(
            store, self.agents, driver, dirs, may_run, serve, self.broker.put_back, limits, self.wall_clock
        )

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[None]:
        """One life of it. What it left behind is there for the next."""
        self.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.reconciler.serve)
            yield
            nursery.cancel_scope.cancel()

    def hello(self, name: str) -> None:
        """The harness of an agent says hello."""
        desk = self.desks[AgentName(name)]
        desk.silence.ended()
        desk.said_hello.set()
        self.agents.observe(name, "idle")

    def let_crash(self, *names: str) -> None:
        """From now on containers of these agents end as they begin, and those of others say hello."""

        def life(name: AgentName, container: Container) -> None:
            if name in names:
                container.end(1)
            else:
                self.hello(name)

        self.driver.life = life

    def last_of(self, name: str) -> Container:
        """The agent's container that began last."""
        return [container for who, container in self.driver.begun if who == name][-1]

    def running(self, name: str) -> Container:
        """The agent's container that runs."""
        supervised = self.reconciler._supervised[AgentName(name)]
        assert isinstance(supervised.running, Container)
        return supervised.running

    def live(self, name: str) -> Live:
        return self.agents.live(name)

    def starts_of(self, name: str) -> list[float]:
        """When each container of an agent began."""
        return [container.began_s for who, container in self.driver.begun if who == name]

    async def mail(self, name: str) -> list[str]:
        """The bodies of all messages to somebody."""
        sql = "SELECT body FROM messages m JOIN deliveries d ON d.message_id = m.id WHERE d.recipient = ? ORDER BY m.id"
        return [row[0] for row in await self.store.rows(sql, (name,))]

    async def kinds(self, name: str) -> list[str]:
        sql = "SELECT kind FROM events WHERE agent = ? ORDER BY seq"
        return [row[0] for row in await self.store.rows(sql, (name,))]

    async def until(self, wanted: Callable[[], bool]) -> None:
        """Let time pass until it is so."""
        with trio.fail_after(3000):
            while not wanted():  # noqa: ASYNC110 - virtual time
                await trio.sleep(0.25)


@asynccontextmanager
async def open_house(**limits: Any) -> AsyncIterator[House]:
    """An empty hive in virtual time; its rows are in memory and outlive its daemons."""
    connection, bus = open_memory(), Bus()
    house: House

    def clock() -> float:
        return house.wall_clock()

    writer = InlineWriter(Batches(connection, clock), bus, random.Random(0), 0.0)
    house = House(InlineStore(writer, connection, bus), ScriptedDriver(), Limits(**limits))
    house.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        yield house
        nursery.cancel_scope.cancel()
    connection.close()
