"""News of forges become messages, each state of a thread once: the row that says so and the message are one commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hive_core.forge.words import Comment, Thread, ThreadKind
from hive_core.lanes import Lane
from hive_core.limits import Limits
from hive_core.protocol.visible import counted
from hive_core.protocol.words import FORGE, OPERATOR, SYSTEM, AgentName, MessageBody
from hive_core.services.forges import Registered
from hive_core.services.notices import notice
from hive_core.services.post import Cause, InboxFull, Letter, post, put_message
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

HOUR_MS = 3600 * 1000
# told: somebody has it. known: it was told before. nobody: no lane takes it. Of the others it waits at the forge: full,
# the lane or the inboxes; absent, none of the lane's agents is there.
Outcome = Literal["told", "known", "nobody", "full", "absent"]


class State(NamedTuple):
    """What a notification is about, as it was seen. comments: how many there are, as two can be of one second."""

    notification: str
    updated_at_ms: int
    comments: int
    kind: ThreadKind | None
    number: int | None


class Before(NamedTuple):
    """What was told last of a thread. message: None when that is forgotten."""

    updated_at_ms: int
    message: int | None


async def is_known(store: Store, forge: Registered, state: State) -> bool:
    """Whether this state was told, or found to be nobody's."""
    return await store.row(_KNOWN, _key(forge, state)) is not None


async def told_before(store: Store, forge: Registered, number: int) -> Before | None:
    row = await store.row(_BEFORE, (forge.id, number))
    return Before(row["updated_at_ms"], row["message"]) if row else None


def put_news(
    tx: Transaction,
    forge: Registered,
    state: State,
    lane: Lane | None,
    body: MessageBody | None,
    in_reply_to: int | None,
    limits: Limits,
) -> Outcome:
    """Store what a lane has for its agents. Raises Refusal where the disk is full.

    Who of them has a full inbox misses it where another has room.
    """
    if tx.execute(_KNOWN, _key(forge, state)).fetchone() is not None:
        return "known"
    if lane is None or body is None:
        _insert(tx, forge, state, None)
        return "nobody"
    if lane_is_full(tx, lane, limits):
        return "full"
    names = json.dumps(lane.agents)
    there = {row["name"] for row in tx.execute(_THERE, (names,)).fetchall()} | {OPERATOR}
    recipients = [AgentName(name) for name in dict.fromkeys(lane.agents) if name in there]
    if in_reply_to is not None and tx.execute("SELECT 1 FROM messages WHERE id = ?", (in_reply_to,)).fetchone() is None:
        in_reply_to = None  # it was forgotten meanwhile
    number = _insert(tx, forge, state, lane.name)
    outcome: Outcome = "full" if recipients else "absent"
    while recipients:
        letter = Letter(FORGE, tuple(recipients), body, in_reply_to, cause=Cause("system", number))
        try:
            answer = post(tx, [letter], limits)[0].unwrap()
        except InboxFull as exc:
            recipients = [name for name in recipients if name not in exc.full]
            continue
        tx.execute("UPDATE forge_notices SET message_id = ? WHERE id = ?", (answer["message"], number))
        return "told"
    tx.execute("DELETE FROM forge_notices WHERE id = ?", (number,))
    return outcome


def lane_is_full(tx: Transaction, lane: Lane, limits: Limits) -> bool:
    sql = "SELECT count(*) FROM forge_notices WHERE lane = ? AND at_ms > ? AND at_ms <= ?"
    (count,) = tx.execute(sql, (lane.name, tx.now_ms - HOUR_MS, tx.now_ms)).fetchone()
    return bool(count >= (lane.per_hour or limits.lane_per_hour))


def tell_lane_full(tx: Transaction, lane: Lane, forge: Registered, limits: Limits) -> None:
    """The operator reads that a lane has told as much as it may within an hour."""
    most = lane.per_hour or limits.lane_per_hour
    tx.emit("lane_full", SYSTEM, lane=lane.name, project=forge.project, per_hour=most)
    text = (
        f"the lane {lane.name} has told {counted(most, 'piece')} of news within an hour, which is its limit (per_hour, "
        "lane_per_hour); the rest waits unread at the forge and is told as there is room"
    )
    put_message(tx, SYSTEM, OPERATOR, notice("lane_full", text, project=forge.project))


def compose(
    forge: Registered, lane: Lane, thread: Thread, before: Before | None, comments: Sequence[Comment]
) -> MessageBody:
    """What is told of a thread. comments: those that are new; the newest is told, and the text of the thread once."""
    where = f"{thread.kind.replace('_', ' ')} {thread.number} of {forge.place.repository}"
    if comments:
        sentence = f"{counted(len(comments), 'new comment')} on {where}"
    else:
        sentence = f"{where} has changed" if before else f"{where} is there"
    newest = comments[-1] if comments else None
    return notice(
        "forge_news",
        sentence,
        lane=lane.name,
        project=forge.project,
        repository=forge.place.repository,
        what=thread.kind,
        number=thread.number,
        url=forge.place.page(thread.kind, thread.number),
        state="merged" if thread.merged else thread.state,
        author=thread.author,
        labels=", ".join(thread.labels),
        title=thread.title,
        body="" if before else thread.body,
        comment_by=newest.author if newest else "",
        verdict=newest.verdict if newest else "",
        path=newest.path if newest else "",
        line=newest.line if newest else None,
        comment=newest.body if newest else "",
    )


def _insert(tx: Transaction, forge: Registered, state: State, lane: str | None) -> int:
    cursor = tx.execute(
        "INSERT INTO forge_notices (forge_id, notification, updated_at_ms, comments, repository, kind, number, lane,"
        " at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*_key(forge, state), forge.place.repository, state.kind, state.number, lane, tx.now_ms),
    )
    return int(cursor.lastrowid or 0)


def _key(forge: Registered, state: State) -> tuple[int, str, int, int]:
    return forge.id, state.notification, state.updated_at_ms, state.comments


_KNOWN = "SELECT 1 FROM forge_notices WHERE forge_id = ? AND notification = ? AND updated_at_ms = ? AND comments = ?"
_THERE = "SELECT name FROM agents WHERE name IN (SELECT value FROM json_each(?))"
_BEFORE = """
    SELECT n.updated_at_ms, m.id AS message FROM forge_notices n LEFT JOIN messages m ON m.id = n.message_id
    WHERE n.forge_id = ? AND n.number = ? AND n.message_id IS NOT NULL ORDER BY n.id DESC LIMIT 1
"""
