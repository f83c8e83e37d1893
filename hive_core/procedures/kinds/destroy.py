"""The end of an agent. payload: {}. It ends at its turn's edge, and what it had is kept as a tombstone."""

from __future__ import annotations

from typing import Any

from hive_core.effects import Effect, Line
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, NOTE_LIMIT_BYTES, OPERATOR, AgentName, parse_text
from hive_core.services.agents import Agents
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.services.configured import is_configured
from hive_core.services.tombstones import Tombstones
from hive_core.store.writer import Transaction


class Destroy:
    kind = "destroy"

    def __init__(self, asking: Asking, agents: Agents, tombstones: Tombstones) -> None:
        self._asking = asking
        self._agents = agents
        self._tombstones = tombstones

    async def request(
        self, requested_by: AgentName, name: AgentName, given_reason: object, key: str | None = None
    ) -> dict[str, Any]:
        """Ask for the end of an agent, or of the configuration of one to be; `{"approval": id}`. Raises Refusal for
        hm1nd, and for who is neither."""
        reason = parse_text(given_reason, "reason", NOTE_LIMIT_BYTES)
        if name == MANAGER:
            raise Refusal("refused", f"cannot ask for the end of {name}: a hive has one manager")
        shown = await self._shown(name)

        def make(_: Transaction) -> Request:
            return Request(self.kind, name, requested_by, reason, shown)

        return await self._asking.put(requested_by, key, f"request_{self.kind}", f"the end of {name}", make)

    def title(self, approval: Approval) -> str:
        return f"the end of {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        return await self._shown(approval.agent)

    async def _shown(self, name: AgentName) -> Shown:
        if await is_configured(self._asking.store, name):
            return _shown_of_configured(name)
        await self._agents.get(name)
        return _shown(name)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        # What the rows say is carried out from there on by procedures/destruction.py, whichever daemon runs then.
        return Done(lambda tx: self._begin(tx, approval.agent))

    def _begin(self, tx: Transaction, name: AgentName) -> None:
        self._tombstones.begin(tx, name, OPERATOR, at_once=False)

    async def closed(self, approval: Approval) -> None:
        pass


def _shown_of_configured(name: AgentName) -> Shown:
    kept = f"its repositories; `hive revive {name}` makes it one again"
    lines = [Line("configuration", name, None), Line("ends", None, "what waits for its first commit")]
    return Shown({}, Effect([*lines, Line("kept", None, kept)]).to_wire())


def _shown(name: AgentName) -> Shown:
    ends = "at its turn's edge; its mail, questions, reminders and requests, and who waits for them is told"
    kept = f"its directories, repositories, budgets and history; `hive revive {name}` makes it an agent again"
    lines = [
        Line("agent", name, None),
        Line("ends", None, ends),
        Line("schedules", "on", "paused"),
        Line("kept", None, kept),
    ]
    return Shown({}, Effect(lines).to_wire())
