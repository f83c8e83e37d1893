"""The buttons of an agent's page: what they do is in hive_core.commands, where the composer's /commands are too."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from dashboard.answers import yes
from dashboard.forms_read import read_form
from hive_core.commands import run_command
from hive_core.hive import Hive
from hive_core.protocol.words import OPERATOR, parse_agent_name


class SteeringForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    async def command(self, request: Request) -> Response:
        """POST /agents/NAME/command: the fields `command` and `value`."""
        name = parse_agent_name(request.path_params["name"])
        form = await read_form(request)
        said = await run_command(self._hive, name, form.get("command", ""), form.get("value", "").strip())
        return yes(request, f"/agents/{name}", said)

    async def update_all(self, request: Request) -> Response:
        """POST /updates: go on replacing agents, though one did not come up."""
        await read_form(request)
        names = await self._hive.reconciler.updates.go_on(OPERATOR)
        return yes(request, "/", f"{', '.join(names) or 'nobody'}: replaced at the edge of a turn")
