"""The operator's verbs about what passes without a click, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.policy_rules import Rule, parse_rules
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]
DAYS_MOST = 36_500


def policy_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def policy(_: Args) -> Any:
        return {"rules": await hive.gate.policy.to_wire()}

    async def rehearse(args: Args) -> Any:
        """`text`: rules instead of those in force; `name`: only this one; `days`: how far back, ever when absent."""
        rules = hive.gate.policy.rules if args.get("text") is None else _parsed(args["text"])
        if (name := args.get("name")) is not None:
            rules = [rule for rule in rules if rule.name == name]
            if not rules:
                why = "no rule has that name; `hive policy` lists them"
                raise Refusal("not_found", f"cannot rehearse {shown(name)}: {why}")
        days = args.get("days")
        if days is not None and (type(days) is not int or not 0 < days <= DAYS_MOST):
            raise Refusal("usage", f"cannot look {shown(days)} days back: give a whole number from 1 to {DAYS_MOST:,}")
        return await hive.gate.policy.rehearse(rules, days)

    return {"policy": (policy, set()), "policy_rehearse": (rehearse, {"text", "name", "days"})}


def _parsed(text: object) -> list[Rule]:
    if not isinstance(text, str):
        raise Refusal("usage", f"cannot read {shown(text)} as rules: give the text of tables [[policy]]")
    return parse_rules(text, "the file of --rule")
