"""What the hive itself says to agents and to the operator: one shape, which a model and a program can read.

    container_crash: iris ended with code 1, and is started again by itself
    agent: iris
    last_words: "segmentation fault"

The first line is a kind and a sentence, both the hive's words. Each line after it is a field: a number, names of the
hive's (several with ", " between them), or, in quotation marks as JSON has them, what others wrote. Nothing in a field
can end its line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.frame import LINE_END
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named, quoted
from hive_core.protocol.words import MANAGER, SYSTEM, MessageBody
from hive_core.services.post import Cause, put_message
from hive_core.store.writer import Transaction

TEXT_LIMIT = 4096  # characters of a text; reminders have that many bytes at most, and are never cut
SENTENCE_LIMIT = 8192
_WORD = re.compile(r"(?!\d+\Z)[A-Za-z0-9][A-Za-z0-9._@:/+-]*")


class Kind(NamedTuple):
    """who: is told. when: that happens. fields: in their order, each left out where there is nothing to say."""

    who: str
    when: str
    fields: tuple[str, ...] = ()


Field = str | int | Sequence[str] | None

# What others wrote, or what libraries say, who quote them: always in quotation marks.
TEXTS = frozenset({"reason", "last_words", "error", "body", "text", "command", "tail"}) | frozenset(
    {"title", "labels", "author", "comment", "comment_by", "verdict", "path"}  # of people on a forge
)
_ASKER = "whoever asked"
KINDS: dict[str, Kind] = {
    "approval_resolved": Kind(
        "whoever asked for it, unless that is the operator",
        "an approval came to its end: approved (and done), denied, expired or failed",
        ("approval", "what", "agent", "state", "rule", "sha", "tag", "proof", "reason"),
    ),
    "config_ready": Kind(
        "whoever asked for it, unless that is the operator",
        "an init_config was approved: the repositories of an agent to be are there to be shaped",
        ("approval", "agent", "sha"),
    ),
    "spawned": Kind(
        "hm1nd, unless it asked for it",
        "an agent was created",
        ("agent", "approval", "requested_by", "sha"),
    ),
    "welcome": Kind("a new agent", "it was created: its first message", ("agent", "requested_by", "reason")),
    "rebuilt": Kind(
        "hm1nd, unless it asked for it",
        "an agent runs on another commit",
        ("agent", "approval", "requested_by", "sha", "tag"),
    ),
    "restarted": Kind("hm1nd", "an agent that was to be restarted or updated has said hello", ("agent", "by")),
    "killed": Kind("hm1nd, unless it did it", "an agent was ended and is kept down", ("agent", "by")),
    "container_crash": Kind(
        "hm1nd",
        "another agent ended and nobody had asked it to: the first time in a row",
        ("agent", "last_words"),
    ),
    "container_quarantined": Kind(
        "hm1nd and the operator", "an agent crashed so often that it is not started any more", ("agent",)
    ),
    "needs_update": Kind(
        "hm1nd", "agents run in another shape than they would be started in, and stay so", ("agents", "revision")
    ),
    "update_failed": Kind(
        "hm1nd and the operator",
        "an agent did not come up when it was replaced",
        ("agent", "revision", "last_words"),
    ),
    "needs_login": Kind("hm1nd", "a credential is refused: only the operator can log in", ("credential", "agents")),
    "logged_in": Kind("hm1nd", "a credential that was refused works again", ("credential",)),
    "disk_quota_exceeded": Kind(
        "hm1nd; of hm1nd the operator", "directories take more than disk_quota_bytes", ("agent", "bytes", "quota_bytes")
    ),
    "budget_warning": Kind("hm1nd", "the warned part of a budget is used", ("agent",)),
    "budget_spent": Kind("hm1nd", "a budget is used up", ("agent",)),
    "question_asked": Kind("hm1nd, unless it asked", "an agent put a question to the operator", ("question", "agent")),
    "question_answered": Kind(
        "hm1nd, unless it asked", "the operator answered an agent's question", ("question", "agent")
    ),
    "question_expired": Kind(_ASKER, "nobody answered a question in time", ("question", "agent", "text")),
    "question_dropped": Kind(_ASKER, "a question, or its answer, will not come", ("question", "agent", "text")),
    "answer_held": Kind(_ASKER, "the answer waits for the operator's release", ("question", "agent", "text")),
    "message_dead": Kind("whoever sent it", "a message was given up", ("agent", "error")),
    "reminder": Kind("whoever set it", "a reminder is due", ("reminder", "body")),
    "forge_news": Kind(
        "those whom a lane names, from `forge`",
        "something happened on a forge ([forge.md](forge.md))",
        (
            *("lane", "project", "repository", "what", "number", "url", "state"),
            *("author", "labels", "title", "body", "comment_by", "verdict", "path", "line", "comment"),
        ),
    ),
    "lane_full": Kind("the operator", "a lane has told as much of forges as it may within an hour", ("project",)),
    "background": Kind(
        "whoever began it", "a command in the background has ended", ("work", "command", "output", "tail")
    ),
}


def notice(kind: str, sentence: str, **fields: Field) -> MessageBody:
    """The body of one, with those of its kind's fields that say something. The sentence is made one line."""
    lines = [f"{kind}: {_line(sentence)}"]
    known = KINDS[kind].fields
    assert fields.keys() <= set(known), f"{kind} has no field {sorted(fields.keys() - set(known))}"
    lines += [f"{name}: {_value(name, fields[name])}" for name in known if fields.get(name) not in (None, "", (), [])]
    return MessageBody("\n".join(lines))


def tell_manager(tx: Transaction, body: MessageBody, limits: Limits | None = None, cause: Cause | None = None) -> None:
    """Tell hm1nd, where there is one; the event of the same transaction says the same to everybody."""
    with suppress(Refusal):
        put_message(tx, SYSTEM, MANAGER, body, cause=cause, limits=limits)


def _line(text: str) -> str:
    line = named(" ".join(part.strip() for part in LINE_END.split(text) if part.strip()))
    return line if len(line) <= SENTENCE_LIMIT else f"{line[: SENTENCE_LIMIT - 1]}…"


def _value(name: str, value: Field) -> str:
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        if name in TEXTS or not _WORD.fullmatch(value):
            return quoted(value if len(value) <= TEXT_LIMIT else f"{value[: TEXT_LIMIT - 1]}…")
        return value
    assert value is not None
    return ", ".join(value)
