"""The stream of a turn: what the agent's program printed, kept with bounds per turn, per agent and by age."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from hive_core.limits import Limits
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.services.charges import UNSURE_OF_TURN
from hive_core.store.bus import stream
from hive_core.store.door import Store
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction

LINES_PER_TURN = 12_000
LINES_PER_AGENT = 60_000
LINE_KEPT_S = 14 * 24 * 3600
BOUND_EVERY = 500  # lines of one turn between two looks at how many its agent has
UNLEASED_EVERY_S = 60.0  # events of calls outside any turn, of one agent
DROPPED_AT_ONCE = 1_000  # lines over the quota that one transaction drops; there are more after it was lowered


class Turns:
    def __init__(
        self,
        store: Store,
        *,
        lines_per_turn: int = LINES_PER_TURN,
        lines_per_agent: int = LINES_PER_AGENT,
        line_quota_bytes: int = Limits().line_quota_bytes,
    ) -> None:
        self._store = store
        self._lines_per_turn = lines_per_turn
        self._lines_per_agent = lines_per_agent
        self._line_quota_bytes = line_quota_bytes
        self._unleased: dict[AgentName, float] = {}  # when it was told last

    async def add_lines(
        self,
        agent: AgentName,
        turn_id: int,
        first: int,
        lines: list[str],
        with_first: Callable[[Transaction], None] = lambda tx: None,
    ) -> int:
        """Keep lines number `first` and up of a turn; those already there are left alone.

        What is kept once for a turn is written by `with_first`, in the transaction of its first lines.

        Returns how many lines of the turn have arrived in all. The newest are kept when a bound is reached. A turn
        that is not the agent's, or not running, takes none.
        """

        def write(tx: Transaction) -> int:
            sql = "SELECT lines FROM turns WHERE id = ? AND agent = ? AND state = 'running'"
            row = tx.execute(sql, (turn_id, agent)).fetchone()
            if row is None:
                return 0
            rows = [(agent, turn_id, n, tx.now_ms, line) for n, line in enumerate(lines, first) if n >= row["lines"]]
            if not rows:
                return int(row["lines"])
            arrived = first + len(lines)
            if row["lines"] == 0 and not tx.short:
                with_first(tx)
            if tx.short:
                rows = []  # counted, not kept: the last space is for the mail
            tx.executemany("INSERT INTO turn_lines (agent, turn_id, n, at_ms, line) VALUES (?, ?, ?, ?, ?)", rows)
            tx.execute("UPDATE turns SET lines = ? WHERE id = ?", (arrived, turn_id))
            size = sum(len(row[-1].encode()) for row in rows)
            tx.execute("UPDATE agents SET line_bytes = line_bytes + ? WHERE name = ?", (size, agent))
            if arrived > self._lines_per_turn:
                _drop_lines(tx, "turn_id = ? AND n < ?", turn_id, arrived - self._lines_per_turn)
            if row["lines"] == 0 or arrived // BOUND_EVERY > row["lines"] // BOUND_EVERY:
                self._bound(tx, agent)
            self._bound_bytes(tx, agent)
            tx.wake(stream(agent))
            return arrived

        return await self._store.write(write)

    async def note_unleased_call(self, agent: AgentName) -> None:
        """Tell, once in a while, that an agent called the model outside any turn: something in it thinks unasked."""
        now = trio.current_time()
        if now - self._unleased.get(agent, -math.inf) < UNLEASED_EVERY_S:
            return
        self._unleased[agent] = now
        with suppress(StoreBusy):
            await self._store.write(lambda tx: tx.emit("unleased_call", SYSTEM, agent))

    async def lines_after(self, agent: str, line_id: int, limit: int = 500) -> list[dict[str, Any]]:
        """Lines of an agent with an id above `line_id`, oldest first: {id, turn, n, at_ms, line}."""
        sql = (
            "SELECT id, turn_id AS turn, n, at_ms, line FROM turn_lines WHERE agent = ? AND id > ? ORDER BY id LIMIT ?"
        )
        return [dict(row) for row in await self._store.rows(sql, (agent, line_id, limit))]

    async def newest_lines(self, agent: str, limit: int = 200) -> list[dict[str, Any]]:
        """The newest lines of an agent, oldest first."""
        sql = """
            SELECT * FROM (
              SELECT id, turn_id AS turn, n, at_ms, line FROM turn_lines WHERE agent = ? ORDER BY id DESC LIMIT ?
            ) ORDER BY id
        """
        return [dict(row) for row in await self._store.rows(sql, (agent, limit))]

    async def lines_gone(self, agent: str) -> int:
        """The id of the last line of an agent that is not kept any more; 0 when all are."""
        row = await self._store.row("SELECT lines_gone FROM agents WHERE name = ?", (agent,))
        return int(row["lines_gone"]) if row else 0

    async def recent(self, agent: str, limit: int = 20) -> list[dict[str, Any]]:
        """The newest turns of an agent, newest first; `usage` as the program told it, None when it did not.

        cost_micro_usd       of its calls to the model, as the ledger has it; None when it made none
        estimated_micro_usd  of that, as long as its charges are kept
        unknown_calls        how many of its calls told no tokens, or not all: then `usage` lacks them
        """
        sql = f"""
            SELECT id, state, started_at_ms, ended_at_ms, error, reason, usage, lines, cost_micro_usd, errand,
                   errand_by, {UNSURE_OF_TURN}
            FROM turns t
            WHERE agent = ? ORDER BY id DESC LIMIT ?
        """
        rows = await self._store.rows(sql, (agent, limit))
        return [{**dict(row), "usage": json.loads(row["usage"]) if row["usage"] else None} for row in rows]

    async def prune(self, now_ms: int) -> None:
        """Drop lines that are too old at `now_ms`, and those over each agent's bound."""

        def drop_old(tx: Transaction) -> bool:
            old = "SELECT id FROM turn_lines INDEXED BY turn_lines_by_age WHERE at_ms < ? ORDER BY at_ms LIMIT ?"
            return _drop_lines(tx, f"id IN ({old})", now_ms - LINE_KEPT_S * 1000, DROPPED_AT_ONCE)

        def write(tx: Transaction) -> None:
            for row in tx.execute("SELECT name FROM agents").fetchall():
                self._bound(tx, row["name"])
                self._bound_bytes(tx, row["name"])

        while await self._store.insist(drop_old):
            pass  # in small transactions, between which others write
        await self._store.insist(write)

    def _bound(self, tx: Transaction, agent: str) -> None:
        """Keep the newest lines of an agent. Holds but for the lines since the last look."""
        sql = "SELECT id FROM turn_lines WHERE agent = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
        if over := tx.execute(sql, (agent, self._lines_per_agent)).fetchone():
            _drop_lines(tx, "agent = ? AND id <= ?", agent, over["id"])

    def _bound_bytes(self, tx: Transaction, agent: str) -> None:
        """Keep of an agent what came last and fits into its quota."""
        (size,) = tx.execute("SELECT line_bytes FROM agents WHERE name = ?", (agent,)).fetchone()
        over, last = size - self._line_quota_bytes, 0
        if over <= 0:
            return
        sql = f"SELECT id, {_BYTES} FROM turn_lines WHERE agent = ? ORDER BY id LIMIT ?"
        for last, line_bytes in tx.execute(sql, (agent, DROPPED_AT_ONCE)):  # noqa: B007 - the last one is needed
            over -= line_bytes
            if over <= 0:
                break
        _drop_lines(tx, "agent = ? AND id <= ?", agent, last)


_BYTES = "length(CAST(line AS BLOB))"


def _drop_lines(tx: Transaction, where: str, *values: object) -> bool:
    """Drop lines, and note where each agent's gap ends: who has seen less has to be told everything anew.

    Whether there were any.
    """
    sql = f"SELECT agent, max(id), sum({_BYTES}) FROM turn_lines WHERE {where} GROUP BY agent"
    gone = [tuple(row) for row in tx.execute(sql, values).fetchall()]
    if gone:
        tx.executemany(
            "UPDATE agents SET lines_gone = max(lines_gone, ?2), line_bytes = line_bytes - ?3 WHERE name = ?1", gone
        )
        tx.execute(f"DELETE FROM turn_lines WHERE {where}", values)
    return bool(gone)
