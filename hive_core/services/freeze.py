"""The emergency stop: one switch that keeps every agent from the model, until the operator lets go."""

from __future__ import annotations

import time

import trio

from hive_core.protocol.words import AgentName
from hive_core.services.access import Access, Closed
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


class Freeze:
    def __init__(self, store: Store, access: Access) -> None:
        self._store = store
        self._access = access
        self.since_ms: int | None = None  # when the swarm was stopped; None while it is not
        self._stops = 0  # how often it was to be
        access.add(self.reason)

    async def load(self) -> None:
        """Go on as the daemon before was left."""
        row = await self._store.row("SELECT frozen_at_ms FROM swarm")
        self.since_ms = row["frozen_at_ms"] if row else None

    def reason(self, _: AgentName) -> Closed | None:
        if self.since_ms is None:
            return None
        return Closed("frozen", "the operator has stopped the whole swarm; `hive thaw` lets it go on")

    async def estop(self, actor: str) -> bool:
        """Stop the whole swarm: every call to the model is cut, and no turn begins. False when it was stopped.

        It holds at once, also when the disk then takes nothing and Refusal is raised.
        """
        self._stops += 1
        if self.since_ms is None:
            self.since_ms = int(time.time() * 1000)
            self._access.changed()
        return await self._set(True, actor)

    async def thaw(self, actor: str) -> bool:
        """Let the swarm go on, with the messages that it holds. False when it was not stopped."""
        return await self._set(False, actor)

    async def _set(self, frozen: bool, actor: str) -> bool:
        def write(tx: Transaction) -> tuple[bool, int | None]:
            (before,) = tx.execute("SELECT frozen_at_ms FROM swarm").fetchone()
            if (before is not None) == frozen:
                return False, before
            since_ms = tx.now_ms if frozen else None
            tx.execute("UPDATE swarm SET frozen_at_ms = ?", (since_ms,))
            tx.emit("swarm_frozen" if frozen else "swarm_thawed", actor)
            return True, since_ms

        stops = self._stops
        with trio.CancelScope(shield=True):  # else what is written and what holds could be two things
            changed, since_ms = await self._store.write(write)
        if not frozen and self._stops != stops:
            return changed  # a stop has come meanwhile, and holds
        # One that the disk did not take is in memory alone.
        changed = changed or (self.since_ms is None) != (since_ms is None)
        self.since_ms = since_ms
        if changed:
            self._access.changed()
        return changed
