"""Questions: put by an agent to another agent or to the operator. The answer comes back as a message.

open ──▶ answered by whom it was put to, expired at its instant, cancelled by its asker, dropped by the operator
  ▲          │
  └──────────┘ the answer was taken back before it was read
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides, instant, quoted
from hive_core.protocol.words import (
    OPERATOR,
    AgentName,
    MessageBody,
    parse_recipient,
    parse_text,
    shown,
)
from hive_core.services.post import Letter, post
from hive_core.services.question_ends import TOPIC, cancel_put_with, expire, tell_answered, tell_asked, tell_held
from hive_core.services.tool_calls import first_answer, once
from hive_core.services.withdrawal import withdraw
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

# A line may be one byte and its mark are two more: also as a message, three times as long, it has to stand inline.
QUESTION_LIMIT_BYTES = 16 * 1024
ANSWER_LIMIT_BYTES = 16 * 1024
OPTIONS_LIMIT = 12
OPTION_LIMIT_BYTES = 200
OPEN_LIMIT = 50  # questions of one asker that wait
TTL_LEAST_S = 10.0
BATCH = 100  # that expire in one transaction


class Ask(NamedTuple):
    """A question that wants to be put."""

    to: AgentName
    text: str
    options: tuple[str, ...] = ()
    multi: bool = False
    free_text: bool = False
    ttl_s: float | None = None  # None: as long as the limits allow


class Answer(NamedTuple):
    choices: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    id: int
    asker: AgentName
    answerer: AgentName
    text: str
    options: tuple[str, ...]
    multi: bool
    free_text: bool  # without options any text is an answer
    message_id: int
    state: str
    asked_at_ms: int
    expires_at_ms: int
    settled_at_ms: int | None
    choices: tuple[str, ...]
    answer: str | None
    answer_id: int | None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def parse_ask(
    to: object, text: object, options: object = None, multi: bool = False, free_text: bool = False, ttl_s: object = None
) -> Ask:
    """A question's words. Raises Refusal("usage") naming the one that is no good."""
    recipient, text = parse_recipient(to), parse_text(text, "question", QUESTION_LIMIT_BYTES)
    if options is None:
        options = []
    if not isinstance(options, list | tuple) or len(options) == 1 or len(options) > OPTIONS_LIMIT:
        raise Refusal("usage", f"cannot ask with these options: give none, or 2 to {OPTIONS_LIMIT} in a list")
    given = tuple(parse_text(option, "option", OPTION_LIMIT_BYTES).strip() for option in options)
    if twice := [option for option in given if given.count(option) > 1]:
        raise Refusal("usage", f"cannot ask with these options: {shown(twice[0])} stands there twice")
    if hidden := [option for option in given if "\n" in option or "\t" in option or hides(option)]:
        raise Refusal("usage", f"cannot ask with the option {shown(hidden[0])}: give one line of visible characters")
    if multi and not given:
        raise Refusal("usage", "cannot ask for several of no options: give `options`, or leave `multi` out")
    if ttl_s is not None and (isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float)):
        raise Refusal("usage", f"cannot use {shown(ttl_s)} as ttl_s: give a number of seconds")
    return Ask(recipient, text, given, multi, free_text, ttl_s)


def parse_answer(choices: object = None, text: object = None) -> Answer:
    """An answer's words; whether they fit is the question's to say. Raises Refusal("usage")."""
    if choices is None:
        choices = []
    if not isinstance(choices, list | tuple) or len(choices) > OPTIONS_LIMIT:
        raise Refusal("usage", f"cannot answer: `choices` must be a list of at most {OPTIONS_LIMIT}")
    chosen = tuple(dict.fromkeys(parse_text(choice, "choice", OPTION_LIMIT_BYTES).strip() for choice in choices))
    return Answer(chosen, None if text is None else parse_text(text, "answer", ANSWER_LIMIT_BYTES))


