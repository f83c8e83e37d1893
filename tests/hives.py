"""Parts of a hive, opened for a test: the real store and services, and a peer that speaks to a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio
import trio_asyncio
from jinja2 import Environment, PackageLoader, StrictUndefined

from hive_core.containers.mounts import agent_dirs
from hive_core.containers.process import ProcessDriver
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.repos import Repos
from hive_core.limits import Limits
from hive_core.policy_rules import Rule
from hive_core.prices import load_prices
from hive_core.procedures.deployments import Deployments, PlainDeployments
from hive_core.procedures.desk import Desk
from hive_core.procedures.gate import Gate
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.walk import Walk
from hive_core.protocol.words import OPERATOR, AgentName, parse_agent_name, parse_body
from hive_core.services.access import Access
from hive_core.services.agents import Agent, Agents, set_deployed
from hive_core.services.approvals import Approvals
from hive_core.services.background import Background
from hive_core.services.bodies import Bodies
from hive_core.services.broker import Broker
from hive_core.services.events import timeline
from hive_core.services.file_delivery import FileDelivery
from hive_core.services.ledger import Ledger
from hive_core.services.loose_ends import LooseEnds
from hive_core.services.questions import Questions
from hive_core.services.reminders import Reminders
from hive_core.services.schedules import Schedules
from hive_core.services.turn_records import TurnRecords
from hive_core.services.turns import Turns
from hive_core.sockets.unix import listen_unix, serve_unix
from hive_core.store.ballast import Ballast
from hive_core.store.bus import mail
from hive_core.store.door import Store, open_store
from hive_core.store.writer import Transaction
from tests.needs import ROOT
from tests.processes import PATIENCE_S

SETTINGS = {"program": "rehearsal", "model": "sonnet", "tools": ["Bash"], "prompt": "You are a test."}
# Long enough for a machine under load, short enough that a test that hangs says so.


@dataclass
class Clock:
    """The wall clock of a store, which a test can set."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass
class Services:
    state_dir: Path
    store: Store
    broker: Broker
    turns: Turns
    agents: Agents
    approvals: Approvals
    repos: Repos
    gate: Gate
    clock: Clock
    timeline: str
    locks: AgentLocks

    def __post_init__(self) -> None:
        limits = self.broker.limits
        self.questions = Questions(self.store, limits, self.broker.bodies)
        self.reminders = Reminders(self.store, limits)
        self.schedules = Schedules(self.store, limits)
        self.background = Background(self.store, limits)
        self.turn_records = TurnRecords(self.store)
        self.loose_ends = LooseEnds(self.store, self.questions, self.reminders, self.schedules, self.background)

    async def add_agents(self, *names: str) -> None:
        """Make agents as rows alone, without repositories."""

        def write(tx: Transaction) -> None:
            for name in names:
                self.agents.create(tx, parse_agent_name(name), "operator")
                set_deployed(tx, name, "0" * 40, SETTINGS)

        await self.store.write(write)

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    async def say(self, sender: str, recipient: str, body: str, **more: Any) -> int:
        """Send a message; returns its id."""
        answer = await self.broker.send(AgentName(sender), AgentName(recipient), parse_body(body), **more)
        message: int = answer["message"]
        return message

    async def sql(self, statement: str, *parameters: Any) -> None:
        await self.store.write(lambda tx: tx.execute(statement, parameters).rowcount)

    async def value(self, query: str, *parameters: Any) -> Any:
        row = await self.store.row(query, parameters)
        return None if row is None else row[0]

    async def let_time_pass(self, seconds: float = 24 * 3600.0) -> None:
        """Set the clock forward, and wake who waits as the hive's clock does."""
        self.clock.ahead_s += seconds

        def write(tx: Transaction) -> None:
            sql = "SELECT DISTINCT recipient FROM deliveries WHERE state = 'queued' AND available_at_ms <= ?"
            for row in tx.execute(sql, (tx.now_ms,)).fetchall():
                tx.wake(mail(row[0]))
            for timer in (self.questions, self.reminders, self.schedules, self.approvals):
                timer.fire(tx)

        await self.store.write(write)

    def set_full(self, full: bool) -> None:
        """Let the store find no room on its disk for its ballast, or go without one again."""
        batches = self.store.write.__self__._batches  # type: ignore[attr-defined]
        batches._ballast = Ballast(self.state_dir / "hive.ballast", 1, 2**62) if full else None

    def at(self, seq: int, line: int | None = None) -> str:
        """A page's position: the last event that it has seen, and of an agent's page the last line."""
        from dashboard.live import Position  # few tests open a page

        return str(Position(self.timeline, seq, line))

    async def states(self, agent: str = "iris") -> dict[int, str]:
        """What has become of each message to `agent`."""
        sql = "SELECT message_id, state FROM deliveries WHERE recipient = ? ORDER BY message_id"
        return {row[0]: row[1] for row in await self.store.rows(sql, (agent,))}

    async def kinds(self) -> list[str]:
        """The kinds of all events, oldest first."""
        return [row["kind"] for row in await self.store.rows("SELECT kind FROM events ORDER BY seq")]


