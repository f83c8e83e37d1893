"""The policy at work: what passes by a rule, and what would have passed. The rules are in policy_rules.py."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from hive_core.policy_rules import DAY_MS, KINDS, Case, Rule, allows, hindrance, troubles
from hive_core.services.access import Access
from hive_core.services.approvals import Request
from hive_core.services.under_way import in_the_way
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

STEP = 200  # approvals that one look at the past reads
TOLD = 200  # that a rehearsal tells one by one, those against it first


class Policy:
    def __init__(self, store: Store, rules: Sequence[Rule], access: Access) -> None:
        self._store = store
        self._access = access
        self.rules = rules

    def rule_for(self, tx: Transaction, request: Request) -> str | None:
        """The name of the first rule by which what is asked for passes, or None: it waits for the operator."""
        case = Case(request.kind, request.agent, request.requested_by, _as_stored(request.shown.effect))
        allowed = [rule for rule in self.rules if allows(rule, case)]
        if not allowed or self._is_stopped(tx, request) or not _is_as_shown(tx, request):
            return None
        name = next((rule.name for rule in allowed if passed(tx, rule) < rule.per_day), None)
        return None if name is None or _was_denied(tx, request) else name

    def _is_stopped(self, tx: Transaction, request: Request) -> bool:
        closed = self._access.closed(request.agent)  # at once, before the row says so
        if closed is not None and closed.state == "frozen":
            return True
        return tx.execute("SELECT frozen_at_ms FROM swarm").fetchone()["frozen_at_ms"] is not None

    async def to_wire(self) -> list[dict[str, Any]]:
        """Each rule, how many passed by it in 24 hours, and why it can never allow anything."""
        agents = [row["name"] for row in await self._store.rows("SELECT name FROM agents")]
        counts = await self._store.write(lambda tx: [passed(tx, rule) for rule in self.rules])
        return [
            {**rule.model_dump(), "passed": count, "troubles": list(troubles(rule, agents))}
            for rule, count in zip(self.rules, counts, strict=True)
        ]

    async def rehearse(self, rules: Sequence[Rule], days: int | None = None) -> dict[str, Any]:
        """What these rules would have let pass of what was asked for, in so many days back or ever.

        `{"looked_at", "not_known", "over_per_day", "passes", "denied", "failed", "rules": […], "approvals": […]}`: how
        many; the rules, with how many would have passed by each, how many it lets wait for which reason, and its
        troubles; and those that would have passed, the denied and the failed first, then the newest. not_known: no
        effect was recorded of them. Each has its `id`, `agent`, `state`, `note`, the `rule` by which it would have
        passed, and `passed_by`, by which it did. An emergency stop then, and other changes of the same agent, are not
        known now.
        """
        now_ms = await self._store.write(lambda tx: tx.now_ms)
        since_ms = 0 if days is None else now_ms - days * DAY_MS
        counts = dict.fromkeys(("looked_at", "not_known", "over_per_day", "passes", "denied", "failed"), 0)
        agents = [row["name"] for row in await self._store.rows("SELECT name FROM agents")]
        passes, waits = Counter[str](), {rule.name: Counter[str]() for rule in rules}
        recent: dict[str, deque[int]] = {rule.name: deque() for rule in rules}
        against: deque[dict[str, Any]] = deque(maxlen=TOLD)
        others: deque[dict[str, Any]] = deque(maxlen=TOLD)
        async for row in self._past(since_ms):
            counts["looked_at"] += 1
            counts["not_known"] += row["effect"] is None
            case = Case(row["kind"], row["agent"], row["requested_by"], json.loads(row["effect"] or "null"))
            hindrances = [(rule, hindrance(rule, case)) for rule in rules]
            for rule, why in hindrances:
                waits[rule.name].update([] if why is None else [why])
            if not (allowed := [rule for rule, why in hindrances if why is None]):
                continue
            by = next((one.name for one in allowed if _has_room(one, recent[one.name], row["requested_at_ms"])), None)
            if by is None:
                counts["over_per_day"] += 1
                continue
            counts["passes"] += 1
            passes[by] += 1
            told = {**dict(row), "effect": case.effect, "rule": by, "passed_by": row["rule"]}
            if row["state"] in ("denied", "failed"):
                counts[row["state"]] += 1
                against.appendleft(told)
            else:
                others.appendleft(told)
        looked_at = [
            {
                **rule.model_dump(),
                "passes": passes[rule.name],
                "waits": dict(waits[rule.name].most_common()),
                "troubles": list(troubles(rule, agents)),
            }
            for rule in rules
        ]
        return {**counts, "rules": looked_at, "approvals": [*against, *others][:TOLD]}

    async def _past(self, since_ms: int) -> AsyncIterator[sqlite3.Row]:
        after = 0
        while rows := await self._store.rows(_PAST, (after, since_ms, json.dumps(KINDS), STEP)):
            for row in rows:
                yield row
            after = rows[-1]["id"]


def passed(tx: Transaction, rule: Rule) -> int:
    """How many passed by a rule in the last 24 hours; what a clock that was set back dates ahead is among them."""
    sql = "SELECT count(*) FROM approvals INDEXED BY approvals_by_rule WHERE rule = ? AND resolved_at_ms > ?"
    (count,) = tx.execute(sql, (rule.name, tx.now_ms - DAY_MS)).fetchone()
    return int(count)


def _as_stored(effect: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Just what a look at the row would find."""
    stored: Mapping[str, Any] | None = json.loads(json.dumps(effect))
    return stored


def _is_as_shown(tx: Transaction, request: Request) -> bool:
    """Whether it would do what its effect says: its agent is one, runs on what it was compared with, and nothing else
    changes that now."""
    row = tx.execute("SELECT deployed_sha FROM agents WHERE name = ?", (request.agent,)).fetchone()
    if row is None or row["deployed_sha"] != request.shown.payload.get("base"):
        return False
    return in_the_way(tx, request.kind, request.agent) is None


def _was_denied(tx: Transaction, request: Request) -> bool:
    """Whether the operator has said no to the same change: only he takes that back."""
    sha, diff = (request.shown.payload.get(key) for key in ("sha", "diff"))
    return tx.execute(_DENIED, (request.agent, request.kind, sha, diff)).fetchone() is not None


def _has_room(rule: Rule, passes: deque[int], at_ms: int) -> bool:
    """Whether one more passes at that instant, after those before; it is then among them."""
    while passes and passes[0] <= at_ms - DAY_MS:
        passes.popleft()
    if len(passes) >= rule.per_day:
        return False
    passes.append(at_ms)
    return True


_DENIED = """
    SELECT 1 FROM approvals INDEXED BY approvals_of
    WHERE agent = ? AND kind = ? AND state = 'denied'
      AND (json_extract(payload, '$.sha') = ? OR json_extract(payload, '$.diff') = ?) LIMIT 1
"""
_PAST = """
    SELECT id, kind, agent, requested_by, reason, effect, state, note, requested_at_ms, rule
    FROM approvals
    WHERE id > ? AND requested_at_ms >= ? AND kind IN (SELECT value FROM json_each(?))
    ORDER BY id LIMIT ?
"""
