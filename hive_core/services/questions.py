"""Questions: put by an agent to another agent or to the operator. The answer comes back as a message.

open ──▶ answered by whom it was put to, expired at its instant, cancelled by its asker, dropped by the operator
  ▲          │
  └──────────┘ the answer was taken back before it was read
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import instant
from hive_core.protocol.words import (
    OPERATOR,
    AgentName,
)
from hive_core.services.attachments import Upload
from hive_core.services.bodies import Bodies
from hive_core.services.post import Letter, post_counted, unless_refused
from hive_core.services.question_ends import TOPIC, cancel_put_with, expire, tell_answered, tell_asked, tell_held
from hive_core.services.question_words import Answer, Ask, Question, answered, asked, fit, from_row
from hive_core.services.tool_calls import first_answer, once
from hive_core.services.withdrawal import withdraw
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

OPEN_LIMIT = 50  # questions of one asker that wait
TTL_LEAST_S = 10.0
BATCH = 100  # that expire in one transaction


class Questions:
    """Also a Timer of the hive's clock: what nobody answered in time expires."""

    topic = TOPIC

    def __init__(self, store: Store, limits: Limits | None = None, bodies: Bodies | None = None) -> None:
        """bodies: what keeps the files of answers; without it none come with them."""
        self._store = store
        self._limits = limits or Limits()
        self._bodies = bodies

    # -- asking and answering -----------------------------------------------------------------------------------------

    async def ask(self, asker: AgentName, ask: Ask, key: str | None = None) -> dict[str, Any]:
        """Put a question; {"question", "message"} at once, with `held` as `send` has it.

        A repeated `key` gets the first answer. Raises Refusal, and then nobody was asked.
        """
        ttl_s = self._ttl_s(ask)
        if ask.to == asker:
            raise Refusal("usage", "cannot ask yourself: name another agent, or operator")

        def write(tx: Transaction) -> dict[str, Any] | Refusal:
            if first := first_answer(tx, asker, key, "ask"):
                return first
            (mine,) = tx.execute(
                "SELECT count(*) FROM questions INDEXED BY questions_from WHERE asker = ? AND state = 'open'", (asker,)
            ).fetchone()
            if mine >= OPEN_LIMIT:
                return Refusal(
                    "refused",
                    f"cannot ask: {mine} questions of yours wait for an answer, which is the limit; cancel some",
                )
            (number,) = tx.execute(_NEXT_ID).fetchone()
            expires_at_ms = tx.now_ms + int(ttl_s * 1000)
            sent = post_counted(tx, Letter(asker, (ask.to,), asked(number, asker, ask, expires_at_ms)), self._limits)
            if isinstance(sent, Refusal):
                return sent
            row = (number, asker, ask.to, ask.text, json.dumps(ask.options), int(ask.multi), int(ask.free_text))
            tx.insert("questions", _COLUMNS, [(*row, sent["message"], "open", tx.now_ms, expires_at_ms, tx.now_ms)])
            tx.emit("question_asked", asker, ask.to, question=number, message=sent["message"])
            tx.wake(TOPIC)
            if ask.to == OPERATOR and not sent.get("held"):
                tell_asked(tx, number, self._limits)
            return once(tx, asker, key, "ask", lambda: {"question": number, **sent})

        return unless_refused(await self._store.write(write))

    def _ttl_s(self, ask: Ask) -> float:
        most = self._limits.question_ttl_s
        ttl_s = most if ask.ttl_s is None else ask.ttl_s
        if not min(TTL_LEAST_S, most) <= ttl_s <= most:
            raise Refusal("usage", f"cannot wait {ttl_s:g} s for an answer: give {TTL_LEAST_S:g} to {most:g} (ttl_s)")
        return ttl_s

    async def answer(
        self, who: AgentName, question_id: int, answer: Answer, key: str | None = None, files: Sequence[Upload] = ()
    ) -> dict[str, Any]:
        """Answer a question that was put to `who`: {"question", "message"}, the message being the answer. Its files are
        on disk then too, and told as `files`: what they are called now.

        A repeated `key` gets the first result. Raises Refusal: it was answered (by whom and when), it has expired or
        was cancelled, the answer does not fit, or the message cannot be sent.
        """
        if self._bodies is None or not files:
            return await self._answer(who, question_id, answer, key)
        async with self._bodies.kept_files(files, self._limits) as attached:
            sent = await self._answer(who, question_id, answer._replace(attached=attached), key)
        return {**sent, "files": [file.name for file in attached]}

    async def _answer(self, who: AgentName, question_id: int, answer: Answer, key: str | None) -> dict[str, Any]:

        def write(tx: Transaction) -> dict[str, Any] | Refusal:
            if first := first_answer(tx, who, key, "answer"):
                return first
            question = _open_for(tx, who, question_id)
            given = fit(question, answer)
            body = answered(question, given)
            letter = Letter(who, (question.asker,), body, question.message_id, attached=given.attached)
            sent = post_counted(tx, letter, self._limits)
            if isinstance(sent, Refusal):
                return sent
            tx.execute(
                "UPDATE questions SET state = 'answered', settled_at_ms = ?, choices = ?, answer = ?, answer_id = ?"
                " WHERE id = ?",
                (tx.now_ms, json.dumps(given.choices), given.text, sent["message"], question_id),
            )
            if who == OPERATOR:
                _mark_read(tx, question.message_id)
                tell_answered(tx, question_id, question.asker, self._limits)
            tx.emit("question_answered", who, question.asker, question=question_id, message=sent["message"])
            if sent.get("held"):
                tell_held(tx, question_id, self._limits)
            return once(tx, who, key, "answer", lambda: {"question": question_id, **sent})

        return unless_refused(await self._store.write(write))

    async def cancel(self, asker: AgentName, question_id: int) -> dict[str, Any]:
        """Take a question back: {"question", "reached"}, where reached says whether it was read already.

        Again is fine. Raises Refusal when it is not the asker's, or was answered or has expired.
        """

        def write(tx: Transaction) -> dict[str, Any]:
            row = tx.execute("SELECT * FROM questions WHERE id = ? AND asker = ?", (question_id, asker)).fetchone()
            if row is None:
                raise Refusal("not_found", f"cannot cancel question {question_id}: you did not ask it")
            if row["state"] not in ("open", "cancelled"):
                raise Refusal("conflict", f"cannot cancel question {question_id}: {_end_of(from_row(row))}")
            if row["state"] == "open":
                cancel_put_with(tx, asker, row["message_id"])
                withdraw(tx, asker, [(row["message_id"], row["answerer"])])
            sql = "SELECT 1 FROM deliveries WHERE message_id = ? AND state != 'dropped'"
            reached = tx.execute(sql, (row["message_id"],)).fetchone() is not None
            return {"question": question_id, "reached": reached}

        return await self._store.write(write)

    # -- the clock ----------------------------------------------------------------------------------------------------

    def fire(self, tx: Transaction) -> None:
        """Expire what is over its time, and wake each asker with a message.

        What was asked at an instant that the clock has still to reach, so before it was set back, waits as long as
        ever from when that was seen.
        """
        given = {"now": tx.now_ms, "batch": BATCH}
        tx.execute(_SET_BACK, given)
        for row in tx.execute(_OVER, given).fetchall():
            expire(tx, row["id"], self._limits)

    def next_after(self, tx: Transaction) -> int | None:
        sql = "SELECT min(expires_at_ms) FROM questions INDEXED BY questions_open WHERE state = 'open'"
        at: int | None = tx.execute(sql).fetchone()[0]
        return at

    # -- reading ------------------------------------------------------------------------------------------------------

    async def get(self, question_id: int) -> Question:
        """One question. Raises Refusal("not_found")."""
        question = await self.find(question_id)
        if question is None:
            raise Refusal("not_found", f"cannot find question {question_id}; `hive questions` shows what waits")
        return question

    async def find(self, question_id: int) -> Question | None:
        """One question; None when there was none."""
        row = await self._store.row("SELECT * FROM questions WHERE id = ?", (question_id,))
        return None if row is None else from_row(row)

    async def open_to(self, who: str, limit: int = 100) -> list[Question]:
        """What waits for the answer of `who`, oldest first. One that is held has not reached anybody yet."""
        sql = f"""
            SELECT q.* FROM questions q INDEXED BY questions_to WHERE answerer = ? AND {_REACHES} ORDER BY q.id LIMIT ?
        """
        return [from_row(row) for row in await self._store.rows(sql, (who, limit))]

    async def open_from(self, who: str, limit: int = 100) -> list[Question]:
        """What `who` waits to be answered, oldest first."""
        sql = """
            SELECT * FROM questions INDEXED BY questions_from WHERE asker = ? AND state = 'open' ORDER BY id LIMIT ?
        """
        return [from_row(row) for row in await self._store.rows(sql, (who, limit))]

    async def open_of_all(self, limit: int = 100) -> list[Question]:
        """What waits for anybody's answer, oldest first."""
        sql = "SELECT * FROM questions INDEXED BY questions_open WHERE state = 'open' ORDER BY id LIMIT ?"
        return [from_row(row) for row in await self._store.rows(sql, (limit,))]

    async def held_from(self, who: str, limit: int = 100) -> list[Question]:
        """What was put to `who` and waits for the operator's release, oldest first."""
        sql = """
            SELECT q.* FROM questions q INDEXED BY questions_to
            JOIN deliveries d ON d.message_id = q.message_id AND d.recipient = q.answerer
            WHERE q.answerer = ? AND q.state = 'open' AND d.state = 'held' ORDER BY q.id LIMIT ?
        """
        return [from_row(row) for row in await self._store.rows(sql, (who, limit))]

    async def put_with(self, message_id: int) -> Question | None:
        """The question that a message put."""
        row = await self._store.row("SELECT * FROM questions WHERE message_id = ?", (message_id,))
        return None if row is None else from_row(row)

    async def reaches(self, question: Question) -> bool:
        """Whether it waits for its answer, and is not held."""
        sql = f"SELECT 1 FROM questions q WHERE id = ? AND {_REACHES}"
        return await self._store.row(sql, (question.id,)) is not None