PLAIN = partial(PlainDeployments, sandbox="bwrap")


async def _never(agent: Agent, task_status: trio.TaskStatus[Desk]) -> None:
    raise AssertionError("nobody serves agents here")


@asynccontextmanager
async def open_services(
    state_dir: Path,
    ports: range = range(8100, 9000),
    limits: Limits | None = None,
    deployments: Callable[[Store, Repos, AgentLocks], Deployments] = PLAIN,
    policy: Sequence[Rule] = (),
    **bounds: int,
) -> AsyncIterator[Services]:
    """Everything of a hive that needs no agent and no socket, in `state_dir`."""
    templates = Environment(
        loader=PackageLoader("hive_core"), undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    templates.globals["operator_pronouns"] = ""
    clock = Clock()
    async with trio_asyncio.open_loop(), open_store(state_dir / "hive.sqlite", clock=clock) as store:
        access = Access(store.bus)
        agents = Agents(store, manager_port=8000, agent_ports=ports, access=access)
        approvals, repos, locks = Approvals(store), Repos(state_dir), AgentLocks()
        bodies = Bodies(state_dir / "bodies", store, clock)
        ledger = Ledger(store, access, load_prices(), limits, clock)
        delivery = FileDelivery(store, state_dir)
        broker = Broker(store, limits, random.Random(0), bodies, access, ledger, delivery=delivery)
        turns = Turns(store, **bounds)
        # Nobody serves it: what is deployed is proven by nobody.
        driver = ProcessDriver(state_dir, sandbox="bwrap", claude=None, orphan_grace_s=1.0, life_fd=None)
        dirs = partial(agent_dirs, state_dir, state_dir / "run")
        reconciler = Reconciler(
            store, agents, driver, dirs, lambda _: None, _never, broker.put_back, limits, clock, locks
        )
        made = deployments(store, repos, locks)
        gate = Gate(
            store,
            agents,
            approvals,
            repos,
            made,
            Walk(store, repos, made, locks, reconciler),
            templates,
            limits or Limits(),
            default_program="rehearsal",
            default_model="sonnet",
            policy=policy,
        )
        whose = await timeline(store)
        yield Services(state_dir, store, broker, turns, agents, approvals, repos, gate, clock, whose, locks)


@asynccontextmanager
async def open_gate(state_dir: Path) -> AsyncIterator[Services]:
    """The services with their gate served, and iris with her repositories."""
    async with open_services(state_dir) as services, trio.open_nursery() as nursery:
        nursery.start_soon(services.gate.serve)
        asked = await services.gate.spawn.request(OPERATOR, AgentName("iris"), "You read.", "a reader")
        card = await services.approvals.get(asked["approval"])
        with trio.fail_after(PATIENCE_S):
            await services.gate.approve(card.id, card.digest, OPERATOR)
        yield services
        nursery.cancel_scope.cancel()


def run_in_hive(test: Callable[[Services], Awaitable[None]], *names: str, **bounds: int) -> None:
    """One example of a property test: a hive of its own, with these agents."""

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder, trio.fail_after(PATIENCE_S):
            async with open_services(Path(folder), **bounds) as services:
                await services.add_agents(*names)
                await test(services)

    trio.run(main)


@asynccontextmanager
async def serve(path: Path, handler: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[Path]:
    """Serve a handler on a real unix socket for as long as the block runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_unix, listen_unix(path), handler)
        yield path
        nursery.cancel_scope.cancel()


class Peer:
    """The other side of a socket: sends bytes as it likes, reads JSON lines."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, obj: object) -> None:
        await self.send_bytes(json.dumps(obj).encode() + b"\n")

    async def send_bytes(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read(self) -> Any:
        """The next object; EndOfChannel after a hang-up."""
        with trio.fail_after(PATIENCE_S):
            while b"\n" not in self._buffer:
                data = await self.stream.receive_some()
                if not data:
                    raise trio.EndOfChannel
                self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer = bytearray(rest)
        return json.loads(line)

    async def ask(self, obj: object) -> Any:
        await self.send(obj)
        return await self.read()

    async def wait_hung_up(self) -> None:
        with trio.fail_after(PATIENCE_S), contextlib.suppress(trio.BrokenResourceError):
            while await self.stream.receive_some():
                pass


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Peer]:
    stream = await trio.open_unix_socket(path)
    async with stream:
        yield Peer(stream)


async def run_hive(
    runtime: Path, *words: str, stdin: bytes | int = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run `hive WORD …` as a process against the host.sock in `runtime`."""
    ours = {"HIVE_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT), "TZ": "UTC"}
    command = [sys.executable, "-m", "hive_core.cli", *words]
    with trio.fail_after(PATIENCE_S):
        return await trio.run_process(
            command,
            env={**os.environ, **ours, **(env or {})},
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def approve_by_hash(runtime: Path, *numbers: int, more: Sequence[str] = ()) -> subprocess.CompletedProcess[bytes]:
    """Run `hive approve` with the hashes of what `hive show` shows, as a program does."""
    shown = [json.loads((await run_hive(runtime, "show", str(number), "--json")).stdout) for number in numbers]
    digests = [word for card in shown for word in ("--digest", card["digest"])]
    return await run_hive(runtime, "approve", *map(str, numbers), *digests, *more)


async def wait_until(store: Store, condition: Callable[[], Awaitable[Any]], *topics: str) -> Any:
    """Return the first true value of `condition`, looked at again after each publication of `topics`."""
    with trio.fail_after(PATIENCE_S), store.bus.listen(*topics or ("events",)) as listener:
        while not (found := await condition()):
            await listener.wait()
        return found


@asynccontextmanager
async def held_writer(store: Store, nursery: trio.Nursery) -> AsyncIterator[None]:
    """Keep the writer waiting for another program's lock, so that what is written meanwhile makes one batch."""
    (database,) = [row for row in await store.rows("PRAGMA database_list") if row["name"] == "main"]
    other = sqlite3.connect(database["file"], isolation_level=None, check_same_thread=False)
    with contextlib.closing(other):
        # In a thread: the writer may be in a transaction that our own thread has to end.
        await trio.to_thread.run_sync(other.execute, "BEGIN IMMEDIATE")
        nursery.start_soon(store.write, lambda tx: None)
        await trio.testing.wait_all_tasks_blocked()
        yield


@contextmanager
def second_look(path: Path) -> Iterator[sqlite3.Connection]:
    """The database as somebody else sees it: what is not on disk is not there."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        yield connection
    finally:
        connection.close()


def clean_environment() -> dict[str, str]:
    """An environment in which git sees nobody's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in _WHO.items()}
    return {**kept, **identity, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "HOME": os.devnull}


_WHO = {"NAME": "the manager", "EMAIL": "hm1nd@localhost"}
