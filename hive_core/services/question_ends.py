"""How a question ends without its answer, and how it opens again: each a part of another change.

Whoever asked is told of every end that it did not bring about itself.
"""

from __future__ import annotations

from hive_core.limits import Limits
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName
from hive_core.services.notices import notice, tell_manager
from hive_core.services.post import Cause, Letter, post
from hive_core.services.rates import count_sent, sent_lately
from hive_core.store.writer import Transaction

TOPIC = "questions"


def cancel_put_with(tx: Transaction, asker: AgentName, message_id: int) -> None:
    """Cancel the open question of `asker` that a message put, if there is one."""
    sql = "SELECT id, answerer FROM questions WHERE message_id = ? AND asker = ? AND state = 'open'"
    if row := tx.execute(sql, (message_id, asker)).fetchone():
        _settle(tx, row["id"], "cancelled")
        tx.emit("question_cancelled", asker, row["answerer"], question=row["id"])


def expire(tx: Transaction, question_id: int, limits: Limits) -> None:
    """End an open question whose time is over, and tell its asker."""
    _settle(tx, question_id, "expired")
    sql = """
        SELECT q.asker, q.answerer, coalesce(d.state = 'held', 0) AS held FROM questions q
        LEFT JOIN deliveries d ON d.message_id = q.message_id AND d.recipient = q.answerer WHERE q.id = ?
    """
    row = tx.execute(sql, (question_id,)).fetchone()
    tx.emit("question_expired", SYSTEM, row["asker"], question=question_id)
    text = f"{row['answerer']} did not answer your question {question_id} in time"
    if row["held"]:
        held = f"your question {question_id} was held for the operator until its time was over"
        text = f"{held}, and {row['answerer']} never got it"
    _tell_asker(tx, question_id, "question_expired", text, limits)


def drop_message(tx: Transaction, message_id: int, limits: Limits) -> None:
    """The operator dropped a message: the question that it put, or that it answered, is dropped with it."""
    row = tx.execute(_OF_MESSAGE, {"message": message_id}).fetchone()
    if row is None:
        return
    number = row["id"]
    _settle(tx, number, "dropped")
    tx.emit("question_dropped", OPERATOR, row["asker"], question=number)
    what = f"your question {number} to {row['answerer']}"
    if row["answered"]:
        what = f"the answer of {row['answerer']} to your question {number}"
    _tell_asker(tx, number, "question_dropped", f"the operator dropped {what}", limits)


def end_with_agent(tx: Transaction, name: AgentName, limits: Limits) -> None:
    """An agent is destroyed: its open questions are cancelled, and those to it dropped, which their askers are told."""
    sql = "SELECT id, answerer FROM questions INDEXED BY questions_from WHERE asker = ? AND state = 'open'"
    for row in tx.execute(sql, (name,)).fetchall():
        _settle(tx, row["id"], "cancelled")
        tx.emit("question_cancelled", SYSTEM, row["answerer"], question=row["id"])
    sql = "SELECT id, asker FROM questions INDEXED BY questions_to WHERE answerer = ? AND state = 'open'"
    for row in tx.execute(sql, (name,)).fetchall():
        _settle(tx, row["id"], "dropped")
        tx.emit("question_dropped", SYSTEM, row["asker"], question=row["id"])
        text = f"{name}, to which you put question {row['id']}, was destroyed"
        _tell_asker(tx, row["id"], "question_dropped", text, limits)


def tell_held(tx: Transaction, question_id: int, limits: Limits) -> None:
    """An answer is held: its asker, who waits for it, is told for whose word it waits now."""
    (who,) = tx.execute("SELECT answerer FROM questions WHERE id = ?", (question_id,)).fetchone()
    text = f"{who} answered your question {question_id}, and the answer is held until the operator releases it"
    _tell_asker(tx, question_id, "answer_held", text, limits)


def tell_asked(tx: Transaction, question_id: int, limits: Limits) -> None:
    """An agent put a question to the operator: hm1nd knows who waits, and reads none of its words.

    It counts as a message of the asker's to hm1nd, so that no loop of questions wakes hm1nd oftener than messages do.
    """
    sql = "SELECT q.asker, m.chain_id, m.hops FROM questions q JOIN messages m ON m.id = q.message_id WHERE q.id = ?"
    row = tx.execute(sql, (question_id,)).fetchone()
    asker = row["asker"]
    if asker == MANAGER or sent_lately(tx, asker, MANAGER) >= limits.pair_rate_per_hour:
        return
    count_sent(tx, asker, MANAGER)
    body = notice("question_asked", f"{asker} asks the operator", question=question_id, agent=asker)
    tell_manager(tx, body, limits, Cause("system", None, row["chain_id"], row["hops"] + 1))


def tell_answered(tx: Transaction, question_id: int, asker: AgentName, limits: Limits) -> None:
    """The operator answered the question of an agent: hm1nd knows that it waits no more."""
    if asker != MANAGER:
        text = f"the operator answered question {question_id} of {asker}"
        tell_manager(tx, notice("question_answered", text, question=question_id, agent=asker), limits)


def reopen(tx: Transaction, message_id: int) -> None:
    """An answer was taken back before its asker had it: its question waits again, and ends with its time at the latest.

    Without a question that this message answered there is nothing to do.
    """
    sql = "SELECT id, asker, answerer FROM questions WHERE answer_id = ? AND state = 'answered'"
    if row := tx.execute(sql, (message_id,)).fetchone():
        tx.execute(
            "UPDATE questions SET state = 'open', settled_at_ms = NULL, choices = NULL, answer = NULL,"
            " answer_id = NULL WHERE id = ?",
            (row["id"],),
        )
        tx.emit("question_reopened", row["answerer"], row["asker"], question=row["id"])
        tx.wake(TOPIC)


def _settle(tx: Transaction, question_id: int, state: str) -> None:
    tx.execute("UPDATE questions SET state = ?, settled_at_ms = ? WHERE id = ?", (state, tx.now_ms, question_id))


def _tell_asker(tx: Transaction, question_id: int, kind: str, sentence: str, limits: Limits) -> None:
    sql = """
        SELECT q.asker, q.answerer, q.text, m.id AS message_id, m.chain_id, m.hops FROM questions q
        LEFT JOIN messages m ON m.id = q.message_id WHERE q.id = ?
    """
    row = tx.execute(sql, (question_id,)).fetchone()
    began = row["text"].strip().splitlines()[0][:80]
    body = notice(kind, sentence, question=question_id, agent=row["answerer"], text=began)
    cause = Cause("system", None, row["chain_id"], (row["hops"] or 0) + 1)
    # An asker that is gone must not stop the hive's clock: what is refused stays refused.
    post(tx, [Letter(SYSTEM, (row["asker"],), body, row["message_id"], cause=cause)], limits)


_OF_MESSAGE = """
    SELECT id, asker, answerer, 0 AS answered FROM questions WHERE message_id = :message AND state = 'open'
    UNION ALL
    SELECT id, asker, answerer, 1 FROM questions WHERE answer_id = :message AND state = 'answered'
"""
