"""Newer inputs of the meta flake, from which every agent is built. payload: {"before", "after"}: input → revision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hive_core.effects import Effect, changed
from hive_core.procedures.deployments import Deployments
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, NOTE_LIMIT_BYTES, AgentName, parse_text
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.store.writer import Transaction


class UpdateMetaInputs:
    kind = "update_meta_inputs"

    def __init__(self, asking: Asking, deployments: Deployments, mend_all: Callable[[], None]) -> None:
        """mend_all: lets every agent be built anew where it is not as it would be built now."""
        self._asking = asking
        self._inputs = deployments
        self._mend_all = mend_all

    async def request(self, requested_by: AgentName, given_reason: object, key: str | None = None) -> dict[str, Any]:
        """Ask for newer inputs; `{"approval": id}`. Raises Refusal without Nix, and when there is nothing newer."""
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        shown = await self._shown()

        def make(_: Transaction) -> Request:
            return Request(self.kind, MANAGER, requested_by, reason, shown)

        return await self._asking.put(requested_by, key, f"request_{self.kind}", "newer inputs", make)

    def title(self, approval: Approval) -> str:
        return "newer inputs for every agent"

    async def show_now(self, approval: Approval) -> Shown:
        return await self._shown()

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        await step("locking")
        await self._inputs.lock_inputs(approval.payload["after"])
        self._mend_all()
        return Done(lambda tx: None)

    async def closed(self, approval: Approval) -> None:
        pass

    async def _shown(self) -> Shown:
        before, after = await self._inputs.look_at_inputs()
        lines = [line for name, new in after.items() for line in changed(name, before.get(name), new)]
        if not lines:
            raise Refusal("refused", "cannot update the inputs: they are the newest already")
        unknown = ["packages: every agent is built anew, and what becomes of each is seen then"]
        return Shown({"before": dict(before), "after": dict(after)}, Effect(lines, unknown).to_wire())
