"""What calls to the model cost, as a page shows it, and the forms that set budgets."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response

from dashboard.answers import yes
from dashboard.forms_read import read_form
from dashboard.rows import render
from hive_core.hive import Hive
from hive_core.protocol.money import about
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.budgets import KINDS, THE_HIVE, parse_change, parse_kinds, parse_scope
from hive_core.services.charges import DAY_MS
from hive_core.services.costs import of_agents

KIND_WORDS = {"day": "a day", "total": "in total", "window_5h": "5-hour window", "window_7d": "7-day window"}


async def spend_now(hive: Hive, agent: AgentName | None) -> Markup:
    """Today and the budgets: of one agent, or of the hive and every agent that spent anything today."""
    ledger = hive.ledger
    sums = await of_agents(hive.store, ledger.now_ms // DAY_MS)
    scope = agent or THE_HIVE
    names = [name for name in sorted(sums) if agent is None]
    return render(
        "rows/spend.html",
        scope=scope,
        today=about(ledger.spent(scope, "day")),
        total=about(ledger.spent(scope, "total")),
        agents=[{**sums[name], "name": name, "cost": about(ledger.spent(name, "day"))} for name in names],
        estimated=any(sums[name]["estimated_micro_usd"] for name in ([agent] if agent else sums) if name in sums),
        budgets=[_as_shown(row) for row in ledger.budget_rows() if agent is None or row["scope"] in (THE_HIVE, agent)],
    )


def _as_shown(row: dict[str, Any]) -> dict[str, Any]:
    percent, used = row["unit"] == "percent", row["used"]
    return {
        "scope": "hive" if row["scope"] == THE_HIVE else row["scope"],
        "whose": "the hive" if row["scope"] == THE_HIVE else row["scope"],
        "kind": row["kind"],
        "word": KIND_WORDS[row["kind"]],
        "used": "unknown" if used is None else f"{used} %" if percent else about(used),
        "amount": f"{row['amount']} %" if percent else about(row["amount"]),
        "full": min(100, 100 * (used or 0) // row["amount"]),
        "warns": row["warn_percent"],
        "spent": row["spent"],
    }


class SpendForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    async def set(self, request: Request) -> Response:
        """`scope`, `kind` and `amount`, in USD or percent of a window."""
        form = await read_form(request)
        kind = form.get("kind", "")
        if kind not in KINDS:
            raise Refusal("usage", "cannot set a budget of no kind: choose a day, the total or a window")
        args = {"scope": form.get("scope"), kind: form.get("amount", "").strip()}
        change = parse_change(args, self._hive.broker.limits.budget_warn_percent)
        await self._hive.ledger.set_budget(change, OPERATOR)
        whose = "the hive" if change.scope == THE_HIVE else change.scope
        return yes(request, form.get("back", "/"), f"the budget of {whose} ({KIND_WORDS[kind]}) is set")

    async def remove(self, request: Request) -> Response:
        form = await read_form(request)
        scope, kinds = parse_scope(form.get("scope")), parse_kinds([form.get("kind", "")])
        await self._hive.ledger.remove_budget(scope, kinds, OPERATOR)
        whose = "the hive" if scope == THE_HIVE else scope
        return yes(request, form.get("back", "/"), f"the budget of {whose} ({KIND_WORDS[kinds[0]]}) is removed")
