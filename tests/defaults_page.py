"""docs/defaults.md, made from the code: `python -m tests.defaults_page` writes it anew."""

from __future__ import annotations

from pathlib import Path

from pydantic.fields import FieldInfo

from hive_core.limits import Limits
from hive_core.protocol import harness, words
from hive_core.services import (
    archive,
    broker,
    leases,
    profiles,
    question_words,
    questions,
    refused_requests,
    reminders,
    rests,
    retention,
    schedules,
    tool_calls,
    turns,
)
from hive_core.sockets import admin

PAGE = Path(__file__).resolve().parents[1] / "docs" / "defaults.md"

HEAD = """\
# Defaults

Made from the code by `python -m tests.defaults_page`; a test holds the two equal.

## What can be set

Each is a key of the daemon's configuration. An agent's `agent.toml` may set its own `pair_rate_per_hour`, and with
`recipients` whom it may write to at all. How long its program's process is kept for further turns is set there too
([decision 11](decisions/0011-one-process-many-turns.md)).

| key | default | what it is |
|---|---|---|
"""
FIXED = """
## What is fixed

| limit | value |
|---|---|
"""
NEVER = """
## What never ends by itself

An approval waits for the operator's click, a held message for `hive release` or `hive drop`, a dead one for
`hive requeue` or `hive drop`. Approvals, questions, held and dead messages are never deleted for their age.
"""


def in_words(name: str, value: float) -> str:
    """A value with its unit, which its name tells."""
    if name.lower().endswith("_bytes"):
        mib, kib = value / 2**20, value / 2**10
        return f"{mib:g} MiB" if mib >= 1 else f"{kib:g} KiB" if kib >= 1 else f"{value:g} bytes"
    if name.lower().endswith("_s"):
        for unit, seconds in (("days", 86_400), ("h", 3600)):
            if value >= 2 * seconds or value == seconds:
                return f"{value / seconds:g} {unit}"
        return f"{value:g} s"
    return f"{value:,}"


FIXED_ROWS = {
    "a message that stands inline": in_words("_bytes", words.INLINE_LIMIT_BYTES),
    "a whole message; what goes on behind the inline part is read with `read_body`": in_words(
        "_bytes", words.BODY_LIMIT_BYTES
    ),
    "messages of one `recv`": in_words("", broker.RECV_LIMIT),
    "bodies of one `recv` together, but one message always": in_words("_bytes", leases.RECV_BYTES),
    "how long one `recv` waits": in_words("_s", broker.RECV_WAIT_LIMIT_S),
    "the longest rest, where doubling ends": in_words("_s", rests.REST_MOST_S),
    "how long the answer of a tool call is known to one that is sent again": in_words(
        "_s", tool_calls.TOOL_CALL_KEPT_S
    ),
    "how often the harness of a quiet turn says that it lives": in_words("_s", harness.RENEW_EVERY_S),
    "a question": in_words("_bytes", question_words.QUESTION_LIMIT_BYTES),
    "an answer to one": in_words("_bytes", question_words.ANSWER_LIMIT_BYTES),
    "options of a question": in_words("", question_words.OPTIONS_LIMIT),
    "open questions of one asker": in_words("", questions.OPEN_LIMIT),
    "how long a question waits at least": in_words("_s", questions.TTL_LEAST_S),
    "how far ahead a reminder is": in_words("_s", reminders.AHEAD_MOST_S),
    "open reminders of one agent": in_words("", reminders.OPEN_LIMIT),
    "how often a schedule fires at most: once in": in_words("_s", schedules.EVERY_LEAST_S),
    "how late a schedule still fires; what is later was missed": in_words("_s", schedules.LATE_MOST_MS / 1000),
    "schedules": in_words("", schedules.SCHEDULES_LIMIT),
    "how far forgetting follows a clock that leapt: in an hour at most": f"{retention.FOLLOW_MOST_MS // 3_600_000} h",
    "messages that one search finds": in_words("", archive.SEARCH_LIMIT),
    "the words of a search": f"{archive.TEXT_LIMIT_BYTES:,} bytes",
    "different words and phrases of one": in_words("", archive.WORDS_LIMIT),
    "the beginning of a word in one (`wor*`): at least": f"{archive.PREFIX_LEAST} characters",
    "how long a search runs; one at a time, and nothing else waits for it": in_words("_s", archive.SEARCH_S),
    "the status of an agent": f"{profiles.STATUS_LIMIT} characters",
    "refused requests of one asker that are told one by one in an hour, of each kind and code": in_words(
        "", refused_requests.TOLD_PER_HOUR
    ),
    "a client's own key of a message": in_words("_bytes", admin.KEY_LIMIT_BYTES),
    "an agent's name": f"{words.NAME_LIMIT} characters",
    "a persona": in_words("_bytes", words.PERSONA_LIMIT_BYTES),
    "a reason or a note": in_words("_bytes", words.NOTE_LIMIT_BYTES),
    "kept lines of one turn": in_words("", turns.LINES_PER_TURN),
    "kept lines of one agent": in_words("", turns.LINES_PER_AGENT),
    "how long lines are kept": in_words("_s", turns.LINE_KEPT_S),
}


def page() -> str:
    keys = "".join(_row(name, field) for name, field in Limits.model_fields.items())
    return HEAD + keys + FIXED + "".join(f"| {what} | {value} |\n" for what, value in FIXED_ROWS.items()) + NEVER


def _row(name: str, field: FieldInfo) -> str:
    assert field.description, f"{name} needs a description"
    default = field.default if isinstance(field.default, str) else in_words(name, field.default)
    return f"| `{name}` | {default} | {field.description} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
