"""Spend: what calls to the model cost, and the budgets that stop them."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.money import usd
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

_TOKENS = ("input", "output", "cache_write_5m", "cache_write_1h", "cache_read")


def budget(arguments: Namespace) -> None:
    what, scope = arguments.what, arguments.scope
    amounts = {kind: getattr(arguments, kind) for kind in ("day", "total", "window_5h", "window_7d")}
    given = [kind for kind, amount in amounts.items() if amount is not None]
    if (what == "list") != (scope is None) or (what != "set" and given) or (what != "remove" and arguments.kinds):
        form = {
            "list": "nothing",
            "set": "hive or an agent, and amounts: --day USD, --total USD, --window-5h PERCENT, --window-7d PERCENT",
            "remove": "hive or an agent, and which: day, total, window-5h, window-7d (all when absent)",
        }[what]
        raise Refusal("usage", f"cannot run `hive budget {what}`: it takes {form}")
    if what == "remove":
        kinds = [kind.replace("-", "_") for kind in arguments.kinds]
        result = Client().call("budget_remove", scope=scope, kinds=kinds)
        emit(arguments, result, f"removed of {scope}: {', '.join(result['removed']).replace('_', '-')}")
        return
    if what == "set":
        result = Client().call("budget_set", scope=scope, warn_percent=arguments.warn, **amounts)
    else:
        result = Client().call("budgets")
    emit(arguments, result, _budgets(result["budgets"]) or "there is no budget: agents may spend what they take")


def costs(arguments: Namespace) -> None:
    result = Client().call("costs", by=arguments.by, since=arguments.since)
    emit(arguments, result, _costs(result))


def _budgets(rows: list[dict[str, Any]]) -> str:
    from hive_core.cli import show

    cells = []
    for row in rows:
        percent = row["unit"] == "percent"
        used = "unknown" if row["used"] is None else f"{row['used']} %" if percent else usd(row["used"])
        amount = f"{row['amount']} %" if percent else usd(row["amount"])
        state = show.paint("spent", "red") if row["spent"] else f"warns at {row['warn_percent']} %"
        whose = "the hive" if row["scope"] == "*" else row["scope"]
        cells.append([whose, row["kind"].replace("_", "-"), used, amount, state])
    return show.table(cells, ["whose", "budget", "used", "of", ""]) if cells else ""


def _costs(result: dict[str, Any]) -> str:
    from hive_core.cli import show

    total = {**result["total"], "key": "together"}
    rows = [*result["rows"], *([total] if len(result["rows"]) != 1 else [])]
    cells = [[show.safe(row["key"]), f"{row['calls']:,}", *_counts(row), _cost(row)] for row in rows]
    head = [result["by"], "calls", "input", "output", "written 5m", "written 1h", "read", "cost"]
    notes = []
    if total["unknown_calls"]:
        notes.append(
            f"+ ?: the tokens of {counted(total['unknown_calls'], 'call')} are not known; the cost is estimated"
        )
    if total["estimated_micro_usd"]:
        notes.append(f"~ with an estimate in it, {usd(total['estimated_micro_usd'])} of all")
    prices = result["prices"]
    notes.append(
        f"prices: {show.safe(prices['source'])}{', as of ' + show.safe(prices['date']) if prices['date'] else ''}"
    )
    return "\n".join([show.table(cells, head), *(show.paint(note, "dim") for note in notes)])


def _counts(row: dict[str, Any]) -> list[str]:
    unknown = " + ?" if row["unknown_calls"] else ""
    return [
        f"{row[f'{kind}_tokens']:,}{unknown if kind in ('input', 'output') else ''}"
        if row[f"{kind}_tokens"] or not unknown
        else "?"
        for kind in _TOKENS
    ]


def _cost(row: dict[str, Any]) -> str:
    return f"{'~' if row['estimated_micro_usd'] else ''}{usd(row['cost_micro_usd'])}"
