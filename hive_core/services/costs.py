"""What calls to the model have cost, summed up by agent, model, cause or day."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hive_core.prices import Prices
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_instant, shown
from hive_core.services.charges import DAY_MS, SUMS, TOKEN_COLUMNS
from hive_core.store.door import Store

BY = {"agent": "agent", "model": "model", "cause": "root", "day": "day"}  # → its column
HOUR_MS = 3600 * 1000
KEYS_MOST = 1_000  # rows of one answer: the dearest, or the newest days


@dataclass(frozen=True, slots=True)
class Span:
    """From when on: so many hours back, by each call; or whole days of UTC, by their sums. Neither: from the first."""

    hours: int | None = None
    first_day: int = 0


def parse_by(raw: object) -> str:
    if isinstance(raw, str) and raw in BY:
        return raw
    raise Refusal("usage", f"cannot sum up by {shown(raw)}: give one of {', '.join(BY)}")


def parse_since(raw: object, now_ms: int) -> Span:
    """`24h`, `7d` (today and the six days before), a date, or None. Raises Refusal("usage")."""
    if raw is None:
        return Span()
    if isinstance(raw, str):
        if match := re.fullmatch(r"([1-9]\d{0,4})h", raw, re.ASCII):
            return Span(hours=int(match[1]))
        if match := re.fullmatch(r"([1-9]\d{0,4})d", raw, re.ASCII):
            return Span(first_day=now_ms // DAY_MS - int(match[1]) + 1)
        if re.fullmatch(r"\d{4}-\d\d-\d\d", raw, re.ASCII):
            with suppress(Refusal):  # it speaks of instants, which are not taken here
                return Span(first_day=parse_instant(raw, "--since") // DAY_MS)
    raise Refusal("usage", f"cannot use {shown(raw)} as --since: give hours (24h), days (7d) or a date (2026-01-31)")


async def costs(store: Store, prices: Prices, by: str, span: Span, now_ms: int, kept_s: float) -> dict[str, Any]:
    """{"by", "rows": [{"key", calls, tokens, cost}], "total", "prices"}: the dearest first, of days the newest.

    In each row the sums of SUMS; a count of tokens is that of the calls of which it is known. Raises Refusal for more
    hours than calls are kept one by one.
    """
    if span.hours is not None and span.hours * 3600 > kept_s:
        raise Refusal(
            "usage",
            f"cannot go back {span.hours} hours: calls are kept one by one for {kept_s / 3600:.0f} hours "
            "(history_kept_s); give days or a date",
        )
    given: dict[str, int] = {"first": span.first_day}
    source = "SELECT * FROM spend_days WHERE day >= :first"
    if span.hours is not None:
        given, source = {"first": now_ms - span.hours * HOUR_MS}, _OF_CHARGES
    column = BY[by]
    order = "day DESC" if by == "day" else "cost_micro_usd DESC, key"
    sums = ", ".join(f"sum({name}) AS {name}" for name in SUMS)
    rows = await store.rows(
        f"SELECT {column} AS key, {sums} FROM ({source}) GROUP BY {column} ORDER BY {order} LIMIT {KEYS_MOST}", given
    )
    total = await store.row(f"SELECT {sums} FROM ({source})", given)
    return {
        "by": by,
        "rows": [{**dict(row), "key": _key(by, row["key"])} for row in rows],
        "total": {name: (total[name] if total else 0) or 0 for name in SUMS},
        "prices": {"source": prices.source, "date": prices.date},
    }


async def of_agents(store: Store, day: int) -> Mapping[str, dict[str, Any]]:
    """The sums of one day: agent → SUMS."""
    sums = ", ".join(f"sum({name}) AS {name}" for name in SUMS)
    rows = await store.rows(f"SELECT agent, {sums} FROM spend_days WHERE day = ? GROUP BY agent", (day,))
    return {row["agent"]: {name: row[name] for name in SUMS} for row in rows}


def _key(by: str, key: str | int) -> str:
    if by == "day":
        return f"{datetime.fromtimestamp(int(key) * DAY_MS / 1000, UTC):%Y-%m-%d}"
    return str(key) or "unknown"


_OF_CHARGES = f"""
    SELECT at_ms / {DAY_MS} AS day, agent, coalesce(model, '') AS model, root, 1 AS calls,
           input_tokens IS NULL OR output_tokens IS NULL AS unknown_calls,
           {", ".join(f"coalesce({name}, 0) AS {name}" for name in TOKEN_COLUMNS)},
           cost_micro_usd, iif(estimated, cost_micro_usd, 0) AS estimated_micro_usd
    FROM charges INDEXED BY charges_by_time WHERE at_ms >= :first
"""
