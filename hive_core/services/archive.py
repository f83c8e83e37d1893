"""What was said: search over all bodies, and threads."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import FORGE, SYSTEM, AgentName, parse_id, parse_instant, parse_recipient, shown
from hive_core.services.attachments import FILES, files_of
from hive_core.services.search_index import DAMAGE, SearchIndex, mark
from hive_core.store.door import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

SEARCH_LIMIT = 50  # messages in one answer
THREAD_LIMIT = 200
TEXT_LIMIT_BYTES = 1_000
WORDS_LIMIT = 16  # words and phrases of one search
PREFIX_LEAST = 2  # letters and digits before a star: too many words begin with the same one
SEARCH_S = 2.0
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
    return AgentName(str(raw)) if raw in (SYSTEM, FORGE) else parse_recipient(raw)


def parse_words(raw: object) -> str:
    """The text of a search: anything in which there is a word, up to its limits. Raises Refusal("usage")."""
    if not isinstance(raw, str):
        raise Refusal("usage", "cannot search: the text must be a string")
    text = raw.encode("utf-8", "replace").decode().replace("\0", " ")
    if (size := len(text.encode())) > TEXT_LIMIT_BYTES:
        raise Refusal(
            "usage",
            f"cannot search: the text has {size:,} bytes and the limit is {TEXT_LIMIT_BYTES:,}; use fewer words",
        )
    if text.strip():
        _check_words(text)
    return text.strip()


def _check_words(text: str) -> None:
    words = _words(text)
    if not words:
        raise Refusal(
            "usage",
            f"cannot search for {shown(text)}: there is no letter and no digit in it, and nothing else is found; "
            "use a word that stands beside it",
        )
    if len(words) > WORDS_LIMIT:
        raise Refusal(
            "usage",
            f"cannot search: there are {len(words)} different words and phrases, and the limit is {WORDS_LIMIT}; "
            "use fewer",
        )
    for word in words:
        if word.endswith("*") and len(_indexed(word)[-1]) < PREFIX_LEAST:
            raise Refusal(
                "usage",
                f"cannot search for {shown(word)}: the beginning of a word needs {PREFIX_LEAST} characters at least; "
                "write more of it",
            )


class Archive:
    """bodies_dir: where large bodies are kept as files, ab/SHA256 each."""

    def __init__(self, store: Store, limits: Limits, bodies_dir: Path) -> None:
        self._store = store
        self._limits = limits
        self.index = SearchIndex(store, bodies_dir)

    async def search(self, query: Query, reader: AgentName | None = None) -> dict[str, Any]:
        """The newest messages that fit, newest first: `{"messages", "next_cursor"}`, both for one page.

        An agent as `reader` finds only what it sent and what was handed to one of its turns; None finds everything.
        `unindexed` counts messages that the index had not come to, where there are any. Raises Refusal("refused")
        for a search that took too long.
        """
        behind = await self.index.catch_up()
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
            rows = await self._rows(sql, given)
        except DAMAGE as exc:
            await self.index.begin_anew(exc)
            behind = await self.index.catch_up()
            rows = await self._rows(sql, given)
        page = rows[: query.limit]
        whole = await self.index.whole_bodies(page)
        return {
            "messages": [_found(row, whole.get(row["id"]), query.text) for row in page],
            "next_cursor": page[-1]["id"] if len(rows) > query.limit else None,
            **({"unindexed": behind} if behind else {}),
        }

    async def _rows(self, sql: str, given: Mapping[str, Any]) -> list[sqlite3.Row]:
        try:
            return await self._store.search(sql, given, SEARCH_S)
        except TimeoutError:
            raise Refusal(
                "refused",
                f"cannot finish this search: it ran for {SEARCH_S:g} s, and that is the limit; use fewer or longer "
                "words, or narrow it by sender, thread or time",
            ) from None

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

    async def thread(self, message_id: int, after: int = 0, limit: int = THREAD_LIMIT) -> dict[str, Any]:
        """The thread that a message belongs to, oldest first: `{"thread", "messages", "next_after"}`.

        Each message has its `recipients` with their states. Raises Refusal("not_found") when nothing of it is kept.
        """
        root = await self._root(message_id)
        sql = f"""
            SELECT m.id, m.sender, m.body, m.body_bytes, m.in_reply_to, m.cause, m.cause_id, m.sent_at_ms, {FILES},
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
        page = [
            {**dict(row), "recipients": json.loads(row["recipients"]), "files": files_of(row["files"])}
            for row in rows[:limit]
        ]
        return {"thread": root, "messages": page, "next_after": page[-1]["id"] if len(rows) > limit else None}


def _gone(limits: Limits) -> str:
    days = limits.kept_s / 86_400
    kept = f"{days:g} {'day' if days == 1 else 'days'} (kept_s)"
    return f"there was none, or it is gone: what is acked is kept for {kept}"


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
    except DAMAGE as exc:
        log.warning("the index of the search is damaged (%r): messages are looked at one by one until it is whole", exc)
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
    return f"{{marks}} : ({mark('by', agent)} OR {mark('to', agent)})"


def _match(query: Query, root: int | None, reader: str | None) -> str | None:
    """The expression for the index; None when nothing is asked of it. The marks only narrow: the rows decide."""
    parts = []
    if words := _words(query.text):
        parts.append(f"{{body}} : ({' '.join(_quoted(word) for word in words)})")
    if query.sender is not None:
        parts.append(f"{{marks}} : {mark('by', query.sender)}")
    if root is not None:
        parts.append(f"{{marks}} : thread{root}")
    if reader is not None:
        parts.append(_whose(reader))
    return " AND ".join(parts) or None


def _words(text: str) -> list[str]:
    """Its different words, and what stands between double quotes as one; signs alone are none."""
    found = (phrase or word for phrase, word in re.findall(r'"([^"]*)"?|([^\s"]+)', text))
    return list(dict.fromkeys(word for word in found if _indexed(word)))


def _indexed(word: str) -> list[str]:
    """The words that the index makes of it: what stands together of letters and digits, without accents."""
    return "".join(_folded(character) for character in word).split()


def _folded(character: str) -> str:
    category = unicodedata.category(character)
    return character if category[0] in "LN" or category == "Co" else "" if unicodedata.combining(character) else " "


def _quoted(word: str) -> str:
    """A word that means nothing to the index but itself; one that ends in a star is the beginning of a word."""
    return '"' + word.replace('"', " ") + '"' + ("*" if word.endswith("*") else "")


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
