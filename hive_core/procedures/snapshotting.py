"""When snapshots of agents' /state are taken, and how one is restored: never while a turn writes.

One is taken at a turn's edge, `snapshot_s` after the one before at the soonest and only when something changed; when an
agent is about to be started in a container of another shape; and when the operator asks. No turn begins meanwhile. An
agent that is destroyed keeps its /state itself, under its tombstone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import trio

from hive_core.limits import Limits
from hive_core.procedures.reconcile import Reconciler
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, SYSTEM, AgentName
from hive_core.services.access import Access
from hive_core.services.agents import Agents
from hive_core.snapshots import Snapshot, Snapshots
from hive_core.store.bus import TURN_ENDS, stream
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
AT_ONCE = 2  # copies under way
LOOK_EVERY_S = 5.0
FAILED_RESTS = 6  # as long as `snapshot_s` until the next by itself: no turn begins while one is tried
EDGE_PATIENCE_S = 20.0  # for whoever asks, until the turn that runs has ended

T = TypeVar("T")


class Snapshotting:
    def __init__(
        self,
        store: Store,
        agents: Agents,
        access: Access,
        reconciler: Reconciler,
        limits: Limits,
        state_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._agents = agents
        self._access = access
        self._reconciler = reconciler
        self._limits = limits
        self._state_dir = state_dir
        self._clock = clock
        self._slots = trio.Semaphore(AT_ONCE)
        self._locks: dict[AgentName, trio.Lock] = {}
        self._seen: dict[AgentName, int | None] = {}  # the turn behind which each was looked at last
        self._looked_at: dict[AgentName, float] = {}  # when that was, by trio's clock
        self._moves: dict[AgentName, int] = {}
        self._trouble: dict[AgentName, str] = {}

    async def load(self) -> None:
        """End or undo what a daemon before left half done; before any agent is started."""
        self._reconciler.before_switch(self.before_switch)
        for agent in await self._agents.all():
            await trio.to_thread.run_sync(self._settle, agent.name)

    async def serve(self) -> None:
        """Take snapshots at the edges of turns, until cancelled."""
        async with trio.open_nursery() as nursery:
            with self._store.bus.listen(TURN_ENDS) as listener:
                while True:
                    rest_s = await self.look(nursery)
                    await trio.sleep(LOOK_EVERY_S)
                    with trio.move_on_after(rest_s):
                        await listener.wait()

    async def look(self, nursery: trio.Nursery) -> float:
        """Begin to take one of each agent that had a turn and is due; seconds until another is."""
        now, soonest_s = trio.current_time(), float("inf")
        for row in await self._store.rows(_LAST_TURNS):
            name = AgentName(row["name"])
            if self._seen.setdefault(name, row["turn"]) == row["turn"]:
                continue
            rest_s = self._looked_at.get(name, -float("inf")) + self._limits.snapshot_s - now
            if rest_s > 0:
                soonest_s = min(soonest_s, rest_s)
            else:
                self._seen[name], self._looked_at[name] = row["turn"], now
                nursery.start_soon(self._take_by_itself, name)
        return soonest_s

    def moves(self, name: AgentName) -> int:
        """How often something about an agent's snapshots has changed: a page that has the same number has all of it."""
        return self._moves.get(name, 0)

    def trouble(self, name: AgentName) -> str:
        """Why the last snapshot that was to be taken of an agent was not, or an empty text."""
        return self._trouble.get(name, "")

    async def all(self, name: AgentName) -> list[Snapshot]:
        """Every snapshot of an agent, the newest first."""
        return await self._explained(name, self._of(name).all)

    async def bytes(self, name: AgentName) -> int:
        """What an agent's snapshots take of the disk, at least."""
        return await trio.to_thread.run_sync(self._of(name).bytes)

    async def take(self, name: AgentName, actor: AgentName = OPERATOR) -> Snapshot | None:
        """Take one at the turn's edge; None when nothing changed since the last. Raises Refusal."""
        await self._agents.get(name)
        with trio.move_on_after(EDGE_PATIENCE_S) as patience:
            async with self._edge(name):
                patience.deadline = float("inf")
                return await self._take(name, f"{actor} asked for it", actor)
        self._looked_at.pop(name, None)
        why = f"its turn has not ended within {EDGE_PATIENCE_S:.0f} s"
        raise Refusal("conflict", f"cannot take a snapshot of {name} now: {why}; one is taken at its edge by itself")

    async def restore(self, name: AgentName, raw: object = None, *, at_once: bool = False) -> tuple[Snapshot, Snapshot]:
        """Let an agent's /state be what it was: (that snapshot, the one that what was there is kept as).

        raw  the snapshot's name or its beginning; None is the newest that differs from what is there now

        The agent's container is ended at its turn's edge, or `at_once`, and started again. Raises Refusal, and then
        /state is as it was.
        """
        await self._agents.get(name)
        if raw is not None:
            await trio.to_thread.run_sync(self._of(name).find, raw)
        result: tuple[Snapshot, Snapshot] | None = None
        with trio.move_on_after(EDGE_PATIENCE_S) as patience:
            async with self._reconciler.at_rest(name, at_once):
                patience.deadline = float("inf")
                with trio.CancelScope(shield=True):
                    result = await self._restore(name, raw)
        if result is None:
            ways = f"wait for its end, or `hive restore-state {name} --now` ends it in the middle"
            raise Refusal("conflict", f"cannot restore the state of {name} now: its turn runs; {ways}")
        return result

    async def _restore(self, name: AgentName, raw: object) -> tuple[Snapshot, Snapshot]:
        own = self._of(name)
        async with self._lock(name):
            wanted = await self._explained(name, own.last_other if raw is None else partial(own.find, raw))
            kept = await self._explained(name, partial(own.restore, wanted, self._now_ms()))

            def tell(tx: Transaction) -> None:
                tx.emit("state_restored", OPERATOR, name, snapshot=wanted.id, kept=kept.id)

            await self._store.insist(tell)
        self._moved(name)
        return wanted, kept

    def _moved(self, name: AgentName) -> None:
        self._moves[name] = self.moves(name) + 1
        self._store.bus.publish([stream(name)])

    async def before_switch(self, name: AgentName) -> None:
        """Take one of an agent that does not run, and is to be started in another container than it had."""
        await self._take_or_tell(name, "before a switch to another container")

    async def _take_by_itself(self, name: AgentName) -> None:
        async with self._edge(name):
            await self._take_or_tell(name, "at its turn's edge")

    async def _take_or_tell(self, name: AgentName, why: str) -> None:
        try:
            await self._take(name, why, SYSTEM)
        except Refusal as refusal:
            log.warning("%s", refusal.message, extra={"agent": name})

    async def _take(self, name: AgentName, why: str, actor: AgentName) -> Snapshot | None:
        async with self._lock(name), self._slots:
            try:
                taken = await self._explained(name, partial(self._of(name).take, why, self._now_ms()))
            except Refusal as refusal:
                self._trouble[name] = refusal.message
                self._looked_at[name] = trio.current_time() + (FAILED_RESTS - 1) * self._limits.snapshot_s
                self._moved(name)
                raise
        if self._trouble.pop(name, None):
            self._moved(name)
        self._looked_at[name] = trio.current_time()
        if taken is not None:
            told: dict[str, Any] = {"snapshot": taken.id, "why": why, "files": taken.files, "bytes": taken.bytes}
            await self._store.insist(lambda tx: tx.emit("snapshot_taken", actor, name, **told))
            self._moved(name)
        return taken

    @asynccontextmanager
    async def _edge(self, name: AgentName) -> AsyncIterator[None]:
        """Wait until no turn of the agent runs, and let none begin before this is left."""
        sql = "SELECT id FROM turns WHERE agent = ? AND state = 'running'"
        with self._access.at_edge(name), self._store.bus.listen(TURN_ENDS) as listener:
            # In a transaction: whatever was to begin before has begun, and what comes behind it finds the edge held.
            while await self._store.insist(lambda tx: tx.execute(sql, (name,)).fetchone()) is not None:
                await listener.wait()
            yield

    async def _explained(self, name: AgentName, blocking: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(blocking)
        except FileNotFoundError:
            raise Refusal("not_found", f"cannot find a snapshot of {name}: it has no /state; start it first") from None
        except (OSError, ValueError) as exc:
            why = explain(exc) if isinstance(exc, OSError) else "it is damaged"
            raise Refusal("failed", f"cannot use the snapshots of {name}: {why}") from exc

    def _settle(self, name: AgentName) -> None:
        try:
            self._of(name).settle()
        except FileNotFoundError:
            return  # it was never started
        except (OSError, ValueError, TypeError) as exc:
            log.error("cannot look after the snapshots of %s: %s", name, exc, extra={"agent": name})

    def _of(self, name: AgentName) -> Snapshots:
        return Snapshots(self._state_dir, name, self._limits.snapshots_kept, self._limits.snapshots_bytes)

    def _lock(self, name: AgentName) -> trio.Lock:
        return self._locks.setdefault(name, trio.Lock())

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


_LAST_TURNS = """
    SELECT name, (SELECT max(id) FROM turns INDEXED BY turns_by_agent WHERE agent = name AND state != 'running') AS turn
    FROM agents
"""
