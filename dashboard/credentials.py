"""The panel of credentials: its rows, and what the operator does there."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboard.answers import yes
from dashboard.forms_read import read_form
from hive_core.credentials import DEFAULT, parse_credential_name
from hive_core.hive import Hive
from hive_core.protocol.words import OPERATOR


def credential_rows(hive: Hive) -> dict[str, dict[str, Any]]:
    """By name, every credential that is there, that an agent needs, or that somebody logs in; with its login."""
    rows = {row["name"]: row for row in hive.breaker.rows()}
    for name in hive.logins.all:
        rows.setdefault(name, hive.breaker.row(name))
    shown = {name: row for name, row in rows.items() if row["source"] or row["agents"] or name in hive.logins.all}
    return {name: {**row, "login": hive.logins.all.get(name)} for name, row in shown.items()}


def lacks_credential(hive: Hive, agent: str | None = None) -> str:
    """Why an agent, or the first of all that does, lacks its credential; "" when none does."""
    for row in hive.breaker.rows():
        if row["state"] == "missing" and (row["agents"] if agent is None else agent in row["agents"]):
            return str(row["sentence"])
    return ""


class CredentialForms:
    def __init__(self, hive: Hive) -> None:
        self._hive = hive

    def routes(self) -> list[Route]:
        forms = {"login": self.login, "code": self.code, "cancel": self.cancel, "resume": self.resume}
        return [Route(f"/credentials/{word}", form, methods=["POST"]) for word, form in forms.items()]

    async def login(self, request: Request) -> Response:
        name, _ = await _named(request)
        self._hive.logins.begin(name, "the dashboard")
        return yes(request, "/", f"the login of {name} begins: its link comes in a moment")

    async def code(self, request: Request) -> Response:
        name, form = await _named(request)
        await self._hive.logins.enter_code(name, form.get("code"))
        return yes(request, "/", f"the code for {name} is being checked")

    async def cancel(self, request: Request) -> Response:
        name, _ = await _named(request)
        self._hive.logins.cancel(name)
        return yes(request, "/", f"the login of {name} is cancelled")

    async def resume(self, request: Request) -> Response:
        name, _ = await _named(request)
        await self._hive.breaker.resume(name, OPERATOR)
        return yes(request, "/", f"the credential {name} is tried again")


async def _named(request: Request) -> tuple[str, dict[str, str]]:
    form = await read_form(request)
    return parse_credential_name(form.get("credential", DEFAULT)), form
