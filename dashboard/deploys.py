"""What was deployed to an agent, on its page, and the way back to each."""

from __future__ import annotations

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from dashboard.answers import wants_json, yes
from dashboard.forms_read import read_form
from dashboard.rows import render
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.deploy_log import Deployment

SHOWN = 20


async def deploys_now(hive: Hive, name: AgentName) -> Markup:
    """The newest deployments of an agent, and those that failed; why, where that cannot be told."""
    log: list[Deployment] = []
    trouble = ""
    try:
        log = await hive.gate.deploy_log.of(name, SHOWN)
    except Refusal as refusal:
        trouble = refusal.message
    return render("rows/deploys.html", agent=name, log=log, trouble=trouble)


class DeployForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def routes(self) -> list[Route]:
        return [Route("/agents/{name}/rollback", self.roll_back, methods=["POST"])]

    async def roll_back(self, request: Request) -> Response:
        """Make the card of it, and show that: it is approved there."""
        to = (await read_form(request)).get("to", "")
        asked = await self._hive.gate.apply_commit.ask_back({"agent": request.path_params["name"], "to": to})
        if wants_json(request.scope):
            rule = asked.get("rule")
            what = f"passed by rule {rule}, without a click" if rule else "waits for your click"
            return yes(request, "/", f"approval {asked['approval']} {what}")
        return RedirectResponse(f"/approvals/{asked['approval']}", 303)