_SET_BACK = """
    UPDATE questions INDEXED BY questions_asked SET counts_from_ms = :now
    WHERE state = 'open' AND asked_at_ms > :now AND counts_from_ms > :now
"""
_OVER = """
    SELECT id FROM (
        SELECT expires_at_ms, id FROM questions INDEXED BY questions_open
        WHERE state = 'open' AND expires_at_ms <= :now
        UNION ALL
        SELECT expires_at_ms, id FROM questions INDEXED BY questions_asked
        WHERE state = 'open' AND asked_at_ms > :now AND counts_from_ms + expires_at_ms - asked_at_ms <= :now
    ) ORDER BY expires_at_ms, id LIMIT :batch
"""
_NEXT_ID = "SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'questions'"
# fmt: off
_COLUMNS = ("id", "asker", "answerer", "text", "options", "multi", "free_text", "message_id", "state",
            "asked_at_ms", "expires_at_ms", "counts_from_ms")
# fmt: on
# A question whose message waits for the operator's release must not come to its answerer by another way.
_REACHES = """
    q.state = 'open' AND NOT EXISTS (
        SELECT 1 FROM deliveries d WHERE d.message_id = q.message_id AND d.state IN ('held', 'dropped')
    )
"""


def _open_for(tx: Transaction, who: AgentName, question_id: int) -> Question:
    """The question, if `who` may answer it now. Raises Refusal saying why not."""
    cannot = f"cannot answer question {question_id}"
    row = tx.execute("SELECT * FROM questions WHERE id = ? AND answerer = ?", (question_id, who)).fetchone()
    if row is None:
        raise Refusal("not_found", f"{cannot}: it was not put to you")
    question = from_row(row)
    if question.state != "open":
        raise Refusal("conflict", f"{cannot}: {_end_of(question)}")
    if tx.execute(f"SELECT 1 FROM questions q WHERE id = ? AND {_REACHES}", (question_id,)).fetchone() is None:
        number = question.message_id
        why = f"its message is held for the operator, or was dropped; `hive release {number}` lets a held one go"
        raise Refusal("refused", f"{cannot}: {why}")
    if question.expires_at_ms <= tx.now_ms:
        raise Refusal("conflict", f"{cannot}: it has expired at {instant(question.expires_at_ms)}")
    return question


def _end_of(question: Question) -> str:
    at = instant(question.settled_at_ms or 0)
    match question.state:
        case "answered":
            return f"{question.answerer} answered it at {at}"
        case "expired":
            return f"it has expired at {at}"
        case "dropped":
            return f"the operator dropped it at {at}"
        case _:
            return f"{question.asker} cancelled it at {at}"


def _mark_read(tx: Transaction, message_id: int) -> None:
    """Who answers has read: the message is no longer unread in the operator's inbox."""
    changed = tx.execute(
        "UPDATE deliveries SET state = 'acked', settled_at_ms = ?"
        " WHERE message_id = ? AND recipient = 'operator' AND state = 'queued'",
        (tx.now_ms, message_id),
    ).rowcount
    if changed:
        tx.emit("inbox_read", OPERATOR, messages=[message_id])


def open_questions(rows: Sequence[Question]) -> list[dict[str, Any]]:
    """Questions in short, for a list of loose ends."""
    return [
        {
            "question": one.id,
            "asker": one.asker,
            "answerer": one.answerer,
            "text": one.text if len(one.text) <= 200 else f"{one.text[:199]}…",
            "options": list(one.options),
            "expires_at_ms": one.expires_at_ms,
        }
        for one in rows
    ]
