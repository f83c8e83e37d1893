"""The dashboard's front door: who may come in, before any page is thought of.

A browser carries the operator's authority to every address it is told to visit, so each request must show that it
was meant for us (Host), comes from our own pages (Sec-Fetch-Site, Origin) and from a browser that signed in (cookie).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hive_core.hive import HOST_NAME
from hive_core.protocol.refusal import Refusal

COOKIE = "hive_operator"
COOKIES_TRIED = 4
PUBLIC = ("/sign-in", "/static/")
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
READS = frozenset({"GET", "HEAD"})

# `same-origin`, not `no-referrer`: under the latter browsers send `Origin: null` with our own forms.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; font-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Address:
    """The one name and port that a request must be meant for: the port is the one it came in by."""

    port: int

    @property
    def host(self) -> str:
        return HOST_NAME if self.port == 80 else f"{HOST_NAME}:{self.port}"

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    def is_local_name(self, host: str) -> bool:
        """Whether `host` is another way to say this machine and port."""
        return host in {f"{name}:{self.port}" for name in LOCAL_NAMES} or (self.port == 80 and host in LOCAL_NAMES)


def address_of(scope: Scope) -> Address:
    server = scope.get("server")
    return Address(server[1] if server and server[1] else 80)


def check_source(headers: Headers, method: str, address: Address) -> None:
    """Refuse what another site's page may have caused. Raises Refusal("refused") saying which header tells."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if method in READS:
        # A link may lead here from anywhere; the cookie is Strict and stays behind. Nothing else may.
        navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
        if site in ("cross-site", "same-site") and not navigates:
            raise Refusal("refused", f"cannot answer: another site's page asks for this (Sec-Fetch-Site is {site})")
        return
    if origin is None and site is None:
        raise Refusal("refused", "cannot accept this write: it says neither Origin nor Sec-Fetch-Site")
    if origin is not None and origin != address.origin:
        raise Refusal("refused", f"cannot accept this write: its Origin must be {address.origin}")
    if site is not None and site != "same-origin":
        raise Refusal("refused", "cannot accept this write: Sec-Fetch-Site must be same-origin")


def cookies(headers: Headers) -> list[str]:
    """Every value of our cookie: another server of this host name may have planted one beside it."""
    pairs = (pair.strip().partition("=") for line in headers.getlist("cookie") for pair in line.split(";"))
    return [value for name, _, value in pairs if name == COOKIE and value][:COOKIES_TRIED]


class Door:
    """ASGI middleware that lets in what may come in and puts the security headers on every answer.

    valid    whether a cookie belongs to a signed-in browser
    refuse   the page or JSON that says no: (scope, status, sentence)

    What gets through finds its valid cookie as scope["hive_cookie"] ("" on public paths).
    """

    def __init__(
        self,
        app: ASGIApp,
        valid: Callable[[str], Awaitable[bool]],
        refuse: Callable[[Scope, int, str], Response],
    ) -> None:
        self._app = app
        self._valid = valid
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
        else:
            answer = await self._check(scope) or self._app
            await answer(scope, receive, _with_headers(send))

    async def _check(self, scope: Scope) -> Response | None:
        """The answer that keeps the request out, or None."""
        headers, address = Headers(scope=scope), address_of(scope)
        if misled := self._check_host(scope, headers, address):
            return misled
        try:
            check_source(headers, scope["method"], address)
        except Refusal as refusal:
            return self._refuse(scope, 403, refusal.message)
        scope["hive_cookie"] = ""
        if scope["path"].startswith(PUBLIC):
            return None
        for cookie in cookies(headers):
            if await self._valid(cookie):
                scope["hive_cookie"] = cookie
                return None
        return self._refuse(scope, 401, "this browser is not signed in")

    def _check_host(self, scope: Scope, headers: Headers, address: Address) -> Response | None:
        hosts = headers.getlist("host")
        target = scope["raw_path"].decode("latin-1")
        if hosts == [address.host] and target.startswith("/"):
            return None
        if len(hosts) == 1 and address.is_local_name(hosts[0]) and scope["method"] in READS and target.startswith("/"):
            query = scope["query_string"].decode("latin-1")
            return RedirectResponse(f"{address.origin}{target}{'?' if query else ''}{query}", 307)
        # Not a page: whoever asked under another name gets no markup to frame or script.
        sentence = f"cannot answer to this Host: open {address.origin} instead\n"
        return Response(sentence, 421, media_type="text/plain")


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            own = headers.get("Content-Security-Policy")  # of an answer that is no page of ours, and may do less
            for name, value in _HEADERS.items():
                headers[name] = value
            if own is not None:
                headers["Content-Security-Policy"] = own
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return send_with_headers
