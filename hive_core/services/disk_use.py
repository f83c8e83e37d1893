"""How much of the disk each agent's directories take: measured after its turns, in a thread, and told when too much.

An agent over its quota takes turns all the same: it may be the one that can clear up, and its mail would wait behind
a stop that only the operator ends. What protects the hive's own disk is the ballast of the store.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from hive_core.limits import Limits
from hive_core.protocol.visible import mib
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName
from hive_core.services.agents import LIVE
from hive_core.services.notices import notice
from hive_core.services.post import put_message
from hive_core.store.bus import TURN_ENDS, WANTED, stream
from hive_core.store.door import Store
from hive_core.store.writer import Transaction
from hive_core.trees import measure_tree, open_folder

log = logging.getLogger(__name__)
T = TypeVar("T")
EVERY_S = 60.0  # between two looks
MEASURE_WITHIN_S = 5.0  # for one agent
HANGS_AFTER_S = 20.0
_SHARED = "/shared"
CLEAR_SHARE = 0.9  # of the quota, below which an agent that was over it counts as cleared up


@dataclass(frozen=True, slots=True)
class DiskUse:
    """What an agent's directories take, in bytes. whole: nothing was left out; else it is this much at least."""

    state: int
    claude: int
    config: int
    projects: int
    whole: bool

    @property
    def bytes(self) -> int:
        return self.state + self.claude + self.config + self.projects


class DiskUses:
    def __init__(self, store: Store, limits: Limits, state_dir: Path) -> None:
        self._store = store
        self._limits = limits
        self._state_dir = state_dir
        self._uses: dict[AgentName, DiskUse] = {}
        self.shared_bytes: int | None = None  # what /shared took when it was measured last: at least so much
        self._looking: set[str] = set()  # at whose directories a thread looks
        self._seen: dict[AgentName, int | None] = {}  # the last turn behind which each was measured

    @property
    def quota_bytes(self) -> int:
        return self._limits.disk_quota_bytes

    def of(self, name: AgentName) -> DiskUse | None:
        """What was measured last; None when nothing was yet."""
        return self._uses.get(name)

    def is_over(self, name: AgentName) -> bool:
        use = self.of(name)
        return use is not None and use.bytes > self.quota_bytes

    async def serve(self) -> None:
        """Measure agents that had a turn, from time to time, until cancelled."""
        with self._store.bus.listen(TURN_ENDS, WANTED) as listener:
            while True:
                await self.look()
                await trio.sleep(EVERY_S)
                await listener.wait()

    async def look(self) -> None:
        """Measure each agent that had a turn since it was measured, one after the other."""
        rows = await self._store.rows(_LAST_TURNS)
        for name in set(self._uses) - {row["name"] for row in rows}:
            self._uses.pop(name)
            self._seen.pop(name, None)
        moved = False
        for row in rows:
            name = AgentName(row["name"])
            if name not in self._seen or self._seen[name] != row["turn"]:
                self._seen[name], moved = row["turn"], True
                await self._measure(name)

        if moved:
            shared_bytes = await self._in_time(_SHARED, measure_shared, self._state_dir)
            if shared_bytes not in (None, self.shared_bytes):
                self.shared_bytes = shared_bytes
                self._store.bus.publish([LIVE, stream(MANAGER)])

    async def _in_time(self, whose: str, look: Callable[..., T], *args: Any) -> T | None:
        """What a look at somebody's directories finds; None when their disk hangs, for which nobody else waits."""

        def looks() -> T:
            try:
                return look(*args)
            finally:
                self._looking.discard(whose)

        if whose in self._looking:
            return None  # the one before has not come back yet
        self._looking.add(whose)
        with trio.move_on_after(HANGS_AFTER_S):
            return await trio.to_thread.run_sync(looks, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        log.warning("the disk of %s hangs: how much it takes is not known", whose)
        return None

    async def _measure(self, name: AgentName) -> None:
        use = await self._in_time(name, measure, self._state_dir, name)
        if use is None:
            self._seen.pop(name, None)  # another time
            return
        before, self._uses[name] = self.of(name), use
        over, cleared = use.bytes > self.quota_bytes, use.whole and use.bytes < CLEAR_SHARE * self.quota_bytes
        if over or cleared:
            await self._store.insist(lambda tx: self._tell(tx, name, use) if over else self._clear(tx, name, use))
        if use != before:
            self._store.bus.publish([LIVE, stream(name)])

    def _tell(self, tx: Transaction, name: AgentName, use: DiskUse) -> None:
        """Once, until it has cleared up."""
        sql = "INSERT INTO disk_warnings (agent, at_ms) VALUES (?, ?) ON CONFLICT DO NOTHING"
        if tx.execute(sql, (name, tx.now_ms)).rowcount:
            tx.emit("disk_quota_exceeded", SYSTEM, name, bytes=use.bytes, quota_bytes=self.quota_bytes)
            parts = f"{mib(use.state)} in /state, {mib(use.projects)} in /projects, {mib(use.claude)} of sessions"
            parts += f", {mib(use.config)} of configuration"
            limit = f"more than {mib(self.quota_bytes)} (disk_quota_bytes); it should clear up"
            text = f"the directories of {name} take {mib(use.bytes)} ({parts}), {limit}"
            sizes = {"bytes": use.bytes, "quota_bytes": self.quota_bytes}
            body = notice("disk_quota_exceeded", text, agent=name, **sizes)
            put_message(tx, SYSTEM, OPERATOR if name == MANAGER else MANAGER, body)

    def _clear(self, tx: Transaction, name: AgentName, use: DiskUse) -> None:
        if tx.execute("DELETE FROM disk_warnings WHERE agent = ?", (name,)).rowcount:
            tx.emit("disk_quota_met", SYSTEM, name, bytes=use.bytes, quota_bytes=self.quota_bytes)


def measure(state_dir: Path, name: AgentName, within_s: float = MEASURE_WITHIN_S) -> DiskUse:
    """Measure one agent's directories; blocking. What cannot be looked at is left out."""
    deadline, sizes, whole = time.monotonic() + within_s, [], True
    own = f"agents/{name}"
    # What is in its mirrors is the hive's, and takes no room here.
    for folder, entry in ((own, "state"), (own, "claude"), ("proposed", name), (own, "projects")):
        size = 0
        with contextlib.suppress(OSError):
            descriptor = open_folder(state_dir / folder)
            try:
                size, all_of_it = measure_tree(entry, descriptor, deadline)
                whole = whole and all_of_it
            finally:
                os.close(descriptor)
        sizes.append(size)
    state, claude, config, projects = sizes
    return DiskUse(state, claude, config, projects, whole)


def measure_shared(state_dir: Path, within_s: float = MEASURE_WITHIN_S) -> int:
    """How many bytes /shared takes, at least; blocking."""
    folder = open_folder(state_dir)
    try:
        return measure_tree("shared", folder, time.monotonic() + within_s)[0]
    finally:
        os.close(folder)


_LAST_TURNS = """
    SELECT name, (SELECT max(id) FROM turns INDEXED BY turns_by_agent WHERE agent = name) AS turn FROM agents
"""
