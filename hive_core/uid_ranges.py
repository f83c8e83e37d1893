"""The uids that agents' containers have on the host: a range each, allocated once and kept."""

from __future__ import annotations

import hashlib
import pwd
from collections.abc import Collection
from pathlib import Path

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

SIZE = 65536
# What systemd keeps for containers (its UIDS-GIDS page), but for the last range, which containers are tried with.
RANGES = range(0x00080000, 0x6FFF0000, SIZE)


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


def pick_range(name: str, taken: Collection[int]) -> int:
    """The first uid of a range that is free: the name's hash first, the next one otherwise. Raises Refusal."""
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(RANGES)
    foreign = [range(start, start + count) for start, count in _subordinate()]
    for step in range(len(RANGES)):
        uids = range(candidate := RANGES[(first + step) % len(RANGES)], candidate + SIZE)
        if candidate in taken or _is_somebodys(candidate):
            continue
        if not any(other.start < uids.stop and uids.start < other.stop for other in foreign):
            return candidate
    raise Refusal("refused", f"cannot allocate uids for {name}: all {len(RANGES)} ranges are; purge some agents")


def _is_somebodys(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _subordinate() -> list[tuple[int, int]]:
    """The ranges that users of the host may give to containers of their own: (first, how many)."""
    found = []
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            parts = line.split(":")
            if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
                found.append((int(parts[1]), int(parts[2])))
    return found
