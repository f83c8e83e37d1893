"""What was said: search over all bodies, threads, and the forgetting of what is old.

A send does nothing for the search. Messages are indexed behind a mark, in small batches, by a task of the daemon and
by every search that finds the mark behind; so the index may be late, and an answer that misses something says so.
"""

from __future__ import annotations

import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from hive_core.history import forget_events_of, forget_history
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName, parse_id, parse_instant, parse_recipient, shown
from hive_core.store.bus import EVENTS
from hive_core.store.door import Store
from hive_core.store.schema import StoreBusy
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
T = TypeVar("T")

SEARCH_LIMIT = 50  # messages in one answer
THREAD_LIMIT = 200
TEXT_LIMIT_BYTES = 1_000
BATCH = 100  # messages, and bytes of bodies, that one transaction indexes: some 10 ms of the writer
BATCH_BYTES = 256 * 1024
RESTS = 4  # times as long as a batch took, between it and the next
GATHER_S = 2.0  # between a message and its indexing: one transaction for many
BUSY_REST_S = 30.0  # before it tries again on a disk that takes nothing
CATCH_UP_S = 2.0  # that a search spends on indexing before it answers
FORGET_BATCH = 100
MERGE_PAGES = 64  # of 4 KB, some 2 ms of the writer
MERGE_STEPS = 16  # after each batch: more than one batch brings
BLOCK = 1024
SNIPPET_WORDS = 24
SNIPPET_CHARACTERS = 160


@dataclass(frozen=True, slots=True)
class Query:
    """What is searched for. Every word of `text` has to be there; words in double quotes stand together."""

    text: str = ""  # empty: every message that the filters let through
    sender: AgentName | None = None
    thread: int | None = None  # the number of any message of it
    after_at_ms: int | None = None  # sent at this instant or later
    before_at_ms: int | None = None  # sent before this instant
    limit: int = 20
    cursor: int | None = None  # `next_cursor` of the answer before


def parse_query(args: Mapping[str, Any]) -> Query:
    """What a door was asked for: the fields of Query, with `after` and `before` as text. Raises Refusal("usage")."""
    limit = args.get("limit", 20)
    if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= SEARCH_LIMIT:
        raise Refusal("usage", f"cannot use {shown(limit)} as the limit: give 1 to {SEARCH_LIMIT}")

    def given(key: str, parse: Callable[[object, str], T], what: str) -> T | None:
        return None if args.get(key) is None else parse(args[key], what)

    return Query(
        text=parse_words(args.get("text") or ""),
        sender=given("sender", lambda raw, _: parse_sender(raw), "sender"),
        thread=given("thread", parse_id, "a message"),
        after_at_ms=given("after", parse_instant, "`after`"),
        before_at_ms=given("before", parse_instant, "`before`"),
        limit=limit,
        cursor=given("cursor", parse_id, "a message"),
    )


def parse_sender(raw: object) -> AgentName:
    return SYSTEM if raw == SYSTEM else parse_recipient(raw)


def parse_words(raw: object) -> str:
    """The text of a search: anything at all, up to a limit. Raises Refusal("usage")."""
    if not isinstance(raw, str):
        raise Refusal("usage", "cannot search: the text must be a string")
    text = raw.encode("utf-8", "replace").decode().replace("\0", " ")
    if (size := len(text.encode())) > TEXT_LIMIT_BYTES:
        raise Refusal(
            "usage",
            f"cannot search: the text has {size:,} bytes and the limit is {TEXT_LIMIT_BYTES:,}; use fewer words",
        )
    return text.strip()


