"""A higher budget of an agent's, or of the hive. payload: {"amounts": {kind: amount}, "before": {kind: amount}}.

An approval about the hive's own has "hive" in the place of an agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hive_core.effects import Effect, Line
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import NOTE_LIMIT_BYTES, OPERATOR, AgentName, parse_text
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.services.budgets import THE_HIVE, Budget, Change, parse_change, parse_scope
from hive_core.services.ledger import Ledger
from hive_core.store.writer import Transaction


class RaiseBudget:
    kind = "raise_budget"

    def __init__(self, asking: Asking, ledger: Ledger) -> None:
        self._asking = asking
        self._ledger = ledger

    async def request(
        self, requested_by: AgentName, given: Mapping[str, Any], key: str | None = None
    ) -> dict[str, Any]:
        """Ask for higher amounts of budgets that there are, given as `budget_set` takes them; `{"approval": id}`.

        Raises Refusal when there is no such budget, or it would not be raised.
        """
        change = parse_change(given, 100)
        reason = parse_text(given.get("reason"), "reason", NOTE_LIMIT_BYTES)
        name = AgentName("hive") if change.scope == THE_HIVE else change.scope

        def make(_: Transaction) -> Request:
            return Request(self.kind, name, requested_by, reason, self._shown(change))

        return await self._asking.put(requested_by, key, f"request_{self.kind}", f"a budget of {name}", make)

    def title(self, approval: Approval) -> str:
        return f"a higher budget of {'the hive' if approval.agent == 'hive' else approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        return self._shown(_change(approval))

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        change = _change(approval)
        for kind, amount in change.amounts.items():
            now = self._budget(change.scope, kind)
            # Another that was approved with it may have raised it more. The same again is the same.
            if amount > now.amount:  # each keeps the percentage of which it warns
                await self._ledger.set_budget(Change(change.scope, {kind: amount}, now.warn_percent), OPERATOR)
        return Done(lambda tx: None)

    async def closed(self, approval: Approval) -> None:
        pass

    def _budget(self, scope: AgentName, kind: str) -> Budget:
        for one in self._ledger.budgets.all():
            if (one.scope, one.kind) == (scope, kind):
                return one
        whose = "the hive" if scope == THE_HIVE else scope
        raise Refusal("not_found", f"cannot raise it: {whose} has no budget {kind}; nothing of that kind stops it")

    def _shown(self, change: Change) -> Shown:
        before, lines = {}, []
        for kind, amount in change.amounts.items():
            now = self._budget(change.scope, kind)
            if amount <= now.amount:
                why = f"it is {now.shown(now.amount)} already"
                raise Refusal("refused", f"cannot raise {now.name} to {now.shown(amount)}: {why}")
            before[kind] = now.amount
            lines.append(Line(now.name, now.shown(now.amount), now.shown(amount), wide=True))
        payload = {"amounts": dict(change.amounts), "before": before}
        return Shown(payload, Effect(lines).to_wire())


def _change(approval: Approval) -> Change:
    return Change(parse_scope(approval.agent), approval.payload["amounts"], 100)
