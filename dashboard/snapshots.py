"""Snapshots of an agent's /state, on its page: what there is, one more, and one brought back."""

from __future__ import annotations

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.answers import yes
from dashboard.forms_read import read_form
from dashboard.rows import render
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_agent_name


async def snapshots_now(hive: Hive, name: AgentName) -> Markup:
    """What is kept of an agent's /state, the newest first; why, where that cannot be told."""
    trouble = hive.snapshots.trouble(name)
    try:
        listed, size = await hive.snapshots.all(name), await hive.snapshots.bytes(name)
    except Refusal as refusal:
        listed, size, trouble = [], 0, refusal.message
    return render("rows/snapshots.html", agent=name, snapshots=listed, size=size, trouble=trouble)


class SnapshotForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def routes(self) -> list[Route]:
        return [
            Route("/agents/{name}/snapshot", self.snapshot, methods=["POST"]),
            Route("/agents/{name}/restore-state", self.restore, methods=["POST"]),
        ]

    async def snapshot(self, request: Request) -> Response:
        name = parse_agent_name(request.path_params["name"])
        await read_form(request)
        taken = await self._hive.snapshots.take(name)
        said = f"{taken.id} is taken" if taken else f"nothing changed in {name}'s /state since its last snapshot"
        return yes(request, f"/agents/{name}", said)

    async def restore(self, request: Request) -> Response:
        name = parse_agent_name(request.path_params["name"])
        form = await read_form(request)
        restored, kept = await self._hive.snapshots.restore(name, form.get("snapshot", ""))
        said = f"{name}'s /state is that of {restored.id} again; what was there is kept as {kept.id}"
        return yes(request, f"/agents/{name}", said)
