"""A whole simulated swarm: from a seed and a weather to what its witness counted, or to the promise that was broken."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
import trio.testing
import trio_asyncio

from hive_core.protocol.words import AgentName
from hive_core.services.agents import Agents, set_deployed
from hive_core.services.broker import Broker
from hive_core.store.bus import Bus
from hive_core.store.door import Store, open_store
from hive_core.store.writer import Batches, Transaction
from tests.proof.promises import AT_REST, no_errand_is_left, nothing_is_left_unsettled
from tests.simulation.harness import Agent
from tests.simulation.host import Host
from tests.simulation.inline_store import InlineStore, InlineWriter, Losses, LossyBatches, LossyBus, open_memory
from tests.simulation.operator import Operator
from tests.simulation.replay import run_in_virtual_time
from tests.simulation.weather import DAY_S, HOUR_S, Chance, Weather
from tests.simulation.witness import BEGAN_AT_S, PromiseBroken, Witness, wall_clock

LEFT = (nothing_is_left_unsettled, no_errand_is_left)
LOOK_EVERY_S = 60.0
CALM_AT_MOST_S = 12 * HOUR_S
SEED_VARIABLE = "HIVE_TEST_SEED"
SETTINGS = {"program": "claude", "model": "sonnet", "tools": [], "prompt": "You are simulated."}


@dataclass(frozen=True)
class Run:
    """What happened: the counts of the witness, and a digest of all events, which is the same for the same run."""

    counts: dict[str, int]
    digest: str


def simulate(seed: int, weather: Weather, broker: type[Broker] = Broker) -> Run:
    """A run in virtual time. Raises PromiseBroken, with the way to see it again."""
    with closing(open_memory()) as db, told_how_to_replay(seed):
        main = partial(_run, seed, weather, db, partial(open_inline, seed, weather, db), wall_clock, broker)
        return run_in_virtual_time(seed, main)


def simulate_shipped(seed: int, weather: Weather, path: Path, speed: float) -> Run:
    """The same on the shipped store with its threads and files, `speed` times as fast as the clock on the wall.

    The luck of every actor is that of its seed; which of two comes first is not.
    """

    async def main() -> Run:
        async with trio_asyncio.open_loop(), open_shipped():
            pass  # the file, for whoever looks at it
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            async with trio_asyncio.open_loop():
                return await _run(seed, weather, db, open_shipped, shipped_clock, Broker)

    def shipped_clock() -> float:
        return BEGAN_AT_S + clock.current_time()

    clock = trio.testing.MockClock(rate=speed)
    # The writer's thread asks for the time too, where trio's own word for it is not to be had.
    open_shipped = partial(open_store, path, clock=shipped_clock)
    with told_how_to_replay(seed):
        return trio.run(main, clock=clock)


@contextmanager
def told_how_to_replay(seed: int) -> Iterator[None]:
    try:
        yield
    except BaseExceptionGroup as group:
        first = first_cause(group)
        first.add_note(f"to see it again: {SEED_VARIABLE}={seed} .venv/bin/python -m pytest tests/simulation")
        raise first from None


@asynccontextmanager
async def open_inline(seed: int, weather: Weather, db: sqlite3.Connection) -> AsyncIterator[Store]:
    """The store of one life of the daemon. Its end is a crash: what was not committed is gone."""
    chance = Chance(seed, "store", trio.current_time())
    bus, batches = Bus(), Batches(db, wall_clock)
    if weather.lost_wakes:
        bus = LossyBus(Losses(chance, weather.lost_wakes))
        batches = LossyBatches(db, wall_clock, Losses(chance, weather.lost_wakes))
    writer = InlineWriter(batches, bus, chance, weather.slow_commits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.serve)
        yield InlineStore(writer, db, bus)
        nursery.cancel_scope.cancel()


async def _run(
    seed: int,
    weather: Weather,
    db: sqlite3.Connection,
    open_store: Callable[[], AbstractAsyncContextManager[Store]],
    wall: Callable[[], float],
    broker: type[Broker],
) -> Run:
    names = [AgentName(f"agent-{number}") for number in range(1, weather.agents + 1)]
    witness = Witness(db, weather, wall)
    async with open_store() as store:
        await store.write(partial(_make_agents, Agents(store, manager_port=8000, agent_ports=range(8100, 9000)), names))
    host = Host(seed, weather, names, open_store, broker, witness)
    agents = {name: Agent(host, name, seed) for name in names}
    operator = Operator(host, agents, seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host.serve)
        nursery.start_soon(host.provider.serve)
        nursery.start_soon(_look, host, db)
        for agent in agents.values():
            nursery.start_soon(agent.live)
        with trio.move_on_after(weather.days * DAY_S):
            await operator.serve()
        await _calm_down(host, operator)
        nursery.cancel_scope.cancel()
    host.now_ms()
    witness.audit(AT_REST)
    return Run(witness.counts, _digest(db))


def _digest(db: sqlite3.Connection) -> str:
    digest = hashlib.sha256()
    for row in db.execute("SELECT at_ms, kind, actor, agent, data FROM events ORDER BY seq"):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def _make_agents(agents: Agents, names: list[AgentName], tx: Transaction) -> None:
    for name in names:
        agents.create(tx, name, "operator")
        set_deployed(tx, name, "0" * 40, SETTINGS)


async def _look(host: Host, db: sqlite3.Connection) -> None:
    audit_every_s = DAY_S / host.weather.audits_in_all
    audit_at = trio.current_time() + audit_every_s
    while True:
        await trio.sleep(LOOK_EVERY_S)
        host.now_ms()
        host.witness.look_for_waiting()
        host.witness.look_for_the_lost()
        host.witness.look_for_the_overdue()
        host.witness.look_for_the_hung()
        host.witness.books.look(host.daemon)
        if trio.current_time() >= audit_at:
            audit_at += audit_every_s
            host.witness.audit()
        if not host.troubled and not any(broken for left in LEFT for broken in left(db, host.witness.told)):
            host.at_rest.set()


async def _calm_down(host: Host, operator: Operator) -> None:
    """No more trouble, everybody up: what was sent comes to its end."""
    chance = Chance("calm")
    host.troubled = False
    host.provider.be_well()
    await operator.lift_everything(chance)
    for name in host.names:
        await operator.wake(name, chance)
    with trio.move_on_after(CALM_AT_MOST_S):
        await host.at_rest.wait()


def first_cause(exc: BaseException) -> BaseException:
    """Of a group the promise that was broken, or else its first exception."""
    while isinstance(exc, BaseExceptionGroup):
        broken, _ = exc.split(PromiseBroken)
        exc = (broken or exc).exceptions[0]
    return exc
