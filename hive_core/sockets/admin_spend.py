"""host.sock: what calls to the model cost, and the budgets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hive_core.hive import Hive
from hive_core.protocol.words import OPERATOR
from hive_core.services.budgets import parse_change, parse_kinds, parse_scope
from hive_core.services.costs import costs, parse_by, parse_since

FLUSH_WITHIN_S = 1.0
Args = dict[str, Any]


def spend_verbs(hive: Hive) -> dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]:
    """verb → (what answers it, the arguments it takes)."""
    ledger = hive.ledger

    async def list_budgets(_: Args) -> Any:
        return {"budgets": ledger.budget_rows()}

    async def set_budget(args: Args) -> Any:
        change = parse_change(args, hive.broker.limits.budget_warn_percent)
        await ledger.set_budget(change, OPERATOR)
        return {"budgets": [row for row in ledger.budget_rows() if row["scope"] == change.scope]}

    async def remove_budget(args: Args) -> Any:
        scope = parse_scope(args.get("scope"))
        return {"scope": scope, "removed": await ledger.remove_budget(scope, parse_kinds(args.get("kinds")), OPERATOR)}

    async def tell_costs(args: Args) -> Any:
        by, span = parse_by(args.get("by", "agent")), parse_since(args.get("since"), ledger.now_ms)
        with trio.move_on_after(FLUSH_WITHIN_S):  # a full disk takes nothing: then what is on it counts
            await ledger.flush()
        return await costs(hive.store, ledger.prices, by, span, ledger.now_ms, hive.broker.limits.history_kept_s)

    return {
        "budgets": (list_budgets, set()),
        "budget_set": (set_budget, {"scope", "day", "total", "window_5h", "window_7d", "warn_percent"}),
        "budget_remove": (remove_budget, {"scope", "kinds"}),
        "costs": (tell_costs, {"by", "since"}),
    }
