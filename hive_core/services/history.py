"""The forgetting of history: events, ended turns, charges, settled reminders, removed schedules, and what was told of
and written on forges. Questions stay.

What a message that is kept can tell of its life stays with it. Each kind goes in small transactions, oldest first.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hive_core.protocol.words import SYSTEM
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

STEP = 200  # rows that one transaction looks at or removes
TURNS_AT_ONCE = 10_000  # that one look finds: it reads the causes of all messages


async def forget_history(store: Store, cutoff: int) -> None:
    """Remove what is older than `cutoff`, in ms since 1970, and say in one event how much of what went."""
    forgotten = {
        "events": await _in_steps(store, lambda tx: _forget_events(tx, cutoff)),
        "turns": await _forget_turns(store, cutoff),
        "charges": await _in_steps(store, lambda tx: tx.execute(_CHARGES, (cutoff, STEP)).rowcount or None),
        "reminders": await _in_steps(store, lambda tx: tx.execute(_REMINDERS, (cutoff, STEP)).rowcount or None),
        "forge_notices": await _in_steps(store, lambda tx: tx.execute(_FORGE_NOTICES, (cutoff, STEP)).rowcount or None),
        "forge_writes": await _in_steps(store, lambda tx: tx.execute(_FORGE_WRITES, (cutoff, STEP)).rowcount or None),
        "schedules": await _in_steps(store, lambda tx: _forget_schedule(tx, cutoff)),
    }
    gone: dict[str, Any] = {kind: count for kind, count in forgotten.items() if count}
    if gone:
        await store.write(lambda tx: tx.emit("history_forgotten", SYSTEM, **gone))


async def _in_steps(store: Store, step: Callable[[Transaction], int | None]) -> int:
    """Run a step until it finds nothing more; how much they removed."""
    forgotten = 0
    while (some := await store.write(step)) is not None:
        forgotten += some
    return forgotten


def _forget_events(tx: Transaction, cutoff: int) -> int | None:
    """Remove some of the oldest events, but those about a message that is kept, and never the newest.

    The mark moves behind them: who has seen less has to be told everything anew. An event that a wrong clock dated
    ahead goes with its neighbours.
    """
    (gone,) = tx.execute("SELECT gone FROM events_mark").fetchone()
    sql = "SELECT seq, at_ms FROM events WHERE seq > ? AND seq < (SELECT max(seq) FROM events) ORDER BY seq LIMIT ?"
    found = tx.execute(sql, (gone, STEP)).fetchall()
    old = [row["seq"] for row in found if row["at_ms"] < cutoff]
    if not old and found and _old_behind(tx, found[-1]["seq"], cutoff):
        old = [row["seq"] for row in found]
    if not old:
        return None
    tx.execute("UPDATE events_mark SET gone = ?", (old[-1],))
    return tx.execute(_EVENTS, (gone, old[-1])).rowcount


def _old_behind(tx: Transaction, seq: int, cutoff: int) -> bool:
    """Whether events that are old come later, so that those up to `seq` have a wrong time: by looks ever further on."""
    sql = "SELECT at_ms FROM events WHERE seq >= ? AND seq < (SELECT max(seq) FROM events) ORDER BY seq LIMIT 1"
    ahead = STEP
    while (row := tx.execute(sql, (seq + ahead,)).fetchone()) is not None:
        if row["at_ms"] < cutoff:
            return True
        ahead *= 2
    return False


def forget_events_of(tx: Transaction, messages: list[tuple[int]]) -> None:
    """Messages go: what was kept for them alone of events that are gone goes, too."""
    sql = "DELETE FROM events WHERE message_id = ? AND seq <= (SELECT gone FROM events_mark)"
    tx.executemany(sql, messages)


async def _forget_turns(store: Store, cutoff: int) -> int:
    """Remove ended turns that no kept message, delivery or line refers to, and that are not their agent's last."""
    forgotten = 0
    while old := [row["id"] for row in await store.rows(_TURNS, {"cutoff": cutoff, "limit": TURNS_AT_ONCE})]:
        for some in (json.dumps(old[at : at + STEP]) for at in range(0, len(old), STEP)):
            forgotten += await store.write(lambda tx, some=some: tx.execute(_THESE_TURNS, (some,)).rowcount)  # type: ignore[misc]
    return forgotten


def _forget_schedule(tx: Transaction, cutoff: int) -> int | None:
    """Remove one schedule, with its firings, that was removed long ago."""
    sql = "SELECT id FROM schedules WHERE state = 'removed' AND moved_at_ms < ? LIMIT 1"
    if (row := tx.execute(sql, (cutoff,)).fetchone()) is None:
        return None
    tx.execute("DELETE FROM schedule_firings WHERE schedule_id = ?", (row["id"],))
    return tx.execute("DELETE FROM schedules WHERE id = ?", (row["id"],)).rowcount


_EVENTS = """
    DELETE FROM events WHERE seq > ? AND seq <= ?
    AND (message_id IS NULL OR NOT EXISTS (SELECT 1 FROM messages WHERE id = events.message_id))
"""
# What an agent sends behind its turn's end belongs to its last turn.
_TURNS = """
    SELECT id FROM turns t WHERE state != 'running' AND ended_at_ms < :cutoff
    AND id < (SELECT max(id) FROM turns WHERE agent = t.agent)
    AND NOT EXISTS (SELECT 1 FROM leases WHERE turn_id = t.id)
    AND NOT EXISTS (SELECT 1 FROM turn_lines WHERE turn_id = t.id)
    AND id NOT IN (SELECT cause_id FROM messages WHERE cause = 'turn' AND cause_id IS NOT NULL)
    ORDER BY id LIMIT :limit
"""
_THESE_TURNS = "DELETE FROM turns WHERE id IN (SELECT value FROM json_each(?))"
# Their sums stay in spend_days.
_CHARGES = """
    DELETE FROM charges WHERE id IN (
        SELECT id FROM charges INDEXED BY charges_by_time WHERE at_ms < ? ORDER BY at_ms LIMIT ?
    )
"""
_REMINDERS = "DELETE FROM reminders WHERE id IN (SELECT id FROM reminders WHERE settled_at_ms < ? LIMIT ?)"
_FORGE_NOTICES = """
    DELETE FROM forge_notices WHERE id IN (
        SELECT id FROM forge_notices n WHERE at_ms < ?
        AND NOT EXISTS (SELECT 1 FROM messages WHERE id = n.message_id) LIMIT ?
    )
"""
_FORGE_WRITES = "DELETE FROM forge_writes WHERE id IN (SELECT id FROM forge_writes WHERE at_ms < ? LIMIT ?)"
