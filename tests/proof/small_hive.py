"""A process that does what the daemon does to its database, and writes down each answer when it has it.

`python -m tests.proof.small_hive PLAN FOLDER ANSWERS`: the store and the broker of FOLDER, without sockets, so that a
recorder or a debugger sees little but them. Each line of ANSWERS goes out by one `write`, after the broker's answer.
"""

from __future__ import annotations

import io
import json
import os
import random
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio
import trio_asyncio

from hive_core.limits import Limits
from hive_core.protocol.file_names import FileName
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_agent_name, parse_body
from hive_core.services.attachments import Upload
from hive_core.services.bodies import Bodies
from hive_core.services.broker import Broker
from hive_core.services.leases import Lease, Turn
from hive_core.store.door import Store, open_store
from hive_core.store.writer import Transaction
from tests.proof.promises import Acked, Leased, Sent, Told

NAMES = ("ada", "bob", "cyd", "dan")
ROUNDS = 12
LIMITS = Limits(provider_rest_s=0.001)  # an agent whose turn had to wait takes one in the next round again
PATIENCE_S = 60.0  # a plan takes a second; one that waits for what was lost waits for ever


class Stuck(Exception):
    """What a plan builds on is not there."""


class Hive:
    def __init__(self, store: Store, folder: Path, answers: int, told: Told) -> None:
        self.store = store
        self.told = told
        self.broker = Broker(store, LIMITS, random.Random(0), Bodies(folder / "bodies", store))
        self._answers = answers

    def tell(self, kind: str, **answer: Any) -> None:
        os.write(self._answers, json.dumps({"kind": kind, **answer}).encode() + b"\n")

    async def send(
        self, sender: str, recipients: tuple[str, ...], body: str, client_id: str, files: tuple[bytes, ...] = ()
    ) -> None:
        to = [AgentName(name) for name in recipients]
        uploads = [Upload(FileName("file"), io.BytesIO(data)) for data in files]
        answer = await self.broker.send(AgentName(sender), to, parse_body(body), key=client_id, files=uploads)
        self.tell(
            "sent", message=answer["message"], sender=sender, recipients=recipients, body=body, client_id=client_id
        )

    async def lease(self, agent: str, fence: str) -> Lease:
        lease = await self.broker.lease(AgentName(agent), fence)
        self.tell_lease(agent, lease)
        return lease

    def tell_lease(self, agent: str, lease: Lease) -> None:
        of_message = {"messages": [lease.message["id"]], "attempts": [lease.message["attempt"]]}
        self.tell("leased", turn=lease.turn.id, agent=agent, fence=lease.turn.fence, **of_message)

    async def ack(self, agent: str, turn: Turn, outcome: str, next_fence: str | None = None) -> Lease | None:
        acked = await self.broker.ack(AgentName(agent), turn, outcome, next_fence=next_fence)
        if acked.counted:
            self.tell("acked", turn=turn.id, agent=agent, outcome=outcome)
        if acked.lease is not None:
            self.tell_lease(agent, acked.lease)
        return acked.lease


def as_told(answers: list[str], bodies: Path | None = None) -> Told:
    """What the lines of ANSWERS say."""
    told = Told(bodies_differ=True, limits=LIMITS, bodies=bodies)
    for line in answers:
        answer = json.loads(line)
        match answer.pop("kind"):
            case "sent":
                told.sends.append(Sent(**{**answer, "recipients": tuple(answer["recipients"])}))
            case "leased":
                lists = {key: tuple(answer[key]) for key in ("messages", "attempts")}
                told.leases.append(Leased(**{**answer, **lists}))
            case "acked":
                told.acks.append(Acked(**answer))
    return told


async def add_agents(store: Store) -> None:
    def write(tx: Transaction) -> None:
        for port, name in enumerate(NAMES, 8100):
            tx.execute(
                "INSERT INTO agents (name, role, wanted, page_port, created_at_ms) VALUES (?, 'agent', 'up', ?, ?)",
                (parse_agent_name(name), port, tx.now_ms),
            )

    await store.write(write)


async def set_pragma(store: Store, pragma: str) -> None:
    """Change how the writer's own connection writes; most of these are not for inside a transaction."""
    connection = await store.write(lambda tx: tx.execute.__self__)  # type: ignore[attr-defined]
    assert isinstance(connection, sqlite3.Connection)
    connection.execute(f"PRAGMA {pragma}")


async def one_message(hive: Hive) -> None:
    """A message is sent, leased and acked, each once; what a process before this one was told is not asked again."""
    told = hive.told
    if not told.sends:
        await hive.send("ada", ("bob",), "the one message", "k1")
    turn = Turn(told.leases[0].turn, told.leases[0].fence) if told.leases else (await hive.lease("bob", "f1")).turn
    if not told.acks:
        await hive.ack("bob", turn, "done")


async def many_messages(hive: Hive) -> None:
    """Groups of sends beside turns that end in every way; the log is folded into the database often."""
    await set_pragma(hive.store, "wal_autocheckpoint = 40")
    chance = random.Random(0)
    for number in range(ROUNDS):
        async with trio.open_nursery() as nursery:
            for sender in NAMES:
                to = tuple(chance.sample(NAMES, chance.randint(1, 3)))
                body = f"message {number} of {sender} " + "x" * chance.choice((10, 200, 9000, 70_000))
                files = chance.choice(((), (), (), (b"the same", f"of {number}".encode() * 5000)))
                nursery.start_soon(hive.send, sender, to, body, f"key-{number}", files)
            for agent in NAMES[:2]:
                nursery.start_soon(_take_turns, hive, agent, number, chance.choice(("done", "failed", "waiting")))


async def _take_turns(hive: Hive, agent: str, number: int, outcome: str) -> None:
    with trio.move_on_after(10.0):  # all of its mail may rest
        lease: Lease | None = await hive.lease(agent, f"fence-{number}")
        assert lease is not None
        try:
            await hive.broker.recv(AgentName(agent), 2, 0)
        except Refusal:
            return
        lease = await hive.ack(agent, lease.turn, outcome, f"next-{number}")
        if lease is not None:
            await hive.ack(agent, lease.turn, "done")


async def many_messages_unsynced(hive: Hive) -> None:
    """The same without a sync at each commit: it has to lose some."""
    await set_pragma(hive.store, "synchronous = NORMAL")
    await many_messages(hive)


async def nothing(hive: Hive) -> None:
    """The database is made, and the agents."""


PLANS: dict[str, Callable[[Hive], Awaitable[None]]] = {
    plan.__name__: plan for plan in (nothing, one_message, many_messages, many_messages_unsynced)
}


async def run(plan: str, folder: Path, answers: Path) -> None:
    told = as_told(answers.read_text().splitlines() if answers.exists() else [])
    descriptor = os.open(answers, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    async with trio_asyncio.open_loop(), open_store(folder / "hive.sqlite") as store:
        if await store.row("SELECT 1 FROM agents") is None:
            await add_agents(store)
        with trio.move_on_after(PATIENCE_S) as limit:
            await PLANS[plan](Hive(store, folder, descriptor, told))
    os.close(descriptor)
    if limit.cancelled_caught:
        raise Stuck(f"{plan} waits for something that does not come")


if __name__ == "__main__":
    trio.run(run, sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
