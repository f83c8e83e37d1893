"""The uids that agents' containers have on the host: a range each, allocated once and kept."""

from __future__ import annotations

from hive_core.containers.ranges import pick_range
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


class UidRanges:
    """`hive` tells apart the hives of one host, so that their agents hardly ever share uids."""

    def __init__(self, store: Store, hive: str) -> None:
        self._store = store
        self._hive = hive

    async def first_uid(self, name: AgentName) -> int:
        """The first uid of an agent's range, which is allocated when it has none. Raises Refusal when all are."""
        row = await self._store.row("SELECT first_uid FROM uid_ranges WHERE agent = ?", (name,))
        if row is not None:
            return int(row["first_uid"])

        def write(tx: Transaction) -> int:
            rows = tx.execute("SELECT agent, first_uid FROM uid_ranges").fetchall()
            held = {row["agent"]: int(row["first_uid"]) for row in rows}
            if name in held:
                return held[name]
            first = pick_range(f"{self._hive}/{name}", {*held.values()})
            tx.execute("INSERT INTO uid_ranges (agent, first_uid) VALUES (?, ?)", (name, first))
            tx.emit("uids_allocated", SYSTEM, name, first_uid=first)
            return first

        return await self._store.write(write)

    @staticmethod
    def release(tx: Transaction, name: AgentName) -> None:
        """Let others have the uids of an agent that is no more, and has nothing on any disk."""
        tx.execute("DELETE FROM uid_ranges WHERE agent = ?", (name,))
