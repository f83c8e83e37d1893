"""Messages: one row each, with a delivery for its recipient; leases and acks by turns.

The promise: when `send` has answered, the message is on disk; it is handed to a turn at least once, and a turn that
did not end well puts it back. An agent runs one turn at a time, and the turn's fence proves who speaks for it.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from hive_core.protocol.harness import OUTCOMES
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, SYSTEM, AgentName, MessageBody
from hive_core.store.bus import mail
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

TRIES = 5
BACKOFF_S = 2.0  # doubled with each try
WAITING_S = 30.0  # how long a message rests when the turn could not run for a reason that is not its own
RECV_LIMIT = 32
RECV_BYTES = 128 * 1024  # of bodies in one answer, but one message always: programs cut long answers of tools
RECV_WAIT_LIMIT_S = 180.0
TOOL_CALL_KEPT_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as its harness knows it: the fence shows that the lease is still its own."""

    id: int
    fence: str


def put_message(
    tx: Transaction, sender: AgentName, recipient: AgentName, body: MessageBody, in_reply_to: int | None = None
) -> int:
    """Store one message and its delivery, with the event that tells of it. Returns the message's id.

    Raises Refusal("not_found") when nobody has that name, or there is no message to reply to.
    """
    if in_reply_to is not None and not _may_reply(tx, sender, in_reply_to):
        raise Refusal("not_found", f"cannot reply to message {in_reply_to}: you neither sent nor received it")
    cursor = tx.execute(
        "INSERT INTO messages (sender, body, in_reply_to, sent_at_ms)"
        " SELECT ?, ?, ?, ? WHERE ?5 = 'operator' OR EXISTS (SELECT 1 FROM agents WHERE name = ?5)",
        (sender, body, in_reply_to, tx.now_ms, recipient),
    )
    if cursor.rowcount == 0:
        raise Refusal("not_found", f"cannot send to {recipient}: no agent has that name; `hive list` shows them")
    message_id = cursor.lastrowid
    assert message_id is not None
    tx.execute(
        "INSERT INTO deliveries (message_id, recipient, state, available_at_ms) VALUES (?, ?, 'queued', ?)",
        (message_id, recipient, tx.now_ms),
    )
    tx.emit("message_sent", sender, recipient, message=message_id)
    tx.wake(mail(recipient))
    return message_id


def _may_reply(tx: Transaction, sender: AgentName, message_id: int) -> bool:
    sql = """
        SELECT 1 FROM messages JOIN deliveries ON message_id = id
        WHERE id = :id AND (:sender IN ('operator', 'system') OR sender = :sender OR recipient = :sender)
    """
    return tx.execute(sql, {"id": message_id, "sender": sender}).fetchone() is not None


def first_answer(tx: Transaction, agent: AgentName, key: str | None, tool: str) -> dict[str, Any] | None:
    """The result of the earlier call of `agent` with the same `key`. Raises Refusal as `once` does."""
    if key is None:
        return None
    row = tx.execute("SELECT tool, result FROM tool_calls WHERE agent = ? AND key = ?", (agent, key)).fetchone()
    if row is None:
        return None
    if row["tool"] != tool:
        raise Refusal("usage", f"cannot use this key for {tool}: it was used for a call of {row['tool']}")
    first: dict[str, Any] = json.loads(row["result"])
    return first


