"""What a turn of Claude Code took, and how full its session is: read from its results and its messages."""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hive_core.protocol.harness import Context

# In a process that takes many turns these count all of them, and `usage` the last one alone.
_COUNTED = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens", "webSearchRequests")
_NOT_COUNTED = ("contextWindow", "maxOutputTokens")
_KINDS = ("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
MODELS_LIMIT = 20  # that one turn's usage tells of
NAME_LIMIT = 100
# The tokens that fit into one request, by a pattern of the model's name; the first that fits. It is asked where neither
# agent.toml nor the program says how many there are.
WINDOWS = (
    (r"\[1m\]", 1_000_000),
    (r"claude|opus|sonnet|haiku|fable", 200_000),
)


def summed_usage(result: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What the turn took: of what its process counts over all its turns, what was not there `before`."""
    usage = result.get("usage")
    tokens = usage if isinstance(usage, dict) else {}
    return {
        **{kind: count if isinstance(count := number(tokens.get(kind)), int) else None for kind in _KINDS},
        "cost_usd": _more(result, before, "total_cost_usd"),
        "num_turns": number(result.get("num_turns")),
        "duration_ms": number(result.get("duration_ms")),
        "models": _models(result.get("modelUsage"), before.get("modelUsage")),
    }


def added(one: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any] | None:
    """What two prompts of one turn took together. What neither tells as a number is the later one's."""
    if one is None or other is None:
        return one or other
    sums: dict[str, Any] = {**one, **other}
    for key, value in other.items():
        was = one.get(key)
        if isinstance(value, dict):
            sums[key] = added(was if isinstance(was, dict) else None, value)
        elif isinstance(value, int | float) and isinstance(was, int | float) and key not in _NOT_COUNTED:
            sums[key] = value + was
    return sums


def tokens_of(message: object) -> int:
    """How full the context was with this answer of the model; 0 for what no model said.

    An answer that is streamed counts its own words only as far as they had come when it began: they are missing until
    the next answer counts them in.
    """
    usage = message.get("usage") if isinstance(message, dict) else None
    return sum(whole_number(usage.get(kind)) for kind in _KINDS) if isinstance(usage, dict) else 0


def context(tokens: int, model: str, result: dict[str, Any] | None, given_window: int | None) -> Context | None:
    """How full the session is, None when no model has answered. `given_window` wins over what the program says."""
    return (
        {"tokens": tokens, "window": given_window or _told_window(result, model) or window_of(model)}
        if tokens
        else None
    )


def window_of(model: str) -> int | None:
    """How many tokens fit into one request to a model, None where the table does not know it."""
    return next((window for pattern, window in WINDOWS if re.search(pattern, model, re.IGNORECASE)), None)


def _told_window(result: dict[str, Any] | None, model: str) -> int | None:
    models = result.get("modelUsage") if result else None
    for name, told in models.items() if isinstance(models, dict) else ():
        # It may be "claude-sonnet-5[1m]" there.
        if isinstance(told, dict) and model and name.startswith(model):
            return whole_number(told.get("contextWindow")) or None
    return None


def _models(now: object, before: object) -> dict[str, Any] | None:
    """What each model that was used took."""
    if not isinstance(now, dict):
        return None
    earlier = before if isinstance(before, dict) else {}
    models: dict[str, dict[str, Any]] = {}
    for name, told in now.items():
        if isinstance(told, dict):
            was = earlier.get(name)
            was = was if isinstance(was, dict) else {}
            more = {key: _more(told, was, key) for key in (*_COUNTED, "costUSD") if key in told}
            if any(more.values()) and len(name) <= NAME_LIMIT and len(models) < MODELS_LIMIT:
                models[name] = {**{key: number(told[key]) for key in _NOT_COUNTED if key in told}, **more}
    return models


def _more(now: dict[str, Any], before: dict[str, Any], key: str) -> float | int | None:
    """How much more there is of it now; None where nothing is known."""
    value, was = number(now.get(key)), number(before.get(key)) or 0
    if value is None:
        return None
    return round(value - was, 10) if isinstance(value, float) or isinstance(was, float) else value - was


def number(value: object) -> float | int | None:
    """A finite number of a sensible size: one that int() takes, and that the host can read."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2**53 else None


def whole_number(value: object) -> int:
    found = number(value)
    return found if isinstance(found, int) else 0
