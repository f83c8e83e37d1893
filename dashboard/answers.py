"""How the dashboard says no, and where it goes on after a yes: JSON for the script, a page for a plain form."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import Scope

from dashboard.rows import render
from hive_core.protocol.refusal import Refusal

STATUS = {"usage": 400, "refused": 403, "not_found": 404, "not_running": 409, "conflict": 409, "unavailable": 503}
CODE = dict.fromkeys((400, 405, 413, 415), "usage") | {
    401: "refused",
    403: "refused",
    404: "not_found",
    409: "conflict",
}
TITLES = {
    400: "that does not parse",
    401: "who goes there?",
    403: "not this way",
    404: "n0th1ng here",
    405: "not this way",
    409: "the hive moved on",
    413: "too much",
    500: "something broke",
    503: "not now",
}
_BACK = re.compile(r"/(agents/[a-z0-9-]{1,30})?")


class Unsure(Exception):
    """A form whose sender is to be asked before it acts: the sentence, and the fields to send then."""

    def __init__(self, ask: str, fields: dict[str, str]) -> None:
        super().__init__(ask)
        self.ask = ask
        self.fields = fields


def wants_json(scope: Scope) -> bool:
    accepted = next((value for name, value in scope["headers"] if name == b"accept"), b"")
    return b"application/json" in accepted


def no(scope: Scope, status: int, sentence: str) -> Response:
    """A refusal in the one error shape, or as a page that names the way out."""
    if wants_json(scope):
        error = Refusal(CODE.get(status, "unavailable"), sentence)
        return JSONResponse({"error": error.to_wire()}, status)
    if scope["path"].endswith("/live"):
        return Response(f"{sentence}\n", status, media_type="text/plain")
    return _sign_in_first(sentence) if status == 401 else notice(status, TITLES.get(status, "no"), sentence)


def refused(scope: Scope, refusal: Refusal) -> Response:
    if wants_json(scope):
        return JSONResponse({"error": refusal.to_wire()}, STATUS.get(refusal.code, 500))
    return no(scope, STATUS.get(refusal.code, 500), refusal.message)


def notice(
    status: int,
    title: str,
    sentence: str,
    *,
    way_out: str = "",
    command: str = "",
    onward: tuple[str, str] = ("/", "to the dashboard"),
    moves_on: bool = False,
) -> Response:
    html = render(
        "notice.html",
        status=status,
        title=title,
        sentence=sentence,
        way_out=way_out,
        command=command,
        onward=onward[0],
        onward_word=onward[1],
        moves_on=moves_on,
    )
    return HTMLResponse(html, status)


def asked(path: str, unsure: Unsure) -> Response:
    """The page that asks: yes sends the same form without its `ask`, no goes back."""
    page = re.match(r"/agents/[^/]+", path)
    back = page[0] if page else unsure.fields.get("back", "")
    html = render("asking.html", path=path, unsure=unsure, back=back if _BACK.fullmatch(back) else "/")
    return HTMLResponse(html)


def _sign_in_first(sentence: str) -> Response:
    # A Strict cookie stays behind when the link stood on another site: the same link clicked here brings it.
    return notice(
        401,
        TITLES[401],
        sentence,
        way_out="a link that signs it in, once, is printed by:",
        command="hive dashboard",
        onward=("", "signed in already? go on"),
    )


def yes(request: Request, back: str, said: str) -> Response:
    """What was done, for the script's toast; a plain form goes back to one of our pages."""
    if wants_json(request.scope):
        return JSONResponse({"ok": True, "said": said})
    return RedirectResponse(back if _BACK.fullmatch(back) else "/", 303)
