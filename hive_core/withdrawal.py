"""Taking back what was sent and nobody has had in a turn yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


class Withdrawn(NamedTuple):
    dropped: int  # deliveries that will not happen
    too_late: int  # deliveries that a turn has had, or the operator has read


def withdraw(tx: Transaction, sender: AgentName, messages: Sequence[int]) -> Withdrawn:
    """Drop every delivery of these messages of `sender` that is queued or held and was never leased."""
    sql = """
        SELECT message_id, recipient, state IN ('queued', 'held') AND attempts = 0 AS unread FROM deliveries
        WHERE message_id IN (SELECT value FROM json_each(?)) AND sender = ? AND state != 'dropped'
        ORDER BY message_id, recipient
    """
    rows = tx.execute(sql, (json.dumps(messages), sender)).fetchall()
    unread = [row for row in rows if row["unread"]]
    tx.executemany(
        "UPDATE deliveries SET state = 'dropped', settled_at_ms = ?, note = 'withdrawn by its sender'"
        " WHERE message_id = ? AND recipient = ?",
        [(tx.now_ms, row["message_id"], row["recipient"]) for row in unread],
    )
    for row in unread:
        message_id = row["message_id"]
        tx.emit("message_dropped", sender, row["recipient"], about=message_id, message=message_id)
    return Withdrawn(len(unread), len(rows) - len(unread))


async def withdraw_thread(store: Store, sender: AgentName, message_id: int) -> dict[str, int]:
    """Withdraw what `sender` wrote in the thread of a message: {"thread", "dropped", "too_late"}.

    Asked again it finds nothing left to drop. Raises Refusal("not_found") for a thread that `sender` has no part in.
    """

    def write(tx: Transaction) -> dict[str, int]:
        row = tx.execute("SELECT coalesce(thread_id, id) AS root FROM messages WHERE id = ?", (message_id,)).fetchone()
        root = row["root"] if row else 0
        mine = "SELECT id FROM messages WHERE (id = :root OR thread_id = :root) AND sender = :sender"
        messages = [row["id"] for row in tx.execute(mine, {"root": root, "sender": sender}).fetchall()]
        if not messages:
            raise Refusal("not_found", f"cannot cancel thread {message_id}: you wrote nothing in it")
        return {"thread": root, **withdraw(tx, sender, messages)._asdict()}

    return await store.write(write)
