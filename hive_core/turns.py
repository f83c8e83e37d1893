"""The stream of a turn: what the agent's program printed, kept with bounds per turn, per agent and by age."""

from __future__ import annotations

import json
from typing import Any

from hive_core.protocol.words import AgentName
from hive_core.store.bus import stream
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

LINES_PER_TURN = 2_000
LINES_PER_AGENT = 20_000
LINE_KEPT_S = 14 * 24 * 3600


class Turns:
    def __init__(
        self, store: Store, *, lines_per_turn: int = LINES_PER_TURN, lines_per_agent: int = LINES_PER_AGENT
    ) -> None:
        self._store = store
        self._lines_per_turn = lines_per_turn
        self._lines_per_agent = lines_per_agent

    async def add_lines(self, agent: AgentName, turn_id: int, first: int, lines: list[str]) -> int:
        """Keep lines number `first` and up of a turn; those already there are left alone.

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
            tx.executemany("INSERT INTO turn_lines (agent, turn_id, n, at_ms, line) VALUES (?, ?, ?, ?, ?)", rows)
            tx.execute("UPDATE turns SET lines = ? WHERE id = ?", (arrived, turn_id))
            if arrived > self._lines_per_turn:
                tx.execute(
                    "DELETE FROM turn_lines WHERE turn_id = ? AND n < ?", (turn_id, arrived - self._lines_per_turn)
                )
            tx.wake(stream(agent))
            return arrived

        return await self._store.write(write)

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

    async def recent(self, agent: str, limit: int = 20) -> list[dict[str, Any]]:
        """The newest turns of an agent, newest first; `usage` as the program told it, None when it did not."""
        sql = """
            SELECT id, state, started_at_ms, ended_at_ms, error, usage, lines FROM turns
            WHERE agent = ? ORDER BY id DESC LIMIT ?
        """
        rows = await self._store.rows(sql, (agent, limit))
        return [{**dict(row), "usage": json.loads(row["usage"]) if row["usage"] else None} for row in rows]

    async def prune(self) -> None:
        """Drop lines that are too old, and those over each agent's bound."""

        def write(tx: Transaction) -> None:
            tx.execute("DELETE FROM turn_lines WHERE at_ms < ?", (tx.now_ms - LINE_KEPT_S * 1000,))
            for row in tx.execute("SELECT name FROM agents").fetchall():
                tx.execute(
                    "DELETE FROM turn_lines WHERE agent = :agent AND id <= coalesce(("
                    "SELECT id FROM turn_lines WHERE agent = :agent ORDER BY id DESC LIMIT 1 OFFSET :bound), 0)",
                    {"agent": row["name"], "bound": self._lines_per_agent},
                )

        await self._store.write(write)