class Archive:
    """bodies_dir: where large bodies are kept as files, ab/SHA256 each."""

    def __init__(self, store: Store, limits: Limits, bodies_dir: Path) -> None:
        self._store = store
        self._limits = limits
        self._bodies = bodies_dir
        self._indexing = trio.Lock()

    # -- search -------------------------------------------------------------------------------------------------------

    async def search(self, query: Query, reader: AgentName | None = None) -> dict[str, Any]:
        """The newest messages that fit, newest first: `{"messages", "next_cursor"}`, both for one page.

        An agent as `reader` finds only what it sent and what was handed to one of its turns; None finds everything.
        `unindexed` counts messages that the index had not come to, where there are any.
        """
        behind = await self._catch_up()
        first, last = await self._stretch(query)
        root = None if query.thread is None else await self._root(query.thread)
        match = _match(query, root, reader)
        given = {
            "match": match,
            "first": first,
            "last": last,
            "sender": query.sender,
            "root": root,
            "reader": reader,
            "after_at": query.after_at_ms,
            "before_at": query.before_at_ms,
            "limit": query.limit + 1,
        }
        sql = _FOUND if match else _NEWEST
        try:
            rows = await self._store.rows(sql, given)
        except sqlite3.DatabaseError as exc:
            await self._begin_index_anew(exc)
            behind = await self._catch_up()
            rows = await self._store.rows(sql, given)
        page = rows[: query.limit]
        texts = await self._texts(row for row in page if row["body_sha256"])
        return {
            "messages": [_found(row, texts.get(row["id"]), query.text) for row in page],
            "next_cursor": page[-1]["id"] if len(rows) > query.limit else None,
            **({"unindexed": behind} if behind else {}),
        }

    async def _stretch(self, query: Query) -> tuple[int, int]:
        """The first and the last number that a message of the query can have."""
        sql = """
            SELECT coalesce(min(block) * 1024, 0) AS first, coalesce(max(block) * 1024 + 1023, -1) AS last
            FROM message_blocks
            WHERE (:after_at IS NULL OR last_at_ms >= :after_at) AND (:before_at IS NULL OR first_at_ms < :before_at)
        """
        row = await self._store.row(sql, {"after_at": query.after_at_ms, "before_at": query.before_at_ms})
        assert row is not None
        return row["first"], row["last"] if query.cursor is None else min(row["last"], query.cursor - 1)

    async def _root(self, message_id: int) -> int:
        row = await self._store.row("SELECT coalesce(thread_id, id) FROM messages WHERE id = ?", (message_id,))
        return message_id if row is None else int(row[0])  # the first of a thread may be gone before the others

    # -- the index ----------------------------------------------------------------------------------------------------

    async def serve_index(self) -> None:
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

    async def _catch_up(self) -> int:
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
            row = await self._store.row("SELECT message_id FROM search_mark")
            assert row is not None
            mark = int(row[0])
            found = await self._store.rows(f"{_KEPT} WHERE m.id > ? ORDER BY m.id LIMIT ?", (mark, BATCH))
            if not found:
                return False
            batch = _within(found, BATCH_BYTES)
            texts = await self._texts(batch)
            try:
                await self._store.write(lambda tx: _index(tx, mark, batch, texts))
                await self._merge()
            except sqlite3.DatabaseError as exc:
                await self._begin_index_anew(exc)
            return True

    async def _begin_index_anew(self, exc: sqlite3.DatabaseError) -> None:
        """Empty a damaged index, so that all is indexed again from the messages. Raises `exc` when it is whole.

        It says that it is damaged, cannot even be opened, or fails at a constraint: its pieces do not fit each other.
        """
        own = (sqlite3.SQLITE_CORRUPT_VTAB, sqlite3.SQLITE_CONSTRAINT)
        if exc.sqlite_errorcode not in own and not str(exc).startswith("vtable constructor failed"):
            raise exc
        log.warning("the index of the search is damaged (%s) and is made anew from the messages", exc)
        await self._store.write(_empty_index)

    async def _merge(self) -> None:
        """Let the index put its pieces together, a few pages at a time, as far as there is need."""
        for _ in range(MERGE_STEPS):
            if not await self._store.write(_merge_some):
                return

    async def _texts(self, rows: Iterable[sqlite3.Row]) -> dict[int, str]:
        """The whole body of each message; one whose file cannot be read is left out."""
        rows = list(rows)
        texts = {row["id"]: row["body"] for row in rows if not row["body_sha256"]}
        if large := [row for row in rows if row["body_sha256"]]:
            texts.update(await trio.to_thread.run_sync(self._read_all, large))
        return texts

    def _read_all(self, rows: Sequence[sqlite3.Row]) -> dict[int, str]:
        texts = {}
        for row in rows:
            digest = row["body_sha256"]
            try:
                texts[row["id"]] = (self._bodies / digest[:2] / digest).read_text("utf-8", "replace")
            except OSError as exc:
                log.warning("cannot read the body of message %d: %s", row["id"], exc)
        return texts

    # -- threads ------------------------------------------------------------------------------------------------------

    async def thread(self, message_id: int, after: int = 0, limit: int = THREAD_LIMIT) -> dict[str, Any]:
        """The thread that a message belongs to, oldest first: `{"thread", "messages", "next_after"}`.

        Each message has its `recipients` with their states. Raises Refusal("not_found") when nothing of it is kept.
        """
        root = await self._root(message_id)
        sql = """
            SELECT m.id, m.sender, m.body, m.body_bytes, m.in_reply_to, m.cause, m.cause_id, m.sent_at_ms,
                   (SELECT json_group_array(json_object('recipient', recipient, 'state', state, 'attempts', attempts,
                                                        'held', held, 'note', note))
                    FROM deliveries WHERE message_id = m.id) AS recipients
            FROM messages m
            WHERE m.id IN (SELECT :root UNION ALL SELECT id FROM messages WHERE thread_id = :root) AND m.id > :after
            ORDER BY m.id LIMIT :limit
        """
        rows = await self._store.rows(sql, {"root": root, "after": after, "limit": limit + 1})
        if not rows and not after:
            raise Refusal("not_found", f"cannot find message {message_id}: {_gone(self._limits)}")
        page = [{**dict(row), "recipients": json.loads(row["recipients"])} for row in rows[:limit]]
        return {"thread": root, "messages": page, "next_after": page[-1]["id"] if len(rows) > limit else None}

    # -- forgetting ---------------------------------------------------------------------------------------------------

    async def forget_old(self) -> int:
        """Remove messages whose every delivery was acked or dropped `kept_s` ago; how many went.

        What is held, queued, leased or dead stays, and so does what an open question was put with. What is left of
        the history without them goes by its own age.
        """
        now_ms: int = await self._store.write(lambda tx: tx.now_ms)
        cutoff = now_ms - int(self._limits.kept_s * 1000)
        forgotten = 0
        for row in await self._store.rows("SELECT block FROM message_blocks WHERE first_at_ms < ?", (cutoff,)):
            forgotten += await self._forget_block(row["block"], cutoff)
        await forget_history(self._store, self._limits)
        return forgotten

    async def _forget_block(self, block: int, cutoff: int) -> int:
        forgotten = 0
        given = {"first": block * BLOCK, "last": block * BLOCK + BLOCK - 1, "cutoff": cutoff, "limit": FORGET_BATCH}
        while old := await self._store.rows(_OLD, given):
            texts = await self._texts(old)
            try:
                await self._merge()
                forgotten += await self._store.write(lambda tx, old=old, texts=texts: _forget(tx, old, texts))  # type: ignore[misc]
            except sqlite3.DatabaseError as exc:
                await self._begin_index_anew(exc)  # and they go when they are indexed again
        emptied = """
            DELETE FROM message_blocks WHERE block = :block AND NOT EXISTS (
                SELECT 1 FROM messages WHERE id BETWEEN :block * 1024 AND :block * 1024 + 1023
            ) AND (block + 1) * 1024 <= (SELECT message_id FROM search_mark)
        """
        if forgotten:
            await self._store.write(lambda tx: tx.execute(emptied, {"block": block}).rowcount)
        return forgotten


