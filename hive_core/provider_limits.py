"""What the provider's answers tell of its limits: until when one is reached, and how much of each window is used.

An account of a subscription (an OAuth token) has windows of 5 hours and 7 days: `anthropic-ratelimit-unified-status`,
`-reset` and `-representative-claim`, and of each window `anthropic-ratelimit-unified-5h-utilization` (0 to 1),
`-reset` (seconds since 1970) and `-status`. An API key has `anthropic-ratelimit-{requests,tokens,input-tokens,
output-tokens}-{limit,remaining,reset}`, whose resets are RFC 3339. Either may get `retry-after`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

# No reset is believed that is further away: the longest window is of seven days, and a clock may have been set back.
FAR_MS = 8 * 24 * 3600 * 1000
WINDOWS = {"5h": "five_hour", "7d": "seven_day"}  # as a header has it → as `representative-claim` has it
_LENGTH_MS = {"5h": 5 * 3600 * 1000, "7d": 7 * 24 * 3600 * 1000}
_BUCKETS = ("requests", "tokens", "input-tokens", "output-tokens")
_UNIFIED = "anthropic-ratelimit-unified"


class Window(NamedTuple):
    """One window of an account, as it was told last."""

    used: float  # 0 to 1, and above where the account may overdraw
    reset_ms: int | None
    seen_ms: int

    def is_over(self, name: str, now_ms: int) -> bool:
        """Whether nothing is known of it any more: it was reset, or was told longer ago, or later, than it lasts."""
        was_reset = self.reset_ms is not None and self.reset_ms <= now_ms
        return was_reset or abs(now_ms - self.seen_ms) >= _LENGTH_MS[name]

    def to_wire(self) -> dict[str, Any]:
        return {**self._asdict(), "left": max(0.0, 1 - self.used)}


def windows_of(headers: Mapping[str, str], now_ms: int) -> dict[str, Window]:
    """The windows that this answer tells of; what it does not tell is unknown."""
    found = {}
    for name in WINDOWS:
        used = _number(headers.get(f"{_UNIFIED}-{name}-utilization"))
        if used is not None and 0 <= used <= 100:
            found[name] = Window(used, instant_ms(headers.get(f"{_UNIFIED}-{name}-reset"), now_ms), now_ms)
    return found


def reset_of(headers: Mapping[str, str], now_ms: int) -> int | None:
    """The instant, in ms since 1970, until which an answer of 429 or 529 says to wait; None when it says none."""
    told = [at for at in (retry_after_ms(headers.get("retry-after"), now_ms), *_unified_resets(headers, now_ms)) if at]
    return max(told or _bucket_resets(headers, now_ms), default=None)


def _unified_resets(headers: Mapping[str, str], now_ms: int) -> Iterator[int | None]:
    """Of every window that is used up; where none says so of itself, of the one that speaks for all."""
    rejected = [name for name in WINDOWS if headers.get(f"{_UNIFIED}-{name}-status") == "rejected"]
    claim = headers.get(f"{_UNIFIED}-representative-claim")
    named = rejected or [name for name, its_claim in WINDOWS.items() if its_claim == claim]
    resets = [instant_ms(headers.get(f"{_UNIFIED}-{name}-reset"), now_ms) for name in named]
    yield from resets if any(resets) else [instant_ms(headers.get(f"{_UNIFIED}-reset"), now_ms)]


def _bucket_resets(headers: Mapping[str, str], now_ms: int) -> list[int]:
    empty = [name for name in _BUCKETS if _number(headers.get(f"anthropic-ratelimit-{name}-remaining")) == 0]
    resets = [instant_ms(headers.get(f"anthropic-ratelimit-{name}-reset"), now_ms) for name in empty]
    return [at for at in resets if at is not None]


def retry_after_ms(raw: str | None, now_ms: int) -> int | None:
    """Seconds, or a date of HTTP (RFC 9110 10.2.3)."""
    if (seconds := _number(raw)) is not None:
        return _soon(now_ms + math.ceil(seconds * 1000), now_ms)
    try:
        return _soon(int(parsedate_to_datetime(raw or "").timestamp() * 1000), now_ms)
    except (ValueError, TypeError, OverflowError):
        return None


def instant_ms(raw: str | None, now_ms: int) -> int | None:
    """Seconds since 1970, or RFC 3339."""
    if (seconds := _number(raw)) is not None:
        return _soon(math.ceil(seconds * 1000), now_ms)
    try:
        at = datetime.fromisoformat(raw or "")
        return _soon(int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000), now_ms)
    except (ValueError, OverflowError):
        return None


def _soon(at_ms: int, now_ms: int) -> int | None:
    return at_ms if now_ms < at_ms <= now_ms + FAR_MS else None


def _number(raw: str | None) -> float | None:
    try:
        number = float(raw or "")
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e15 else None
