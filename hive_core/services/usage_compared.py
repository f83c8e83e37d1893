"""Two counts of a turn's tokens: what its program told of them, and what the relay saw, which is what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hive_core.services.charges import Tokens

# kind → how the program tells it of the turn, and of each model that the turn used
_KINDS = {
    "input": ("input_tokens", "inputTokens"),
    "output": ("output_tokens", "outputTokens"),
    "cache_read": ("cache_read_input_tokens", "cacheReadInputTokens"),
    "cache_write": ("cache_creation_input_tokens", "cacheCreationInputTokens"),
}


def compare(
    told: Mapping[str, Any] | None, whole: Sequence[Tokens], cut: Sequence[Tokens], done: bool
) -> dict[str, Any] | None:
    """{"told", "seen"} by kind where the two differ; None where they agree.

    told   what the turn's ack said: an agent's claim. Its counts by model go before those of the turn, which leave out
           the calls that the program made on its own account
    whole  of each call of the turn whose answer was passed on to its end
    cut    of the others, which the program counts, or not, or in part
    done   the turn ended well: then to tell nothing is a difference, too
    """
    least = {kind: _sum(whole, kind) for kind in _KINDS}
    most = {kind: _sum([*whole, *cut], kind) for kind in _KINDS}
    if told is None:
        return {"told": None, "seen": most} if done and any(least.values()) else None
    claims = {kind: _claim(told, *names) for kind, names in _KINDS.items()}
    agree = all(_between(claims[kind], least[kind], most[kind]) for kind in _KINDS)
    return None if agree else {"told": claims, "seen": most}


def _between(claim: int | None, least: int | None, most: int | None) -> bool:
    return claim is None or ((least is None or least <= claim) and (most is None or claim <= most))


def _sum(seen: Sequence[Tokens], kind: str) -> int | None:
    """None when it is not known of some call."""
    kinds = ("cache_write_5m", "cache_write_1h") if kind == "cache_write" else (kind,)
    # Of what is kept in a cache the provider may say nothing where there is nothing.
    if any(tokens["input"] is None or (kind == "output" and tokens[kind] is None) for tokens in seen):
        return None
    return sum(tokens[one] or 0 for tokens in seen for one in kinds)


def _claim(told: Mapping[str, Any], name: str, name_of_model: str) -> int | None:
    models = told.get("models")
    if isinstance(models, dict) and models:
        counts = [_count(one.get(name_of_model, 0)) for one in models.values() if isinstance(one, dict)]
        return None if None in counts else sum(count or 0 for count in counts)
    return _count(told.get(name))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
