"""The operator's forms about approvals: approve what was shown, one or several together, and deny."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.answers import yes
from dashboard.forms_read import number, read_form
from dashboard.rows import deed
from hive_core.hive import Hive
from hive_core.procedures.together import Click, Outcome
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR
from hive_core.services.approvals import Approval

PATIENCE_S = 2.0  # what takes longer goes on, and its row says how far it is
_CHOSEN = re.compile(r"choose-(\d{1,18})", re.ASCII)


class ApprovalForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def routes(self) -> list[Route]:
        return [
            Route("/approvals/together", self.together, methods=["POST"]),
            Route("/approvals/{id}/approve", self.approve, methods=["POST"]),
            Route("/approvals/{id}/deny", self.deny, methods=["POST"]),
        ]

    async def approve(self, request: Request) -> Response:
        approval_id = number(request.path_params["id"], "an approval")
        form = await read_form(request)
        digest = form.get("digest", "")
        approval = await self._hive.gate.approve(approval_id, digest, OPERATOR, _door(request), PATIENCE_S)
        if approval.state == "failed":
            raise Refusal("conflict", f"approval {approval_id} was carried out and failed: {approval.note}")
        return yes(request, "/", _said(approval))

    async def together(self, request: Request) -> Response:
        """The cards that were chosen: `choose-ID`, with the digest of what was shown, for each."""
        form = await read_form(request)
        clicks = [Click(int(found[1]), form[name]) for name in form if (found := _CHOSEN.fullmatch(name))]
        outcomes = await self._hive.together.approve(clicks, OPERATOR, _door(request), PATIENCE_S)
        lines = [_line(outcome) for outcome in outcomes]
        if not any(outcome.approval for outcome in outcomes):
            raise Refusal("conflict", "\n".join(lines))
        return yes(request, "/", "\n".join(lines))

    async def deny(self, request: Request) -> Response:
        approval_id = number(request.path_params["id"], "an approval")
        form = await read_form(request)
        approval = await self._hive.approvals.get(approval_id)
        if form.get("digest") != approval.digest:
            raise Refusal("conflict", f"cannot deny {approval_id}: it is not what you were shown; look at it again")
        approval = await self._hive.gate.deny(approval_id, form.get("reason"), OPERATOR, _door(request))
        return yes(request, "/", f"denied: {deed(approval)} {approval.agent}")


def _door(request: Request) -> str:
    return f"the dashboard, {request.client.host if request.client else 'from somewhere'}"


def _line(outcome: Outcome) -> str:
    if outcome.approval is None:
        return f"{outcome.click.approval_id}: {outcome.refusal}"
    return f"{outcome.click.approval_id}: {_said(outcome.approval)}"


def _said(approval: Approval) -> str:
    what = f"{deed(approval)} {approval.agent}"
    if approval.state == "approved":
        return f"approved, and under way: {what}"
    return f"failed: {what}: {approval.note}" if approval.state == "failed" else f"approved: {what}"
