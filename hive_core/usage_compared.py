"""Two counts of a turn's tokens: what its program told of them, and what the relay saw, which is what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hive_core.charges import Tokens

# kind → how the program tells it of the turn, and of each model that the turn used
_KINDS = {
    "input": ("input_tokens", "inputTokens"),
    "output": ("output_tokens", "outputTokens"),
    "cache_read": ("cache_read_input_tokens", "cacheReadInputTokens"),
    "cache_write": ("cache_creation_input_tokens", "cacheCreationInputTokens"),
}


def compare(told: Mapping[str, Any] | None, seen: Sequence[Tokens], done: bool) -> dict[str, Any] | None:
    """{"told", "seen"} by kind where the two differ; None where they agree.

    told  what the turn's ack said: an agent's claim. Its counts by model go before those of the turn, which leave out
          the calls that the program made on its own account
    seen  of each call of the turn. A kind that is not known of one of them is not compared
    done  the turn ended well: then to tell nothing is a difference, too
    """
    sums = {kind: _sum(seen, kind) for kind in _KINDS}
    if told is None:
        return {"told": None, "seen": sums} if done and any(sums.values()) else None
    claims = {kind: _claim(told, *names) for kind, names in _KINDS.items()}
    both = [kind for kind in _KINDS if sums[kind] is not None and claims[kind] is not None]
    return {"told": claims, "seen": sums} if any(sums[kind] != claims[kind] for kind in both) else None


def _sum(seen: Sequence[Tokens], kind: str) -> int | None:
    kinds = ("cache_write_5m", "cache_write_1h") if kind == "cache_write" else (kind,)
    if kind in ("input", "output") and any(tokens[kind] is None for tokens in seen):
        return None  # of what is kept in a cache the provider says nothing where there is nothing
    return sum(tokens[one] or 0 for tokens in seen for one in kinds)


def _claim(told: Mapping[str, Any], name: str, name_of_model: str) -> int | None:
    models = told.get("models")
    if isinstance(models, dict) and models:
        counts = [_count(one.get(name_of_model, 0)) for one in models.values() if isinstance(one, dict)]
        return None if None in counts else sum(count or 0 for count in counts)
    return _count(told.get(name))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