def _gone(limits: Limits) -> str:
    days = limits.kept_s / 86_400
    kept = f"{days:g} {'day' if days == 1 else 'days'} (kept_s)"
    return f"there was none, or it is gone: what is acked is kept for {kept}"


_KEPT = """
    SELECT m.id, m.sender, m.body, m.body_bytes, m.body_sha256, coalesce(m.thread_id, m.id) AS root, m.sent_at_ms,
           (SELECT json_group_array(recipient) FROM deliveries WHERE message_id = m.id) AS recipients
    FROM messages m
"""
_OLD = f"""
    {_KEPT}
    WHERE m.id BETWEEN :first AND :last AND m.id <= (SELECT message_id FROM search_mark)
    AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.message_id = m.id
        AND (d.state NOT IN ('acked', 'dropped') OR coalesce(d.settled_at_ms, d.sent_at_ms) >= :cutoff)
    )
    AND NOT EXISTS (SELECT 1 FROM questions q WHERE q.message_id = m.id AND q.state = 'open')
    ORDER BY m.id LIMIT :limit
"""
# An agent has not received what no turn of its was handed yet: what is held, above all, must not reach it this way.
_PASSES = """
    m.id BETWEEN :first AND :last AND (:sender IS NULL OR m.sender = :sender)
    AND (:root IS NULL OR coalesce(m.thread_id, m.id) = :root)
    AND (:after_at IS NULL OR m.sent_at_ms >= :after_at) AND (:before_at IS NULL OR m.sent_at_ms < :before_at)
    AND (:reader IS NULL OR m.sender = :reader OR EXISTS (
        SELECT 1 FROM deliveries WHERE message_id = m.id AND recipient = :reader AND attempts > 0
    ))
"""
_FIELDS = """
    m.id, m.sender, coalesce(m.thread_id, m.id) AS thread, m.sent_at_ms, m.body, m.body_bytes, m.body_sha256,
    (SELECT json_group_array(recipient) FROM deliveries WHERE message_id = m.id) AS recipients
"""
# Of a large body the row holds the beginning alone, and a snippet of it would read past the end.
_FOUND = f"""
    SELECT {_FIELDS},
           CASE WHEN m.body_sha256 IS NULL THEN snippet(message_words, 0, '', '', '…', {SNIPPET_WORDS}) END AS snippet
    FROM message_words JOIN messages m ON m.id = message_words.rowid
    WHERE message_words MATCH :match AND message_words.rowid BETWEEN :first AND :last AND {_PASSES}
    ORDER BY message_words.rowid DESC LIMIT :limit
"""
_NEWEST = f"""
    SELECT {_FIELDS}, NULL AS snippet FROM messages m WHERE :match IS NULL AND {_PASSES} ORDER BY m.id DESC LIMIT :limit
"""


