"""What an agent talked to: its connections of a time, summed up by host and by refusal."""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import ValidationError

from hive_core.effects_of_settings import destination_text
from hive_core.egress_rules import Rule
from hive_core.services.absent import not_found
from hive_core.services.charges import DAY_MS
from hive_core.services.costs import HOUR_MS, Span
from hive_core.store.door import Store

log = logging.getLogger(__name__)
ROWS_MOST = 200  # of one answer: those with the most bytes, and the newest refusals


async def reach(store: Store, name: str, span: Span, now_ms: int, most: int, kept_s: float) -> dict[str, Any]:
    """{"agent", "gone", "network", "may", "since_ms", "kept_from_ms", "hosts", "refusals", "total"}.

    most: the connections of an agent that are kept; kept_s: and how long

    gone      no agent has the name now, and what is told is of those that had it
    network   "private", or "host": then it reaches what this machine does, and nothing tells of that
    may       what is deployed of it lets it reach through the proxy, a text for each entry
    hosts     {host, port, connections, open, failed, cut, sent, received, last_at_ms}: all but what was refused, those
              with the most bytes first. sent: bytes from the agent
    refusals  {host, port, how, count, reason, last_at_ms}, the newest first
    total     the sums of hosts, and `refused`
    since_ms  the first instant that is looked at; kept_from_ms: a later one, where older connections are not kept

    Host `*` stands for several, of a minute in which the agent made too many.

    Raises Refusal("not_found") of a name that no agent has, and of which nothing is kept.
    """
    row = await store.row("SELECT policy FROM agents WHERE name = ?", (name,))
    if row is None and not await store.row("SELECT 1 FROM connections WHERE agent = ? LIMIT 1", (name,)):
        raise await not_found(store, name)
    first = now_ms - span.hours * HOUR_MS if span.hours is not None else span.first_day * DAY_MS
    given = {"name": name, "first": first}
    kept = await store.row("SELECT count(*) AS n, min(began_at_ms) AS at_ms FROM connections WHERE agent = ?", (name,))
    kept_from = max(now_ms - int(kept_s * 1000), kept["at_ms"] if kept and kept["n"] >= most else 0)
    hosts = await store.rows(_HOSTS, given)
    refusals = await store.rows(_REFUSALS, given)
    total = await store.row(_TOTAL, given)
    policy = row["policy"] if row else None
    return {
        "agent": name,
        "gone": row is None,
        "network": json.loads(policy or "{}").get("network", "private"),
        "may": [destination_text(entry) for entry in entries_of(policy)],
        "since_ms": first,
        "kept_from_ms": kept_from if kept_from > first else None,
        "hosts": [dict(row) for row in hosts],
        "refusals": [dict(row) for row in refusals],
        "total": dict(total) if total else {},
    }


def entries_of(policy: str | None) -> list[Rule]:
    """What stands in the `egress` of a row's policy, without entries that this release does not take."""
    entries: list[Rule] = []
    for given in json.loads(policy or "{}").get("egress", []):
        try:
            entries.append(Rule.model_validate(given))
        except ValidationError as exc:
            log.error("an entry of `egress` lets nothing pass: %s", exc.errors()[0]["msg"])
    return entries


# Of who has the name now, if anybody has: another may have had it before.
_OF = """
    WHERE agent = :name
    AND began_at_ms >= max(:first, coalesce((SELECT created_at_ms FROM agents WHERE name = :name), 0))
"""
_SUMS = """
    coalesce(sum(iif(verdict IS NOT 'refused', count, 0)), 0) AS connections,
    coalesce(sum(verdict IS NULL), 0) AS open,
    coalesce(sum(iif(verdict = 'failed', count, 0)), 0) AS failed,
    coalesce(sum(iif(verdict = 'cut', count, 0)), 0) AS cut,
    coalesce(sum(sent), 0) AS sent, coalesce(sum(received), 0) AS received
"""
_HOSTS = f"""
    SELECT host, port, {_SUMS}, max(coalesce(ended_at_ms, began_at_ms)) AS last_at_ms
    FROM connections {_OF} AND verdict IS NOT 'refused' GROUP BY host, port
    ORDER BY sum(sent + received) DESC, host, port LIMIT {ROWS_MOST}
"""
_REFUSALS = f"""
    SELECT host, port, how, sum(count) AS count, reason, max(ended_at_ms) AS last_at_ms
    FROM connections {_OF} AND verdict = 'refused' GROUP BY host, port, how
    ORDER BY last_at_ms DESC, host, port, how LIMIT {ROWS_MOST}
"""
_TOTAL = f"""
    SELECT {_SUMS}, coalesce(sum(iif(verdict = 'refused', count, 0)), 0) AS refused FROM connections {_OF}
"""
