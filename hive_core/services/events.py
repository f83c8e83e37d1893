"""The event log: what people did and what changed. Written by every service's transactions, read here."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncGenerator
from typing import Any

from hive_core.store.bus import EVENTS
from hive_core.store.door import Store

PAGE = 500


def event_from_row(row: sqlite3.Row) -> dict[str, Any]:
    return {
        "seq": row["seq"],
        "at_ms": row["at_ms"],
        "kind": row["kind"],
        "actor": row["actor"],
        "agent": row["agent"],
        "data": json.loads(row["data"]),
    }


async def timeline(store: Store) -> str:
    """Whose numbers the events have: another hive, and a copy that was restored, has another timeline."""
    row = await store.row("SELECT id FROM timeline")
    assert row is not None
    return str(row["id"])


async def events_after(store: Store, seq: int, limit: int = PAGE) -> list[dict[str, Any]]:
    """At most `limit` events with a number above `seq`, oldest first."""
    sql = "SELECT * FROM events WHERE seq > ? ORDER BY seq LIMIT ?"
    return [event_from_row(row) for row in await store.rows(sql, (seq, limit))]


async def newest_events(store: Store, limit: int) -> list[dict[str, Any]]:
    """The `limit` newest events, oldest first."""
    sql = "SELECT * FROM (SELECT * FROM events ORDER BY seq DESC LIMIT ?) ORDER BY seq"
    return [event_from_row(row) for row in await store.rows(sql, (limit,))]


async def first_kept(store: Store) -> int:
    """The number of the oldest event from which on all are kept."""
    row = await store.row("SELECT gone + 1 AS seq FROM events_mark")
    assert row is not None
    return int(row["seq"])


async def follow_events(store: Store, seq: int) -> AsyncGenerator[dict[str, Any], None]:
    """Every event after `seq`, each once and in order, for ever. Safe to leave at any point."""
    with store.bus.listen(EVENTS) as listener:
        while True:
            page = await events_after(store, seq)
            for event in page:
                yield event
                seq = event["seq"]
            if len(page) < PAGE:
                await listener.wait()
