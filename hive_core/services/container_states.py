"""What is remembered of each agent's container: its crashes, how long it rests, and whether it is quarantined.

It stands in the database, so a daemon that starts again begins no rest anew, and starts no crash loop at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.visible import counted, quoted
from hive_core.protocol.words import AgentName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

REST_MOST_S = 60.0  # where doubling ends


class Hindrance(NamedTuple):
    """Why a container is not started now.

    state     crashed (it rests) or quarantined
    until_ms  when it is started by itself; None: not before the operator says so
    rest_s    until then
    """

    state: str
    sentence: str
    until_ms: int | None
    rest_s: float


class Restart(NamedTuple):
    """asked_by: who wants one that has not begun. begun_by: who wanted the last one, which has said no hello yet."""

    asked_by: AgentName | None
    begun_by: AgentName | None


class ContainerStates:
    def __init__(self, store: Store, limits: Limits, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._limits = limits
        self._clock = clock

    async def hindrance(self, name: AgentName) -> Hindrance | None:
        """What keeps an agent's container from being started now, or None."""
        row = await self._store.row("SELECT * FROM container_states WHERE agent = ?", (name,))
        if row is None or not row["crashes"]:
            return None
        if row["quarantined_at_ms"] is not None:
            return Hindrance("quarantined", _quarantine(name, row["crashes"], row["why"], row["last_words"]), None, 0.0)
        rest_s = row["next_start_at_ms"] / 1000 - self._clock()
        # Longer than any rest: the clock was set back since.
        if not 0 < rest_s <= max(REST_MOST_S, self._limits.restart_s):
            return None
        return Hindrance("crashed", row["why"], row["next_start_at_ms"], rest_s)

    async def generation(self, name: AgentName) -> str | None:
        """The shape of the agent's container that was started last; None where nobody wrote it down."""
        row = await self._store.row("SELECT generation FROM container_states WHERE agent = ?", (name,))
        return None if row is None else row["generation"]

    async def note_start(self, name: AgentName, generation: str) -> None:
        """A container of this shape is about to be started: who finds it knows that."""
        sql = """
            INSERT INTO container_states (agent, generation) VALUES (?, ?)
            ON CONFLICT (agent) DO UPDATE SET generation = excluded.generation,
              restart_begun_by = coalesce(restart_asked_by, restart_begun_by), restart_asked_by = NULL
        """
        await self._store.insist(lambda tx: tx.execute(sql, (name, generation)).rowcount)

    async def restart(self, name: AgentName) -> Restart:
        """The restart of an agent that was asked for and is not told of yet."""
        sql = "SELECT restart_asked_by, restart_begun_by FROM container_states WHERE agent = ?"
        row = await self._store.row(sql, (name,))
        return Restart(None, None) if row is None else Restart(*row)

    async def failed_updates(self) -> dict[AgentName, str]:
        """The agents that did not come up when they were replaced, and the generation of what they were to be."""
        sql = "SELECT agent, update_failed FROM container_states WHERE update_failed IS NOT NULL"
        return {AgentName(row["agent"]): row["update_failed"] for row in await self._store.rows(sql)}

    def note_failed_update(self, tx: Transaction, name: AgentName, generation: str) -> None:
        """An agent did not come up when it was replaced by a container of this shape."""
        tx.execute("UPDATE container_states SET update_failed = ? WHERE agent = ?", (generation, name))

    def forget_failed_updates(self, tx: Transaction, names: Iterable[AgentName]) -> None:
        """They came up, or the operator goes on all the same."""
        sql = "UPDATE container_states SET update_failed = NULL WHERE agent = ?"
        tx.executemany(sql, [(name,) for name in names])

    def note_crash(self, tx: Transaction, name: AgentName, why: str, last_words: str) -> tuple[int, str]:
        """Count a crash: how many there were in a row, and why the agent is quarantined by it, or an empty text."""
        sql = "SELECT crashes FROM container_states WHERE agent = ? AND crashed_at_ms > ?"
        row = tx.execute(sql, (name, tx.now_ms - int(self._limits.crash_loop_s * 1000))).fetchone()
        crashes = (row["crashes"] if row else 0) + 1
        rest_s = min(self._limits.restart_s * 2 ** min(crashes - 1, 30), max(REST_MOST_S, self._limits.restart_s))
        quarantined = crashes >= self._limits.crash_loop
        given = {
            "agent": name,
            "crashes": crashes,
            "crashed_at_ms": tx.now_ms,
            "next_start_at_ms": tx.now_ms + int(rest_s * 1000),
            "quarantined_at_ms": tx.now_ms if quarantined else None,
            "why": why,
            "last_words": last_words,
        }
        tx.execute(_NOTE, given)
        if not quarantined:
            return crashes, ""
        tx.emit("agent_quarantined", "system", name, crashes=crashes, why=why)
        return crashes, _quarantine(name, crashes, why, last_words)


def ask_for_restart(tx: Transaction, name: AgentName, actor: AgentName) -> None:
    """An agent is to be started anew, and whoever asked for it is told of with its next hello."""
    sql = """
        INSERT INTO container_states (agent, restart_asked_by) VALUES (?, ?)
        ON CONFLICT (agent) DO UPDATE SET restart_asked_by = excluded.restart_asked_by
    """
    tx.execute(sql, (name, actor))


def forget_restart(tx: Transaction, name: AgentName, *, asked: bool) -> None:
    """The one that was begun is told of; the one that was asked for too, or that is another one."""
    too = ", restart_asked_by = NULL" if asked else ""
    tx.execute(f"UPDATE container_states SET restart_begun_by = NULL{too} WHERE agent = ?", (name,))


def forgive(tx: Transaction, name: AgentName) -> None:
    """The operator starts an agent: its crashes count no more."""
    sql = "UPDATE container_states SET crashes = 0, quarantined_at_ms = NULL, next_start_at_ms = NULL WHERE agent = ?"
    tx.execute(sql, (name,))


def _quarantine(name: AgentName, crashes: int, why: str, last_words: str) -> str:
    said = f" Its last words: {quoted(last_words)}." if last_words else ""
    times = counted(crashes, "time")
    return f"it crashed {times} in a row; the last time it {why}.{said} `hive start {name}` starts it again"


_NOTE = """
    INSERT INTO container_states (
        agent, crashes, crashed_at_ms, next_start_at_ms, quarantined_at_ms, why, last_words
    ) VALUES (:agent, :crashes, :crashed_at_ms, :next_start_at_ms, :quarantined_at_ms, :why, :last_words)
    ON CONFLICT (agent) DO UPDATE SET
        crashes = excluded.crashes, crashed_at_ms = excluded.crashed_at_ms,
        next_start_at_ms = excluded.next_start_at_ms, quarantined_at_ms = excluded.quarantined_at_ms,
        why = excluded.why, last_words = excluded.last_words
"""