def once(
    tx: Transaction, agent: AgentName, key: str | None, tool: str, do: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of `do`, or of the earlier call of `agent` with the same `key`: it counts once.

    Raises Refusal("usage") when the key was used for another tool.
    """
    first = first_answer(tx, agent, key, tool)
    if first is not None:
        return first
    result = do()
    if key is None:
        return result
    tx.execute(
        "INSERT INTO tool_calls (agent, key, tool, result, at_ms) VALUES (?, ?, ?, ?, ?)",
        (agent, key, tool, json.dumps(result), tx.now_ms),
    )
    return result


class Broker:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def send(
        self,
        sender: AgentName,
        recipient: AgentName,
        body: MessageBody,
        in_reply_to: int | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Send one message; `{"message": id}` once it is on disk. A repeated `key` gets the first answer."""

        def write(tx: Transaction) -> dict[str, Any]:
            return once(
                tx, sender, key, "send", lambda: {"message": put_message(tx, sender, recipient, body, in_reply_to)}
            )

        return await self._store.write(write)

    async def lease(self, agent: AgentName) -> tuple[Turn, dict[str, Any]]:
        """Wait for a message of `agent`, begin a turn with it: (turn, message with `waiting`).

        Cancelling it may leave a begun turn behind; the harness's next hello closes that as lost.
        Raises Refusal("conflict") while another turn of the agent runs.
        """
        with self._store.bus.listen(mail(agent)) as listener:
            while True:
                found = await self._store.write(lambda tx: _lease_first(tx, agent))
                if isinstance(found, tuple):
                    return found
                with trio.move_on_after(found):
                    await listener.wait()

    async def recv(self, agent: AgentName, limit: int, wait_s: float, key: str | None = None) -> dict[str, Any]:
        """Lease up to `limit` more messages under the turn that runs; wait up to `wait_s` for the first.

        Returns {"messages": [...], "waiting": n}. Raises Refusal("refused") outside a turn, and when the turn ends
        while this waits: what comes then belongs to the next turn.
        """
        deadline = trio.current_time() + wait_s
        turn: int | None = None
        with self._store.bus.listen(mail(agent)) as listener:
            while True:
                last = trio.current_time() >= deadline
                answer = await self._store.write(
                    partial(_recv, agent=agent, limit=limit, key=key, last=last, turn=turn)
                )
                if isinstance(answer, dict):
                    return answer
                turn = answer
                with trio.move_on_at(deadline):
                    await listener.wait()

    async def ack(
        self,
        agent: AgentName,
        turn: Turn,
        outcome: str,
        error: str | None = None,
        usage: object = None,
        session: str | None = None,
    ) -> bool:
        """End a turn: `done` acks what it leased, `failed` puts it back with backoff, `waiting` without a try.

        Returns False, and changes nothing, when the turn is not running any more (its fence is old).
        """
        if outcome not in OUTCOMES:
            raise Refusal("usage", f"cannot end the turn: its outcome must be one of {', '.join(sorted(OUTCOMES))}")

        def write(tx: Transaction) -> bool:
            sql = "SELECT 1 FROM turns WHERE id = ? AND agent = ? AND fence = ? AND state = 'running'"
            if tx.execute(sql, (turn.id, agent, turn.fence)).fetchone() is None:
                return False
            if session:
                tx.execute("UPDATE agents SET session = ? WHERE name = ?", (session, agent))
            end_turn(tx, agent, turn.id, outcome, error, usage)
            return True

        return await self._store.write(write)

    async def close_lost_turns(self, agent: AgentName, alive: Turn | None) -> list[int]:
        """Close the running turn of `agent` as lost unless it is `alive`; its messages go back. Returns its id."""

        def write(tx: Transaction) -> list[int]:
            rows = tx.execute("SELECT id, fence FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchall()
            lost = [row["id"] for row in rows if alive != Turn(row["id"], row["fence"])]
            for turn_id in lost:
                end_turn(tx, agent, turn_id, "lost", "its harness went away", None)
            return lost

        return await self._store.write(write)

    async def messages(
        self, agent: str | None = None, limit: int = 50, before: int | None = None
    ) -> list[dict[str, Any]]:
        """The newest messages (to or from `agent`), newest last, with the state of each delivery."""
        sql = """
            SELECT * FROM (
              SELECT m.id, m.sender, d.recipient, m.body, m.in_reply_to, m.sent_at_ms, d.state, d.attempts, d.turn_id
              FROM messages m JOIN deliveries d ON d.message_id = m.id
              WHERE m.id < :before AND (:agent IS NULL OR m.sender = :agent OR d.recipient = :agent)
              ORDER BY m.id DESC LIMIT :limit
            ) ORDER BY id
        """
        rows = await self._store.rows(sql, {"agent": agent, "limit": limit, "before": before or 2**62})
        return [dict(row) for row in rows]

    async def message(self, message_id: int) -> dict[str, Any] | None:
        found = await self.messages(before=min(message_id, 2**62) + 1, limit=1)
        return found[0] if found and found[0]["id"] == message_id else None

    async def inbox(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest messages to the operator, each `unread` until this has returned it once."""
        sql = """
            SELECT m.id, m.sender, m.body, m.in_reply_to, m.sent_at_ms, d.state FROM deliveries d
            JOIN messages m ON m.id = d.message_id WHERE d.recipient = 'operator' ORDER BY d.message_id DESC LIMIT ?
        """
        rows = [dict(row) for row in reversed(await self._store.rows(sql, (limit,)))]
        unread = [(row["id"],) for row in rows if row["state"] == "queued"]
        if unread:
            read = "UPDATE deliveries SET state = 'acked' WHERE recipient = 'operator' AND message_id = ?"

            def write(tx: Transaction) -> None:
                tx.executemany(read, unread)
                tx.emit("inbox_read", OPERATOR, messages=[message_id for (message_id,) in unread])

            await self._store.write(write)
        return [{**row, "unread": row.pop("state") == "queued"} for row in rows]

    async def unread(self) -> int:
        """How many messages to the operator `inbox` has not returned yet."""
        row = await self._store.row(
            "SELECT count(*) AS n FROM deliveries WHERE recipient = 'operator' AND state = 'queued'"
        )
        return int(row["n"]) if row else 0

    async def forget_old_tool_calls(self) -> None:
        sql = "DELETE FROM tool_calls WHERE at_ms < ?"
        await self._store.write(lambda tx: tx.execute(sql, (tx.now_ms - TOOL_CALL_KEPT_S * 1000,)).rowcount)


def end_turn(tx: Transaction, agent: str, turn_id: int, state: str, error: str | None, usage: object) -> None:
    """Close a running turn and settle every message it leased, by one rule for all ways to end."""
    tx.execute(
        "UPDATE turns SET state = ?, ended_at_ms = ?, error = ?, usage = ? WHERE id = ?",
        (state, tx.now_ms, error, json.dumps(usage) if usage is not None else None, turn_id),
    )
    sql = "SELECT message_id, attempts FROM deliveries WHERE turn_id = ? AND state = 'leased'"
    for row in tx.execute(sql, (turn_id,)).fetchall():
        new_state, attempts, rest_s = settle(state, row["attempts"])
        tx.execute(
            "UPDATE deliveries SET state = ?, attempts = ?, available_at_ms = ? WHERE message_id = ? AND recipient = ?",
            (new_state, attempts, tx.now_ms + int(rest_s * 1000), row["message_id"], agent),
        )
        if new_state == "dead":
            tx.emit("message_dead", SYSTEM, agent, message=row["message_id"], attempts=attempts, error=error)
            _tell_sender(tx, agent, row["message_id"], attempts, error)
    tx.emit("turn_ended", agent, agent, turn=turn_id, state=state, error=error)
    tx.wake(mail(agent))


def _tell_sender(tx: Transaction, agent: str, message_id: int, attempts: int, error: str | None) -> None:
    """Whoever sent a message that is dead now reads so; the hive itself needs no letter."""
    sender = tx.execute("SELECT sender FROM messages WHERE id = ?", (message_id,)).fetchone()["sender"]
    if sender != SYSTEM:
        text = f"message_dead: your message {message_id} to {agent} was given up after {attempts} tries. {error or ''}"
        put_message(tx, SYSTEM, sender, MessageBody(text.strip()), message_id)


def settle(turn_state: str, attempts: int) -> tuple[str, int, float]:
    """What becomes of a delivery when its turn ends: (state, tries counted, seconds until the next)."""
    match turn_state:
        case "done":
            return "acked", attempts, 0.0
        case "waiting":
            return "queued", attempts - 1, WAITING_S
        case _ if attempts >= TRIES:
            return "dead", attempts, 0.0
        case "lost" if attempts == 1:
            return "queued", attempts, 0.0
        case _:
            return "queued", attempts, BACKOFF_S * 2 ** (attempts - 1)


def _lease_first(tx: Transaction, agent: str) -> tuple[Turn, dict[str, Any]] | float:
    """Begin a turn with the first message that is due, or say in how many seconds one will be (inf: unknown)."""
    if row := tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone():
        raise Refusal("conflict", f"cannot lease: turn {row['id']} of {agent} still runs; ack it first")
    paused = tx.execute("SELECT 1 FROM agents WHERE name = ? AND wanted != 'up'", (agent,)).fetchone()
    if paused:
        return float("inf")
    due = _take(tx, agent, 1)
    if not due:
        sql = "SELECT min(available_at_ms) AS at FROM deliveries WHERE recipient = ? AND state = 'queued'"
        at = tx.execute(sql, (agent,)).fetchone()["at"]
        return float("inf") if at is None else max(0.0, (at - tx.now_ms) / 1000)
    fence = secrets.token_hex(8)
    cursor = tx.execute(
        "INSERT INTO turns (agent, fence, state, started_at_ms) VALUES (?, ?, 'running', ?)", (agent, fence, tx.now_ms)
    )
    assert cursor.lastrowid is not None
    turn = Turn(cursor.lastrowid, fence)
    _mark_leased(tx, agent, turn.id, due)
    tx.emit("turn_started", agent, agent, turn=turn.id, message=due[0]["id"])
    return turn, {**_for_agent(due[0]), "waiting": _waiting(tx, agent)}


def _recv(
    tx: Transaction, agent: AgentName, limit: int, key: str | None, last: bool, turn: int | None
) -> dict[str, Any] | int:
    """Take what is due under the turn that runs; its number when there is nothing yet and the caller can wait."""
    running = tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone()
    if running is None or turn not in (None, running["id"]):
        raise Refusal("refused", "cannot receive: no turn runs; messages are taken in a turn")

    def take() -> dict[str, Any]:
        due = _within(_take(tx, agent, limit), RECV_BYTES)
        _mark_leased(tx, agent, running["id"], due)
        if due:
            tx.emit("messages_taken", agent, agent, turn=running["id"], messages=[row["id"] for row in due])
        return {"messages": [_for_agent(row) for row in due], "waiting": _waiting(tx, agent)}

    known = (
        key is not None and tx.execute("SELECT 1 FROM tool_calls WHERE agent = ? AND key = ?", (agent, key)).fetchone()
    )
    if not (known or last or _take(tx, agent, 1)):
        return int(running["id"])
    return once(tx, agent, key, "recv", take)


def _take(tx: Transaction, agent: str, limit: int) -> list[sqlite3.Row]:
    sql = """
        SELECT m.id, m.sender, m.body, m.in_reply_to, m.sent_at_ms, d.attempts + 1 AS attempt
        FROM deliveries d JOIN messages m ON m.id = d.message_id
        WHERE d.recipient = ? AND d.state = 'queued' AND d.available_at_ms <= ? ORDER BY d.message_id LIMIT ?
    """
    return tx.execute(sql, (agent, tx.now_ms, limit)).fetchall()


def _within(rows: list[sqlite3.Row], limit_bytes: int) -> list[sqlite3.Row]:
    """The first rows whose bodies together stay within the limit; one at least."""
    size = 0
    for count, row in enumerate(rows):
        size += len(row["body"].encode())
        if count and size > limit_bytes:
            return rows[:count]
    return rows


def _mark_leased(tx: Transaction, agent: str, turn_id: int, due: list[sqlite3.Row]) -> None:
    tx.executemany(
        "UPDATE deliveries SET state = 'leased', attempts = attempts + 1, turn_id = ? "
        "WHERE message_id = ? AND recipient = ?",
        [(turn_id, row["id"], agent) for row in due],
    )


def _waiting(tx: Transaction, agent: str) -> int:
    sql = "SELECT count(*) AS n FROM deliveries WHERE recipient = ? AND state = 'queued'"
    return int(tx.execute(sql, (agent,)).fetchone()["n"])


def _for_agent(row: sqlite3.Row) -> dict[str, Any]:
    return {key: row[key] for key in ("id", "sender", "body", "in_reply_to", "sent_at_ms", "attempt")}
