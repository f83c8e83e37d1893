"""The forgetting of old messages, and with them of the history: what is settled goes when its time is over.

What went does not come back, and a wall clock may be wrong. So ages are read on a clock of the hive's own, which is
kept in the database and follows the wall clock slowly where that leaps.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence

from hive_core.limits import Limits
from hive_core.protocol.words import SYSTEM
from hive_core.services.history import forget_events_of, forget_history
from hive_core.services.search_index import BLOCK, DAMAGE, SearchIndex, Text, remove
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)

FORGET_BATCH = 100
DAY_MS = 24 * 3600 * 1000
# Slow enough that whoever set the clock wrong sees it in time, fast enough that a hive which was off for a month is
# through in two days.
FOLLOW_MOST_MS = DAY_MS  # in an hour
FOLLOW_EVERY_MS = 59 * 60 * 1000  # the daemon calls every hour, and whenever it starts


class Retention:
    def __init__(self, store: Store, limits: Limits, index: SearchIndex) -> None:
        self._store = store
        self._limits = limits
        self._index = index
        self._held_back = False

    async def forget_old(self) -> int:
        """Remove messages whose every delivery was acked or dropped `kept_s` ago; how many went.

        A wall clock that leaps ahead, or went on while the hive was off, is followed by a day an hour at most, but at
        once by a hive that is new by any clock.

        What is held, queued, leased or dead stays, and so does what put a question or answered one; a question that
        reached nobody goes with its message. What is left of the history without them goes by its own age.
        """
        now_ms = await self.now_ms()
        cutoff = now_ms - int(self._limits.kept_s * 1000)
        forgotten = 0
        for row in await self._store.rows("SELECT block FROM message_blocks WHERE first_at_ms < ?", (cutoff,)):
            forgotten += await self._forget_block(row["block"], cutoff)
        await forget_history(self._store, now_ms - int(self._limits.history_kept_s * 1000))
        return forgotten

    async def now_ms(self) -> int:
        """The instant from which the ages of what may be forgotten count, in ms since 1970.

        While it is far behind the wall clock the log says so, once.
        """
        now_ms, behind_ms = await self._store.write(_follow_the_wall_clock)
        if behind_ms > DAY_MS and not self._held_back:
            log.warning(
                "what is old is forgotten later: the clock leapt ahead (it was set, or the hive was off), and "
                "forgetting, %.1f days behind it, follows by a day an hour; if the clock is wrong, set it right",
                behind_ms / DAY_MS,
            )
        self._held_back = behind_ms > DAY_MS
        return now_ms

    async def _forget_block(self, block: int, cutoff: int) -> int:
        forgotten = 0
        given = {"first": block * BLOCK, "last": block * BLOCK + BLOCK - 1, "cutoff": cutoff, "limit": FORGET_BATCH}
        while old := await self._store.rows(_OLD, given):
            texts = await self._index.texts(old)
            try:
                await self._index.merge()
                forgotten += await self._store.write(lambda tx, old=old, texts=texts: _forget(tx, old, texts))  # type: ignore[misc]
            except DAMAGE as exc:
                await self._index.begin_anew(exc)  # and they go when they are indexed again
        emptied = """
            DELETE FROM message_blocks WHERE block = :block AND NOT EXISTS (
                SELECT 1 FROM messages WHERE id BETWEEN :block * 1024 AND :block * 1024 + 1023
            ) AND (block + 1) * 1024 <= (SELECT message_id FROM search_mark)
        """
        if forgotten:
            await self._store.write(lambda tx: tx.execute(emptied, {"block": block}).rowcount)
        return forgotten


def _follow_the_wall_clock(tx: Transaction) -> tuple[int, int]:
    """Move the clock of retention; what it shows now, and how far it is behind. It is never ahead of the wall clock."""
    row = tx.execute("SELECT shows_ms, wall_ms FROM retention_clock").fetchone() or (tx.now_ms, tx.now_ms)
    shows_ms, wall_ms = row
    if abs(tx.now_ms - wall_ms) >= FOLLOW_EVERY_MS:
        if tx.now_ms - shows_ms > FOLLOW_MOST_MS and _all_is_new(tx):
            shows_ms = tx.now_ms
        shows_ms += max(-FOLLOW_MOST_MS, min(FOLLOW_MOST_MS, tx.now_ms - shows_ms))
        wall_ms = tx.now_ms
    tx.execute("INSERT OR REPLACE INTO retention_clock (one, shows_ms, wall_ms) VALUES (1, ?, ?)", (shows_ms, wall_ms))
    return min(shows_ms, tx.now_ms), tx.now_ms - shows_ms


def _all_is_new(tx: Transaction) -> bool:
    """Whether the hive has no mail, turn or call of more than a day ago: so where its first start saw 1970.

    Then a wall clock that is right takes nothing, and neither does one that is wrong. The first events of such a hive,
    of how it was made, may go.
    """
    return not tx.execute(_SOME_OLD, {"day_ago": tx.now_ms - DAY_MS}).fetchone()[0]


_SOME_OLD = """
    SELECT EXISTS (SELECT 1 FROM message_blocks WHERE first_at_ms < :day_ago)
    OR EXISTS (SELECT 1 FROM messages WHERE id > (SELECT message_id FROM search_mark) AND sent_at_ms < :day_ago)
    OR EXISTS (SELECT 1 FROM turns WHERE started_at_ms < :day_ago)
    OR EXISTS (SELECT 1 FROM tool_calls WHERE at_ms < :day_ago)
"""
_OLD = """
    SELECT id, body, body_sha256, marks FROM message_texts m
    WHERE m.id BETWEEN :first AND :last AND m.id <= (SELECT message_id FROM search_mark)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.message_id = m.id
        AND (d.state NOT IN ('acked', 'dropped') OR coalesce(d.settled_at_ms, d.sent_at_ms) >= :cutoff)
    )
    AND NOT EXISTS (
        SELECT 1 FROM questions q WHERE q.message_id = m.id AND (q.state = 'open' OR q.answer_id IS NOT NULL OR EXISTS (
            SELECT 1 FROM deliveries d WHERE d.message_id = m.id AND (d.state != 'dropped' OR d.attempts > 0)
        ))
    )
    AND NOT EXISTS (SELECT 1 FROM questions WHERE answer_id = m.id)
    ORDER BY m.id LIMIT :limit
"""


def _forget(tx: Transaction, old: Sequence[sqlite3.Row], texts: Sequence[Text]) -> int:
    """Remove these messages and all that hangs on them. What was acked or dropped never changes any more."""
    ids = [(row["id"],) for row in old]
    remove(tx, texts)
    tx.executemany("DELETE FROM leases WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM deliveries WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM questions WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM attachments WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM messages WHERE id = ?", ids)
    forget_events_of(tx, ids)
    tx.emit("messages_forgotten", SYSTEM, count=len(ids), first=ids[0][0], last=ids[-1][0])
    return len(ids)
