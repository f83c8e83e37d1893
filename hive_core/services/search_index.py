"""The full-text index of all bodies: filled behind a mark, put together in small steps, made anew when it is damaged.

A send does nothing for the search. Messages are indexed behind a mark, in small batches, by a task of the daemon and
by every search that finds the mark behind; so the index may be late, and an answer that misses something says so.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import trio

from hive_core.store.bus import EVENTS
from hive_core.store.door import Store
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)

BATCH = 300  # messages, and bytes of bodies, that one transaction indexes: some 5 ms of the writer
BATCH_BYTES = 256 * 1024
RESTS = 4  # times as long as a batch took, between it and the next
GATHER_S = 2.0  # between a message and its indexing: one transaction for many
BUSY_REST_S = 30.0  # before it tries again on a disk that takes nothing
CATCH_UP_S = 2.0  # that a search spends on indexing before it answers
MERGE_PAGES = 64  # of 4 KB, some 2 ms of the writer
MERGE_STEPS = 16  # after each batch: more than one batch brings
BLOCK = 1024
# What sqlite raises at a damaged index: it may believe of a number that it reads there that it needs so much memory.
DAMAGE = (sqlite3.DatabaseError, MemoryError)
Text = tuple[int, str, str]  # a message's number, its whole body and its marks


class SearchIndex:
    """bodies_dir: where large bodies are kept as files, ab/SHA256 each."""

    def __init__(self, store: Store, bodies_dir: Path) -> None:
        self._store = store
        self._bodies = bodies_dir
        self._indexing = trio.Lock()

    async def serve(self) -> None:
        """Index what comes, until cancelled. A disk that takes nothing just now delays it."""
        with self._store.bus.listen(EVENTS) as listener:
            while True:
                try:
                    begun = trio.current_time()
                    while await self._index_some():
                        # What is sent comes before what may be searched: most of the writer's time is left alone.
                        await trio.sleep(RESTS * (trio.current_time() - begun))
                        begun = trio.current_time()
                except StoreBusy as exc:
                    log.warning("the search is late: %s", exc)
                    await trio.sleep(BUSY_REST_S)
                else:
                    await listener.wait()
                    await trio.sleep(GATHER_S)

    async def catch_up(self) -> int:
        """Index what is not yet, for a while; how many messages are left."""
        try:
            with trio.move_on_after(CATCH_UP_S):
                while await self._index_some():
                    pass
        except StoreBusy as exc:
            log.warning("the search is late: %s", exc)
        sql = "SELECT count(*) FROM messages WHERE id > (SELECT message_id FROM search_mark)"
        row = await self._store.row(sql)
        return int(row[0]) if row else 0

    async def _index_some(self) -> bool:
        """Index one batch; whether there may be more."""
        async with self._indexing:
            batch = await self._store.rows(_AHEAD, {"messages": BATCH, "bytes": BATCH_BYTES})
            if not batch:
                return False
            texts = await self.texts(batch)
            try:
                alone = await self._store.write(lambda tx: _index(tx, batch, texts))
                await self.merge()
            except DAMAGE as exc:
                await self.begin_anew(exc)
                return True
            return not alone or batch[-1]["id"] < batch[-1]["newest"]

    async def begin_anew(self, exc: sqlite3.DatabaseError | MemoryError) -> None:
        """Empty a damaged index, so that all is indexed again from the messages. Raises `exc` when it is whole.

        It says that it is damaged, cannot even be opened, fails at a constraint (its pieces do not fit each other), or
        asks for more memory than there is.
        """
        if not _is_of_index(exc):
            raise exc
        log.warning("the index of the search is damaged (%r) and is made anew from the messages", exc)
        await self._store.write(_empty_index)

    async def merge(self) -> None:
        """Let the index put its pieces together, a few pages at a time, as far as there is need."""
        for _ in range(MERGE_STEPS):
            if not await self._store.write(_merge_some):
                return

    async def texts(self, rows: Sequence[sqlite3.Row]) -> list[Text]:
        """What is indexed of rows of the view message_texts; one whose file cannot be read is left out."""
        whole = await self.whole_bodies(rows)
        return [
            (row["id"], whole[row["id"]] if row["body_sha256"] else row["body"], row["marks"])
            for row in rows
            if not row["body_sha256"] or row["id"] in whole
        ]

    async def whole_bodies(self, rows: Sequence[sqlite3.Row]) -> dict[int, str]:
        """Of messages the bodies that are kept as files; one that cannot be read is left out."""
        large = [row for row in rows if row["body_sha256"]]
        return await trio.to_thread.run_sync(self._read_all, large) if large else {}

    def _read_all(self, rows: Sequence[sqlite3.Row]) -> dict[int, str]:
        texts = {}
        for row in rows:
            digest = row["body_sha256"]
            try:
                texts[row["id"]] = (self._bodies / digest[:2] / digest).read_text("utf-8", "replace")
            except OSError as exc:
                log.warning("cannot read the body of message %d: %s", row["id"], exc)
        return texts


# What is behind the mark, as much of it as goes into one batch. A reader does all of this, and makes the marks.
_AHEAD = """
    SELECT t.id, t.body, t.body_sha256, t.marks, (SELECT message_id FROM search_mark) AS mark,
           (SELECT max(id) FROM messages) AS newest
    FROM (
        SELECT id, body_bytes, sum(body_bytes) OVER (ORDER BY id) AS bytes FROM (
            SELECT id, body_bytes FROM messages
            WHERE id > (SELECT message_id FROM search_mark) ORDER BY id LIMIT :messages
        )
    ) AS ahead CROSS JOIN message_texts t ON t.id = ahead.id
    WHERE ahead.bytes <= :bytes OR ahead.bytes = ahead.body_bytes
    ORDER BY t.id