async def newest_of_agent(store: Store, agent: str, before: int, limit: int) -> list[int]:
    """The numbers of the newest messages from or to an agent, of those below `before`; newest first.

    The index of words knows whose a message is; what is behind its mark is looked at one by one.
    """
    given = {"agent": agent, "whose": _whose(agent), "before": before, "limit": limit}
    try:
        rows = await store.rows(_NEWEST_OF_AGENT, given)
    except sqlite3.DatabaseError as exc:
        log.warning("the index of the search is damaged (%s): messages are looked at one by one until it is whole", exc)
        rows = await store.rows(f"{_OF_AGENT} ORDER BY id DESC LIMIT :limit", given)
    return [row["id"] for row in rows]


_OF_AGENT = """
    SELECT id FROM messages m WHERE id < :before
    AND (sender = :agent OR EXISTS (SELECT 1 FROM deliveries WHERE message_id = m.id AND recipient = :agent))
"""
_NEWEST_OF_AGENT = f"""
    {_OF_AGENT} AND id > (SELECT message_id FROM search_mark)
    UNION ALL SELECT id FROM (
        SELECT rowid AS id FROM message_words WHERE message_words MATCH :whose AND rowid < :before
        ORDER BY rowid DESC LIMIT :limit
    )
    ORDER BY id DESC LIMIT :limit
"""


def _whose(agent: str) -> str:
    return f"{{marks}} : ({_mark('by', agent)} OR {_mark('to', agent)})"


def _match(query: Query, root: int | None, reader: str | None) -> str | None:
    """The expression for the index; None when nothing is asked of it. The marks only narrow: the rows decide."""
    parts = []
    if words := _words(query.text):
        parts.append(f"{{body}} : ({' '.join(_quoted(word) for word in words)})")
    if query.sender is not None:
        parts.append(f"{{marks}} : {_mark('by', query.sender)}")
    if root is not None:
        parts.append(f"{{marks}} : thread{root}")
    if reader is not None:
        parts.append(_whose(reader))
    return " AND ".join(parts) or None


def _words(text: str) -> list[str]:
    """Words, and what stands between double quotes as one."""
    return [phrase or word for phrase, word in re.findall(r'"([^"]*)"?|([^\s"]+)', text) if phrase or word]


def _quoted(word: str) -> str:
    """A word that means nothing to the index but itself; one that ends in a star is the beginning of a word."""
    star = "*" if word.endswith("*") and any(character.isalnum() for character in word) else ""
    return '"' + word.replace('"', " ") + '"' + star


