"""What becomes of all that waits for an agent, or that it waits for, when it is destroyed. Each sender is told once."""

from __future__ import annotations

from hive_core.limits import Limits
from hive_core.protocol.words import FORGE, SYSTEM, AgentName, MessageBody
from hive_core.services.approvals import from_row, settle
from hive_core.services.notices import Field, notice
from hive_core.services.post import Cause, Letter, forget_depth, post
from hive_core.services.question_ends import end_with_agent
from hive_core.store.writer import Transaction

NUMBERS_SHOWN = 10


def settle_all(tx: Transaction, name: AgentName, actor: str, limits: Limits) -> None:
    """End what an agent leaves undone: mail, questions, reminders, schedules, background works and approvals."""
    why = f"{name} was destroyed"
    _give_up_mail(tx, name, why, limits)
    end_with_agent(tx, name, limits)
    sql = "UPDATE reminders SET state = 'cancelled', settled_at_ms = ? WHERE agent = ? AND state IN ('open', 'due')"
    tx.execute(sql, (tx.now_ms, name))
    sql = "UPDATE schedules SET state = 'paused', next_at_ms = NULL, note = ? WHERE agent = ? AND state = 'on'"
    sql += " RETURNING id"
    for row in tx.execute(sql, (why, name)).fetchall():
        tx.emit("schedule_paused", SYSTEM, name, schedule=row["id"], why=why)
    tx.execute(
        "UPDATE background_works SET state = 'cut_off', ended_at_ms = ? WHERE agent = ? AND state = 'running'",
        (tx.now_ms, name),
    )
    sql = "SELECT * FROM approvals WHERE agent = ? AND kind != 'spawn' AND state = 'pending'"
    for row in tx.execute(sql, (name,)).fetchall():
        approval = from_row(row)
        settle(tx, approval, "denied", why, actor)
        told: dict[str, Field] = {"approval": approval.id, "what": approval.kind, "agent": name, "state": "denied"}
        body = notice("approval_resolved", f"approval {approval.id} for {name}: denied", **told, reason=why)
        if approval.requested_by != name:
            _tell(tx, approval.requested_by, body, None, limits)


def _give_up_mail(tx: Transaction, name: AgentName, why: str, limits: Limits) -> None:
    """What nobody will read is dead, and whoever sent it is told."""
    given_up: dict[str, list[int]] = {}
    for state in ("queued", "held", "leased"):
        # The state stands in the text, so that each finds its own index.
        sql = f"""
            UPDATE deliveries SET state = 'dead', settled_at_ms = ?, note = ? WHERE recipient = ? AND state = '{state}'
            RETURNING message_id, sender
        """
        for row in tx.execute(sql, (tx.now_ms, why, name)).fetchall():
            given_up.setdefault(row["sender"], []).append(row["message_id"])
    forget_depth(tx, name)
    if not given_up:
        return
    numbers = sorted(number for some in given_up.values() for number in some)
    tx.emit("messages_given_up", SYSTEM, name, messages=numbers, why=why)
    for sender, messages in given_up.items():
        some = ", ".join(map(str, sorted(messages)[:NUMBERS_SHOWN]))
        more = len(messages) - NUMBERS_SHOWN
        which = (
            f"message {some}" if len(messages) == 1 else f"messages {some}" + (f" and {more} more" if more > 0 else "")
        )
        reply_to = messages[0] if len(messages) == 1 else None
        body = notice("message_dead", f"your {which} to {name} will not be read: {why}", agent=name)
        _tell(tx, AgentName(sender), body, reply_to, limits)


def _tell(tx: Transaction, who: AgentName, body: MessageBody, reply_to: int | None, limits: Limits) -> None:
    """Tell somebody that is still there."""
    if who not in (SYSTEM, FORGE):
        post(tx, [Letter(SYSTEM, (who,), body, reply_to, cause=Cause("system"))], limits)
