"""What a question and its answer are made of: how they are read, what fits, and the messages that carry them."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides, instant, quoted
from hive_core.protocol.words import OPERATOR, AgentName, MessageBody, parse_recipient, parse_text, shown
from hive_core.services.attachments import Attached, body_with

# A line may be one byte and its mark are two more: also as a message, three times as long, it has to stand inline.
QUESTION_LIMIT_BYTES = 16 * 1024
ANSWER_LIMIT_BYTES = 16 * 1024
OPTIONS_LIMIT = 12
OPTION_LIMIT_BYTES = 200


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
    attached: tuple[Attached, ...] = ()


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
    text = answer.text
    if not choices and text is None:
        if not answer.attached or not (question.free_text or not options):
            raise Refusal("usage", f"{cannot} with nothing: give {_what_fits(question)}")
        text = body_with(None, len(answer.attached))
    return Answer(choices, text, answer.attached)


def _what_fits(question: Question) -> str:
    if not question.options:
        return "text"
    some = "one or more of its options" if question.multi else "one of its options"
    return f"{some}, or text of your own" if question.free_text else some


def _lines(text: str) -> str:
    """Each line behind a mark, so that none can pass for ours."""
    return "\n".join(f"| {line}" for line in text.splitlines())


def asked(number: int, asker: AgentName, ask: Ask, expires_at_ms: int) -> MessageBody:
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


def answered(question: Question, answer: Answer) -> MessageBody:
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
