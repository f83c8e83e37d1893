"""Taking back what was sent and nobody has had in a turn yet."""

from __future__ import annotations

from collections.abc import Sequence

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.question_ends import cancel_put_with, reopen
from hive_core.services.rates import count_taken_back
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

STEP = 100  # deliveries that one transaction drops


def withdraw(tx: Transaction, sender: AgentName, deliveries: Sequence[tuple[int, str]]) -> int:
    """Drop those of these deliveries (message, recipient) that `sender` sent and nobody has had. How many."""
    sql = f"""
        UPDATE deliveries SET state = 'dropped', settled_at_ms = ?, note = 'withdrawn by its sender'
        WHERE message_id = ? AND recipient = ? AND sender = ? AND {_UNREAD} RETURNING held
    """
    dropped = 0
    for message_id, recipient in deliveries:
        for row in tx.execute(sql, (tx.now_ms, message_id, recipient, sender)).fetchall():
            dropped += 1
            if row["held"] is not None:
                count_taken_back(tx, sender)
            tx.emit("message_dropped", sender, recipient, about=message_id, message=message_id)
            reopen(tx, message_id)
    return dropped


async def withdraw_thread(store: Store, sender: AgentName, message_id: int) -> dict[str, int]:
    """Withdraw what `sender` wrote in the thread of a message: {"thread", "dropped", "too_late"}.

    dropped: deliveries that will not happen. too_late: those that a turn has had, or the operator has read. A question
    of `sender` that began the thread is cancelled, and one that is answered by what is withdrawn opens again. A long
    thread goes in small transactions. Asked again it finds nothing left to drop. Raises Refusal("not_found") for a
    thread that `sender` has no part in.
    """
    row = await store.row("SELECT coalesce(thread_id, id) FROM messages WHERE id = ?", (message_id,))
    root = row[0] if row else 0
    if await store.row(f"{_MINE} LIMIT 1", {"root": root, "sender": sender}) is None:
        raise Refusal("not_found", f"cannot cancel thread {message_id}: you wrote nothing in it")
    await store.write(lambda tx: cancel_put_with(tx, sender, root))
    dropped, after = 0, 0
    for sql in (_FIRST, _OTHERS):
        while unread := await store.rows(sql, {"root": root, "sender": sender, "after": after, "step": STEP}):
            deliveries = [(row["message_id"], row["recipient"]) for row in unread]
            dropped += await store.write(lambda tx, some=deliveries: withdraw(tx, sender, some))  # type: ignore[misc]
            after = deliveries[-1][0]
    (left,) = await store.rows(
        f"SELECT count(*) FROM ({_MINE} AND d.state != 'dropped')", {"root": root, "sender": sender}
    )
    return {"thread": root, "dropped": dropped, "too_late": left[0]}


_UNREAD = "state IN ('queued', 'held') AND attempts = 0"
_MINE = """
    SELECT 1 FROM messages m JOIN deliveries d ON d.message_id = m.id
    WHERE (m.id = :root OR m.thread_id = :root) AND m.sender = :sender
"""
# The first of a thread stands outside the index of the others.
_FIRST = f"""
    SELECT message_id, recipient FROM deliveries WHERE message_id = :root AND sender = :sender AND {_UNREAD}
    ORDER BY recipient LIMIT :step
"""
_OTHERS = f"""
    SELECT d.message_id, d.recipient FROM messages m INDEXED BY messages_by_thread
    CROSS JOIN deliveries d ON d.message_id = m.id
    WHERE m.thread_id = :root AND m.id >= :after AND m.sender = :sender AND {_UNREAD}
    ORDER BY m.id LIMIT :step
"""
