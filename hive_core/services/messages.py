"""Messages as they are read, and what the operator does to those that are dead or held."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services import question_ends
from hive_core.services.archive import newest_of_agent
from hive_core.services.attachments import FILES, files_of
from hive_core.services.bodies import Bodies, piece
from hive_core.services.post import AT_ONCE, check_there, forget_depth
from hive_core.store.bus import mail
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


class Messages:
    """Without `bodies` all stand inline."""

    def __init__(self, store: Store, limits: Limits, bodies: Bodies | None = None) -> None:
        self._store = store
        self._limits = limits
        self._bodies = bodies

    async def aside(self, state: str, limit: int = 50) -> list[dict[str, Any]]:
        """The oldest messages that are `dead` or `held`, each with its recipient and why."""
        # The state stands in the text: an index of held or dead ones alone is taken for no other query.
        assert state in ("dead", "held")
        sql = f"""
            SELECT m.id, d.sender, d.recipient, m.body, m.body_bytes, m.sent_at_ms, d.attempts, d.failures, d.held,
                   d.note, d.settled_at_ms, m.chain_id, m.hops
            FROM deliveries d INDEXED BY deliveries_{state} JOIN messages m ON m.id = d.message_id
            WHERE d.state = '{state}'
            ORDER BY d.message_id LIMIT ?
        """
        return [dict(row) for row in await self._store.rows(sql, (limit,))]

    async def requeue(self, message_id: int, actor: AgentName) -> list[str]:
        """Give a dead message all its tries again. Returns its recipients; Refusal when it is dead for nobody."""
        return await self._move(message_id, actor, ("dead",), "requeue")

    async def release(self, message_id: int, actor: AgentName) -> list[str]:
        """Let a held message go; the chain begins anew with it. Returns its recipients; Refusal when none holds it."""
        return await self._move(message_id, actor, ("held",), "release")

    async def drop(self, message_id: int, actor: AgentName) -> list[str]:
        """Put a dead or held message away. Returns whom it will not reach; Refusal when there is none."""
        return await self._move(message_id, actor, ("dead", "held"), "drop")

    async def _move(self, message_id: int, actor: AgentName, states: tuple[str, ...], verb: str) -> list[str]:
        state, event = {
            "requeue": ("queued", "message_requeued"),
            "release": ("queued", "message_released"),
            "drop": ("dropped", "message_dropped"),
        }[verb]

        def write(tx: Transaction) -> list[str]:
            sql = "SELECT recipient FROM deliveries WHERE message_id = ? AND state IN (SELECT value FROM json_each(?))"
            names = [row[0] for row in tx.execute(sql, (message_id, json.dumps(states))).fetchall()]
            if not names:
                raise Refusal("not_found", f"cannot {verb} message {message_id}: it is not {' or '.join(states)}")
            if verb != "drop":
                check_there(tx, names, f"{verb} message {message_id} for {{}}")
            tx.executemany(
                "UPDATE deliveries SET state = ?, failures = 0, available_at_ms = ?, settled_at_ms = ?"
                " WHERE message_id = ? AND recipient = ?",
                [(state, AT_ONCE, tx.now_ms if state == "dropped" else None, message_id, name) for name in names],
            )
            chain: dict[str, int] = {}  # that it was of so far: `explain` tells it
            if verb == "release":
                sql = "SELECT chain_id AS chain, hops FROM messages WHERE id = ?"
                chain = dict(tx.execute(sql, (message_id,)).fetchone())
                tx.execute("UPDATE messages SET chain_id = id, hops = 0 WHERE id = ?", (message_id,))
            for name in names:
                tx.emit(event, actor, name, about=message_id, message=message_id, **chain)
                forget_depth(tx, name)
                tx.wake(mail(name))
            if verb == "drop":
                question_ends.drop_message(tx, message_id, self._limits)
            return names

        return await self._store.write(write)

    async def newest(
        self, agent: str | None = None, limit: int = 50, before: int | None = None
    ) -> list[dict[str, Any]]:
        """The newest messages (to or from `agent`), newest last, one for each recipient with its state."""
        given: dict[str, Any] = {"agent": agent, "before": before or 2**62, "limit": limit}
        newest = "SELECT id FROM messages WHERE id < :before ORDER BY id DESC LIMIT :limit"
        if agent is not None:
            given["numbers"] = json.dumps(await newest_of_agent(self._store, agent, given["before"], limit))
            newest = "SELECT value FROM json_each(:numbers)"
        sql = f"""
            SELECT * FROM (
              SELECT m.id, m.sender, d.recipient, m.body, m.body_bytes, m.in_reply_to, m.cause, m.cause_id,
                     m.sent_at_ms, d.state, d.attempts, d.held, d.note, d.turn_id, {FILES}
              FROM messages m JOIN deliveries d ON d.message_id = m.id
              WHERE m.id IN ({newest}) AND (:agent IS NULL OR m.sender = :agent OR d.recipient = :agent)
              ORDER BY m.id DESC, d.recipient DESC LIMIT :limit
            ) ORDER BY id, recipient
        """
        rows = await self._store.rows(sql, given)
        return [{**dict(row), "files": files_of(row["files"])} for row in rows]

    async def read_body(self, message_id: int, offset: int = 0, reader: AgentName | None = None) -> dict[str, Any]:
        """Some of a body from byte `offset`: {"body", "next_offset", "bytes"}; next_offset None at its end.

        `reader` may have sent it, or have been handed it; None is the operator, who reads all. Raises Refusal.
        """
        sql = """
            SELECT body, body_bytes, body_sha256 FROM messages m WHERE id = :id AND (
                :reader IS NULL OR sender = :reader OR EXISTS (
                    SELECT 1 FROM deliveries WHERE message_id = m.id AND recipient = :reader AND attempts > 0))
        """
        row = await self._store.row(sql, {"id": message_id, "reader": reader})
        if row is None:
            why = "there is no such message" if reader is None else "you neither sent nor received it"
            raise Refusal("not_found", f"cannot read message {message_id}: {why}")
        body = row["body"]
        if row["body_sha256"]:
            assert self._bodies is not None, "a database with large bodies was opened without them"
            body = await self._bodies.whole(row["body_sha256"])
        some = piece(body.encode(), offset)
        return {"body": some.body, "next_offset": some.next_offset, "bytes": row["body_bytes"]}

    async def files(self, message_id: int) -> list[dict[str, Any]]:
        """What came with a message: [{"name", "type", "bytes", "sha256"}]."""
        row = await self._store.row(f"SELECT {FILES} FROM messages m WHERE id = ?", (message_id,))
        return files_of(row["files"]) if row else []

    async def one(self, message_id: int) -> dict[str, Any] | None:
        """One message, with the delivery of its first recipient."""
        found = await self.newest(before=min(message_id, 2**62) + 1, limit=1)
        return found[0] if found and found[0]["id"] == message_id else None

    async def inbox(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest messages to the operator, each `unread` until this has returned it once."""
        sql = """
            SELECT m.id, m.sender, m.body, m.body_bytes, m.in_reply_to, m.sent_at_ms, d.state
            FROM deliveries d INDEXED BY deliveries_to_operator JOIN messages m ON m.id = d.message_id
            WHERE d.recipient = 'operator' AND d.state IN ('queued', 'acked') ORDER BY d.message_id DESC LIMIT ?
        """

        def read(tx: Transaction) -> list[sqlite3.Row]:
            found = tx.execute(sql, (limit,)).fetchall()
            if unread := _unread(found):
                tx.executemany(
                    "UPDATE deliveries SET state = 'acked', settled_at_ms = ?"
                    " WHERE recipient = 'operator' AND message_id = ?",
                    [(tx.now_ms, message_id) for message_id in unread],
                )
                tx.emit("inbox_read", OPERATOR, messages=unread)
            return found

        rows = await self._store.rows(sql, (limit,))
        if _unread(rows):
            # Its sender may take one back meanwhile: what is shown is what the transaction that reads it finds.
            rows = await self._store.write(read)
        shown = [dict(row) for row in reversed(rows)]
        return [{**row, "unread": row.pop("state") == "queued"} for row in shown]

    async def unread(self) -> int:
        """How many messages to the operator `inbox` has not returned yet."""
        row = await self._store.row(
            "SELECT count(*) AS n FROM deliveries INDEXED BY deliveries_queued"
            " WHERE recipient = 'operator' AND state = 'queued'"
        )
        return int(row["n"]) if row else 0


def _unread(rows: Sequence[sqlite3.Row]) -> list[int]:
    """Oldest first."""
    return [row["id"] for row in reversed(rows) if row["state"] == "queued"]