"""
# One row at a time: where a statement of many finds the index damaged, sqlite takes back the whole transaction.
_ADD = "INSERT INTO message_words (rowid, body, marks) VALUES (?, ?, ?)"
_REMOVE = "INSERT INTO message_words (message_words, rowid, body, marks) VALUES ('delete', ?, ?, ?)"
_BLOCKS = f"""
    INSERT INTO message_blocks (block, first_at_ms, last_at_ms)
    SELECT id / {BLOCK}, min(sent_at_ms), max(sent_at_ms) FROM messages WHERE id > ? AND id <= ? GROUP BY 1
    ON CONFLICT (block) DO UPDATE SET
        first_at_ms = min(first_at_ms, excluded.first_at_ms), last_at_ms = max(last_at_ms, excluded.last_at_ms)
"""


def _is_of_index(exc: sqlite3.DatabaseError | MemoryError) -> bool:
    return (
        isinstance(exc, MemoryError)
        or exc.sqlite_errorcode in (sqlite3.SQLITE_CORRUPT_VTAB, sqlite3.SQLITE_CONSTRAINT)
        or str(exc).startswith("vtable constructor failed")
    )


def mark(kind: str, name: str) -> str:
    """The word of the index that says from (`by`) or to (`to`) whom a message is; as in the view message_texts."""
    return kind + name.encode().hex()


def _index(tx: Transaction, batch: Sequence[sqlite3.Row], texts: Sequence[Text]) -> bool:
    """Whether the mark was where it is expected; else somebody else was here, and nothing is done."""
    if tx.short:
        raise StoreBusy("no space is left on the disk of the hive's state_dir, and the last of it is for the mail")
    before, last = batch[0]["mark"], batch[-1]["id"]
    moved = "UPDATE search_mark SET message_id = ? WHERE message_id = ?"
    if tx.execute(moved, (last, before)).rowcount == 0:
        return False
    tx.executemany(_ADD, texts)
    _flush(tx)
    tx.execute(_BLOCKS, (before, last))
    return True


def remove(tx: Transaction, texts: Sequence[Text]) -> None:
    """Take messages out of the index, which has to be told the very words that it was given.

    Of a body whose file is lost it keeps them; no search shows a message that is gone.
    """
    tx.executemany(_REMOVE, texts)
    _flush(tx)


def _flush(tx: Transaction) -> None:
    """Let the index write now what it has gathered: a damaged one is to fail here, not at everybody's commit."""
    tx.execute("SAVEPOINT words")
    tx.execute("RELEASE words")


def _empty_index(tx: Transaction) -> None:
    # Without its first rows, here those of an empty one, or with bad ones, it does not even take the command.
    tx.execute("INSERT OR REPLACE INTO message_words_data (id, block) VALUES (1, x''), (10, x'00000000000000')")
    tx.execute("INSERT INTO message_words (message_words) VALUES ('delete-all')")
    tx.execute("UPDATE search_mark SET message_id = 0")
    tx.wake(EVENTS)  # whoever indexes begins again


def _merge_some(tx: Transaction) -> bool:
    """Whether there was something to merge. On a full disk it waits: what is put together is written anew first."""
    if tx.short:
        return False
    before = tx.execute("SELECT total_changes()").fetchone()[0]
    tx.execute("INSERT INTO message_words (message_words, rank) VALUES ('merge', ?)", (MERGE_PAGES,))
    after = tx.execute("SELECT total_changes()").fetchone()[0]
    return bool(after - before >= 2)  # the command itself counts as one
