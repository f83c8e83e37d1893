"""A database with many old messages, made by our own schema: deliveries, events and the search's index filled too."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from hive_core.store.schema import migrate

WORDS = 5_000  # of which each body has twenty
AGE_S = 24 * 3600  # younger than what retention takes
_NUMBERS = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)"
_TEXT = "'message ' || n || ' ' || " + " || ' ' || ".join(["'w' || (abs(random()) % :words)"] * 20)


def fill(path: Path, count: int, recipients: int) -> None:
    """Write `count` acked messages of the operator to agent0, agent1 … into the database of a hive that is stopped."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        migrate(db, str(path))
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -1000000"):
            db.execute(f"PRAGMA {pragma}")
        given = {"count": count, "words": WORDS, "at": int((time.time() - AGE_S) * 1000), "recipients": recipients}
        db.execute("BEGIN")
        db.execute("DELETE FROM deliveries")
        db.execute("DELETE FROM messages")
        db.execute("DELETE FROM message_blocks")
        db.execute(
            f"{_NUMBERS} INSERT INTO messages (id, sender, body, body_bytes, cause, chain_id, hops, sent_at_ms)"
            f" SELECT n, 'operator', {_TEXT}, 200, 'operator', n, 0, :at + n / 1000 FROM numbers",
            given,
        )
        db.execute(
            "INSERT INTO deliveries (message_id, recipient, sender, state, attempts, sent_at_ms, available_at_ms,"
            " settled_at_ms) SELECT id, 'agent' || (id % :recipients), sender, 'acked', 1, sent_at_ms, sent_at_ms,"
            " sent_at_ms FROM messages",
            given,
        )
        db.execute(
            "INSERT INTO events (at_ms, kind, actor, agent, data) SELECT sent_at_ms, 'message_sent', sender,"
            " 'agent' || (id % :recipients), json_object('message', id) FROM messages",
            given,
        )
        db.execute("INSERT INTO message_words (message_words) VALUES ('rebuild')")
        db.execute("UPDATE search_mark SET message_id = :count", given)
        db.execute(
            "INSERT INTO message_blocks SELECT id / 1024, min(sent_at_ms), max(sent_at_ms) FROM messages GROUP BY 1"
        )
        db.execute("COMMIT")
        db.execute("PRAGMA journal_mode = WAL")
