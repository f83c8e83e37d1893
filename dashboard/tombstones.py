"""What is kept of agents that were destroyed: its rows, and what the operator does there."""

from __future__ import annotations

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.answers import yes
from dashboard.forms_read import read_form
from dashboard.rows import render
from hive_core.hive import Hive
from hive_core.protocol.words import parse_agent_name


async def tombstone_rows(hive: Hive) -> dict[str, Markup]:
    """Target → row, the newest first."""
    return {
        f"tombstone-{one.id}": render("rows/tombstone.html", one=one, trouble=hive.destruction.trouble(one))
        for one in await hive.tombstones.all()
    }


class TombstoneForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def routes(self) -> list[Route]:
        return [
            Route("/agents/{name}/destroy", self.destroy, methods=["POST"]),
            Route("/tombstones/revive", self.revive, methods=["POST"]),
            Route("/tombstones/purge", self.purge, methods=["POST"]),
        ]

    async def destroy(self, request: Request) -> Response:
        name = parse_agent_name(request.path_params["name"])
        await read_form(request)
        found = await self._hive.destruction.destroy(name, at_once=False)
        if found is not None and (why := self._hive.destruction.trouble(found)):
            return yes(request, "/", f"{name} is destroyed as soon as that can be done: {why}")
        if found is not None and found.state == "destroying":
            return yes(request, "/", f"{name} ends at its turn's edge and is destroyed then")
        return yes(request, "/", f"{name} is destroyed; what it had is kept")

    async def revive(self, request: Request) -> Response:
        form = await read_form(request)
        tombstone = await self._hive.destruction.revive(form.get("tombstone"))
        return yes(request, "/", f"{tombstone.name} is {'configured' if tombstone.configured else 'an agent'} again")

    async def purge(self, request: Request) -> Response:
        form = await read_form(request)
        tombstone = await self._hive.destruction.purge(form.get("tombstone"))
        return yes(request, "/", f"{tombstone.label} is removed")