def fit(question: Question, answer: Answer) -> Answer:
    """The answer as the question's own options; the number of one stands for it. Raises Refusal saying what fits."""
    cannot = f"cannot answer question {question.id}"
    options = question.options
    numbered = {str(number): option for number, option in enumerate(options, 1)}
    choices = tuple(dict.fromkeys(one if one in options else numbered.get(one, one) for one in answer.choices))
    if wrong := [one for one in choices if one not in options]:
        listed = ", ".join(map(quoted, options)) if options else "none, give text"
        raise Refusal("usage", f"{cannot}: {shown(wrong[0])} is none of its options; they are {listed}")
    if answer.text is not None and options and not question.free_text:
        raise Refusal("usage", f"{cannot} with text: choose of its options {', '.join(map(quoted, options))}")
    if len(choices) > 1 and not question.multi:
        raise Refusal("usage", f"{cannot} with {len(choices)} choices: it takes one")
    if not choices and answer.text is None:
        raise Refusal("usage", f"{cannot} with nothing: give {_what_fits(question)}")
    return Answer(choices, answer.text)


def _what_fits(question: Question) -> str:
    if not question.options:
        return "text"
    some = "one or more of its options" if question.multi else "one of its options"
    return f"{some}, or text of your own" if question.free_text else some


def _lines(text: str) -> str:
    """Each line behind a mark, so that none can pass for ours."""
    return "\n".join(f"| {line}" for line in text.splitlines())


def _asked(number: int, asker: AgentName, ask: Ask, expires_at_ms: int) -> MessageBody:
    """The message that puts a question: how to answer, and then the asker's words, marked as such."""
    if ask.to == OPERATOR:
        how = f"`hive answer {number}` or a click on the dashboard answers it"
    else:
        how = f"The tool `answer` with question={number} answers it, and `send` does not"
    lines = [f"question {number}. {how}; it waits until {instant(expires_at_ms)}."]
    if ask.options:
        fits = "choices: one or more of" if ask.multi else "choices: one of"
        lines += [f"{fits} these{', or text of your own' if ask.free_text else ''}:"]
        lines += [f"  {n}. {quoted(option)}" for n, option in enumerate(ask.options, 1)]
    return MessageBody("\n".join([*lines, f'{asker} asks, each line behind "| ":', _lines(ask.text)]))


def _answered(question: Question, answer: Answer) -> MessageBody:
    first = question.text.strip().splitlines()[0]
    about = quoted(first if len(first) <= 80 else f"{first[:79]}…")
    lines = [f"answer to your question {question.id}, {about}:"]
    if answer.choices:
        lines.append(f"chosen: {', '.join(map(quoted, answer.choices))}")
    if answer.text is not None:
        lines.append(_lines(answer.text))
    return MessageBody("\n".join(lines))


def from_row(row: sqlite3.Row) -> Question:
    values = {key: row[key] for key in row.keys() if key in Question.__slots__}  # noqa: SIM118 - a Row is no mapping
    values["options"] = tuple(json.loads(row["options"]))
    values["choices"] = tuple(json.loads(row["choices"] or "[]"))
    return Question(**{**values, "multi": bool(row["multi"]), "free_text": bool(row["free_text"])})


class Questions:
    """Also a Timer of the hive's clock: what nobody answered in time expires."""

    topic = TOPIC

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()

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
            sent = post_counted(tx, Letter(asker, (ask.to,), _asked(number, asker, ask, expires_at_ms)), self._limits)
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

    async def answer(self, who: AgentName, question_id: int, answer: Answer, key: str | None = None) -> dict[str, Any]:
        """Answer a question that was put to `who`: {"question", "message"}, the message being the answer.

        A repeated `key` gets the first result. Raises Refusal: it was answered (by whom and when), it has expired or
        was cancelled, the answer does not fit, or the message cannot be sent.
        """

        def write(tx: Transaction) -> dict[str, Any] | Refusal:
            if first := first_answer(tx, who, key, "answer"):
                return first
            question = _open_for(tx, who, question_id)
            given = fit(question, answer)
            sent = post_counted(
                tx, Letter(who, (question.asker,), _answered(question, given), question.message_id), self._limits
            )
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


def post_counted(tx: Transaction, letter: Letter, limits: Limits) -> dict[str, Any] | Refusal:
    """Send as a part of a change. A refusal is a value here: what `post` counted of it has to stay."""
    try:
        sent: dict[str, Any] = post(tx, [letter], limits)[0].unwrap()
    except Refusal as refusal:
        return refusal
    return sent


def unless_refused(result: dict[str, Any] | Refusal) -> dict[str, Any]:
    if isinstance(result, Refusal):
        raise result
    return result


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
