"""A message to an agent by a clock. payload: {"text", "cron", "zone", "every_s"}.

Its instants stand on the card; when the first of them has passed, the card is shown anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from hive_core.cron import find_zone
from hive_core.effects import Effect, Line
from hive_core.procedures.kinds.kind import Asking, Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import NOTE_LIMIT_BYTES, AgentName, parse_text
from hive_core.services.approvals import Approval, Request, Shown
from hive_core.services.schedules import Plan, Schedules, parse_plan
from hive_core.store.writer import Transaction

INSTANTS = 5


class SchedulePrompt:
    kind = "schedule_prompt"

    def __init__(self, asking: Asking, schedules: Schedules) -> None:
        self._asking = asking
        self._schedules = schedules

    async def request(
        self, requested_by: AgentName, given: Mapping[str, Any], key: str | None = None
    ) -> dict[str, Any]:
        """Ask for a schedule, given its `agent`, `body`, and `cron` with `zone`, or `every_s`; `{"approval": id}`.

        Raises Refusal when it is no schedule, or there is no such agent.
        """
        plan = parse_plan(*(given.get(name) for name in ("agent", "body", "cron", "zone", "every_s")))
        reason = parse_text(given.get("reason"), "reason", NOTE_LIMIT_BYTES)

        def make(tx: Transaction) -> Request:
            if tx.execute("SELECT 1 FROM agents WHERE name = ?", (plan.agent,)).fetchone() is None:
                raise Refusal("not_found", f"cannot schedule for {plan.agent}: no agent has that name")
            return Request(self.kind, plan.agent, requested_by, reason, _shown(plan, tx.now_ms))

        what = f"a schedule of {plan.agent}"
        return await self._asking.put(requested_by, key, f"request_{self.kind}", what, make)

    def title(self, approval: Approval) -> str:
        return f"a schedule for {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        plan = _plan(approval)

        def look(tx: Transaction) -> Shown:
            if tx.execute("SELECT 1 FROM agents WHERE name = ?", (plan.agent,)).fetchone() is None:
                raise Refusal("not_found", f"cannot schedule for {plan.agent}: it is no agent any more")
            return _shown(plan, tx.now_ms)

        return await self._asking.store.write(look)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        plan = _plan(approval)

        def write(tx: Transaction) -> None:
            self._schedules.put(tx, plan)

        return Done(write)

    async def closed(self, approval: Approval) -> None:
        pass


def _plan(approval: Approval) -> Plan:
    given = approval.payload
    return parse_plan(approval.agent, given["text"], given["cron"], given["zone"], given["every_s"])


def _shown(plan: Plan, now_ms: int) -> Shown:
    """Raises Refusal when no instant ever comes."""
    cron, zone = (plan.cron.expression, plan.cron.zone) if plan.cron else (None, None)
    every_s = None if plan.every_ms is None else plan.every_ms / 1000
    if cron is None or zone is None:
        lines = [Line("schedule", None, f"every {every_s:g} s, from the approval on", wide=True)]
    else:
        lines = [Line("schedule", None, f"{cron} ({zone})", wide=True), *_instants(plan, zone, now_ms)]
    payload = {"text": plan.body, "cron": cron, "zone": zone, "every_s": every_s}
    return Shown(payload, Effect(lines).to_wire())


def _instants(plan: Plan, zone: str, now_ms: int) -> list[Line]:
    rhythm, at_ms = plan.rhythm(now_ms), now_ms
    lines: list[Line] = []
    for number in range(1, INSTANTS + 1):
        following = rhythm.next_after(at_ms)
        if following is None:
            if not lines:
                raise Refusal("usage", "cannot schedule: such a day never comes")
            break
        at_ms = following
        at = datetime.fromtimestamp(at_ms / 1000, find_zone(zone))
        lines.append(Line(f"instant {number}", None, f"{at:%a %Y-%m-%d %H:%M %Z}"))
    return lines
