"""What a harness says of its program, checked: a claim may be false, but never large or of another form.

A field that is no good is left out, and the rest of its request counts: it must not cost a turn its lines or its ack.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from hive_core.protocol.harness import REASONS, STATES, STUCK
from hive_core.services.turn_ends import Told

DETAIL_LIMIT = 60
USAGE_LIMIT_BYTES = 16 * 1024
SESSION_LIMIT = 64
TOKENS_LIMIT = 10**9
YEAR_9999_MS = 253_402_300_800_000


class State(NamedTuple):
    state: str
    detail: str
    until_ms: int | None


def claimed_state(raw: object) -> State | None:
    """What the program does now (protocol.harness.State), None when that is not said in its form."""
    if not isinstance(raw, dict):
        return None
    state, detail = raw.get("state"), raw.get("detail")
    if not isinstance(state, str) or state not in STATES or not isinstance(detail, str):
        return None
    if state == "stuck" and detail not in STUCK:
        return None
    return State(state, printable(detail, DETAIL_LIMIT), _number(raw.get("until_ms"), YEAR_9999_MS))


def claimed_end(request: dict[str, Any]) -> Told:
    """What an ack tells besides its outcome."""
    reason, context = request.get("reason"), request.get("context")
    found = context if isinstance(context, dict) else {}
    return Told(
        reason if isinstance(reason, str) and reason in REASONS else None,
        _number(request.get("limited_until_ms"), YEAR_9999_MS),
        _number(found.get("tokens"), TOKENS_LIMIT),
        _number(found.get("window"), TOKENS_LIMIT),
        request.get("session_lost") is True,
    )


def claimed_session(raw: object) -> str | None:
    fits = isinstance(raw, str) and raw.isascii() and raw.isprintable() and len(raw) <= SESSION_LIMIT
    return raw if fits and isinstance(raw, str) else None


def claimed_usage(raw: object) -> dict[str, Any] | None:
    """What a program told of its usage, or None when it is not an object of a sensible size."""
    try:
        fits = isinstance(raw, dict) and len(json.dumps(raw, allow_nan=False)) <= USAGE_LIMIT_BYTES
    except (ValueError, RecursionError):
        return None
    return raw if fits and isinstance(raw, dict) else None


def printable(text: str, limit: int) -> str:
    """At most `limit` characters; JSON can hold half a surrogate pair, and neither sqlite nor a page can."""
    return text[:limit].encode("utf-8", "replace").decode()


def _number(raw: object, most: int) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and 0 < raw <= most else None