def _mark(kind: str, name: str) -> str:
    return kind + name.encode().hex()  # a name has dashes, at which the index would cut


def _marks(row: sqlite3.Row) -> str:
    names = sorted(json.loads(row["recipients"]))
    return " ".join([_mark("by", row["sender"]), *(_mark("to", name) for name in names), f"thread{row['root']}"])


def _within(rows: list[sqlite3.Row], limit_bytes: int) -> list[sqlite3.Row]:
    size = 0
    for count, row in enumerate(rows):
        size += row["body_bytes"]
        if count and size > limit_bytes:
            return rows[:count]
    return rows


def _index(tx: Transaction, mark: int, batch: Sequence[sqlite3.Row], texts: dict[int, str]) -> None:
    if tx.short:
        raise StoreBusy("no space is left on the disk of the hive's state_dir, and the last of it is for the mail")
    moved = "UPDATE search_mark SET message_id = ? WHERE message_id = ?"
    if tx.execute(moved, (batch[-1]["id"], mark)).rowcount == 0:
        return  # somebody else was here
    tx.executemany(
        "INSERT INTO message_words (rowid, body, marks) VALUES (?, ?, ?)",
        [(row["id"], texts[row["id"]], _marks(row)) for row in batch if row["id"] in texts],
    )
    _flush(tx)
    tx.executemany(
        """
        INSERT INTO message_blocks (block, first_at_ms, last_at_ms) VALUES (?1, ?2, ?2) ON CONFLICT (block)
        DO UPDATE SET first_at_ms = min(first_at_ms, ?2), last_at_ms = max(last_at_ms, ?2)
        """,
        [(row["id"] // BLOCK, row["sent_at_ms"]) for row in batch],
    )


def _flush(tx: Transaction) -> None:
    """Let the index write now what it has gathered: a damaged one is to fail here, not at everybody's commit."""
    tx.execute("SAVEPOINT words")
    tx.execute("RELEASE words")


def _empty_index(tx: Transaction) -> None:
    # Without its first rows, which are those of an empty one, it does not even take the command.
    tx.execute("INSERT OR IGNORE INTO message_words_data (id, block) VALUES (1, x''), (10, x'00000000000000')")
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


def _forget(tx: Transaction, old: Sequence[sqlite3.Row], texts: dict[int, str]) -> int:
    """Remove these messages and all that hangs on them. What was acked or dropped never changes any more."""
    ids = [(row["id"],) for row in old]
    # The index has to be told the very words it was given. Of a body whose file is lost it keeps them; no search shows
    # a message that is gone.
    tx.executemany(
        "INSERT INTO message_words (message_words, rowid, body, marks) VALUES ('delete', ?, ?, ?)",
        [(row["id"], texts[row["id"]], _marks(row)) for row in old if row["id"] in texts],
    )
    _flush(tx)
    tx.executemany("DELETE FROM leases WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM deliveries WHERE message_id = ?", ids)
    tx.executemany("DELETE FROM messages WHERE id = ?", ids)
    forget_events_of(tx, ids)
    tx.emit("messages_forgotten", SYSTEM, count=len(ids), first=ids[0][0], last=ids[-1][0])
    return len(ids)


def _found(row: sqlite3.Row, large: str | None, text: str) -> dict[str, Any]:
    snippet = row["snippet"] or row["body"] if large is None else _around(large, text)
    return {
        "id": row["id"],
        "sender": row["sender"],
        "recipients": json.loads(row["recipients"]),
        "thread": row["thread"],
        "sent_at_ms": row["sent_at_ms"],
        "body_bytes": row["body_bytes"],
        "snippet": _cut(snippet),
    }


def _around(text: str, searched: str) -> str:
    """The place in a large body where a word of the search stands, or its beginning."""
    for word in _words(searched):
        if hit := re.search(re.escape(word.rstrip("*")), text, re.IGNORECASE):
            start = max(0, hit.start() - SNIPPET_CHARACTERS // 2)
            return ("…" if start else "") + text[start : start + 2 * SNIPPET_CHARACTERS]
    return text


def _cut(text: str) -> str:
    line = " ".join(text[: 4 * SNIPPET_CHARACTERS].split())
    return line if len(line) <= 2 * SNIPPET_CHARACTERS else f"{line[: 2 * SNIPPET_CHARACTERS]}…"
