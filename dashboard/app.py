"""The dashboard as one ASGI application: routes, and what its errors look like."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dashboard.answers import Unsure, asked, no, refused
from dashboard.approvals import ApprovalForms
from dashboard.credentials import CredentialForms
from dashboard.deploys import DeployForms
from dashboard.door import Door
from dashboard.files import Files
from dashboard.forms import Forms
from dashboard.pages import HOME, Pages
from dashboard.snapshots import SnapshotForms
from dashboard.spend import SpendForms
from dashboard.steering import SteeringForms
from dashboard.tombstones import TombstoneForms
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

log = logging.getLogger(__name__)


def build_app(hive: Hive) -> ASGIApp:
    """The application, with the dashboard at "/"."""
    pages, forms, spend, steering = Pages(hive), Forms(hive), SpendForms(hive), SteeringForms(hive)
    app = Starlette(
        routes=[
            Route("/", pages.front),
            Route("/agents/{name}", pages.agent),
            Route("/live", pages.live),
            Route("/search", pages.search),
            Route("/projects", pages.projects),
            Route("/threads/{id}", pages.thread),
            Route("/agents/{name}/live", pages.agent_live),
            Route("/sign-in", pages.sign_in),
            Route("/static/{name}", pages.asset),
            Route("/sign-out", forms.sign_out, methods=["POST"]),
            Route("/estop", forms.estop, methods=["POST"]),
            Route("/thaw", forms.thaw, methods=["POST"]),
            *CredentialForms(hive).routes(),
            *TombstoneForms(hive).routes(),
            *SnapshotForms(hive).routes(),
            *DeployForms(hive).routes(),
            Route("/budgets", spend.set, methods=["POST"]),
            Route("/budgets/remove", spend.remove, methods=["POST"]),
            Route("/agents/{name}/command", steering.command, methods=["POST"]),
            Route("/updates", steering.update_all, methods=["POST"]),
            Route("/messages", forms.send, methods=["POST"]),
            Route("/messages/{id}/files/{n}", Files(hive).download),
            Route("/messages/{id}/release", forms.release, methods=["POST"]),
            Route("/messages/{id}/requeue", forms.requeue, methods=["POST"]),
            Route("/messages/{id}/drop", forms.drop, methods=["POST"]),
            Route("/questions/{id}/answer", forms.answer, methods=["POST"]),
            Route("/approvals/{id}", pages.approval),
            *ApprovalForms(hive).routes(),
        ],
        exception_handlers={
            Refusal: _on_refusal,
            Unsure: _on_unsure,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
    )
    return Door(app, hive.sign_ins.valid, no)


def at_home(app: ASGIApp, home: AgentName) -> ASGIApp:
    """The same application for an agent's own port: that agent's page is at "/"."""

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, HOME: home}, receive, send)

    return serve


async def _on_refusal(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Refusal)
    return refused(request.scope, exc)


async def _on_unsure(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, Unsure)
    return asked(request.url.path, exc)


async def _on_http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    sentence = {
        404: "there is no page at this address",
        405: f"this address does not take {request.method}",
    }.get(exc.status_code, exc.detail)
    answer = no(request.scope, exc.status_code, sentence)
    answer.headers.update(exc.headers or {})
    return answer


async def _on_bug(request: Request, exc: Exception) -> Response:
    log.error("cannot answer %s %s", request.method, request.url.path, exc_info=exc)
    return no(request.scope, 500, "the hive could not answer; its log says why")
