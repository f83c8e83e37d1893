"""model.sock: the relay from an agent to the model provider.

The credential stays on the host: the agent's program holds a placeholder, and the relay puts the real one in its
place. Bodies pass unchanged as they come, in both directions; the answer's `usage` is read along, never altered. Only
what the pinned program uses is let through, and nothing while the agent's way to the model is closed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import httpx2
import trio
from starlette.types import Receive, Scope, Send

from hive_core.credentials import Credential
from hive_core.protocol.words import AgentName
from hive_core.services.access import ACCESS, Access, Closed
from hive_core.services.charges import FREE_PATHS
from hive_core.sockets.pieces import Pieces
from hive_core.sockets.request_body import BODY_LIMIT_BYTES, RequestBody
from hive_core.usage import Call

log = logging.getLogger(__name__)

ALLOWED = frozenset({("HEAD", "/"), ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")})
CALLS_LIMIT = 16  # of one agent at a time
LAST_WORD_S = 1.0  # that the end of an answer has on its way, also when the call is cut just then
# What the library says of a connection that ended where an answer would have begun.
_CLOSED_UNANSWERED = "Server disconnected without sending a response."
# RFC 9110 7.6.1, and what the relay sets itself.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_REPLACED = frozenset({"host", "authorization", "x-api-key", "content-length", "expect", "accept-encoding"})


def passed_headers(headers: list[tuple[bytes, bytes]], drop: frozenset[str]) -> list[tuple[bytes, bytes]]:
    """The end-to-end headers, without those that `Connection` names, in lower case as HTTP sees them."""
    named = {
        word.strip().decode("latin-1").lower()
        for name, value in headers
        if name.lower() == b"connection"
        for word in value.split(b",")
    }
    gone = _HOP_BY_HOP | drop | named
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in gone]


@dataclass
class ModelRelay:
    """One agent's relay, an ASGI application.

    credential  of the agent, None when there is none
    answered    is called with the status and the headers of each answer of the provider, before its body; of one that
                counts tokens only when it refuses the credential
    call_ended  is called once for each call that began, at its end
    call_begins is asked before: what it answers refuses the call, for now
    call_moved  is called when the answer has told a count of tokens
    turn        of the agent that runs; without one no call passes, so an agent thinks only when it has a message
    unleased    is called when it tried all the same
    """

    name: AgentName
    client: httpx2.AsyncClient
    base_url: str
    access: Access
    credential: Callable[[], Credential | None]
    answered: Callable[[Credential, int, httpx2.Headers], None]
    call_ended: Callable[[Call], None]
    call_begins: Callable[[Call], Closed | None] = lambda _: None
    call_moved: Callable[[Call], None] = lambda _: None
    turn: Callable[[], int | None] = lambda: 0
    unleased: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
    under_way: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        method, path = scope["method"], scope["path"]
        if (method, path) not in ALLOWED:
            await _answer(send, 403, f"the relay of this hive does not pass {method} {ascii(path)[:80]}")
        elif closed := self.access.closed(self.name):
            await _refuse(send, closed)
        elif method == "HEAD":
            await _answer(send, 200, "")
        elif self.turn() is None:
            await self.unleased()
            await _refuse(send, Closed("idle", f"no turn of {self.name} runs: it begins with a message", status=403))
        elif self.under_way >= CALLS_LIMIT:
            await _answer(send, 429, f"{CALLS_LIMIT} calls of {self.name} are under way, which is the limit")
        elif closed := self.call_begins(call := Call(self.name, path, _announced_bytes(scope["headers"]))):
            await _answer(send, closed.status, closed.sentence)  # its program may try again
        else:
            self.under_way += 1
            try:
                await self._pass(call, scope, receive, send)
            finally:
                self.under_way -= 1
                self.call_ended(call)

    async def _pass(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        credential = self.credential()
        if credential is None:
            await _answer(
                send, 401, "this hive has no credential for the model provider; `hive credentials` says how to give one"
            )
            return
        call.credential = credential.name
        await _Exchange(self, credential, call, scope, receive, send).run()


class _Exchange:
    """One call on its way: it ends with the provider's answer, with the agent's hang-up, or when the way closes."""

    def __init__(
        self, relay: ModelRelay, credential: Credential, call: Call, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self._relay = relay
        self._credential = credential
        self._call = call
        self._scope = scope
        self._send = send
        self._body = RequestBody(receive, _content_length(scope["headers"]))

    async def run(self) -> None:
        cut: Closed | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._body.wait_hung_up, nursery.cancel_scope)

                async def wait_closed() -> None:
                    nonlocal cut
                    cut = await self._wait_closed()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(wait_closed)
                await self._pass_on()
                nursery.cancel_scope.cancel()
            if cut is not None and not self._call.status:
                await _refuse(self._send, cut)
        finally:
            call = self._call
            call.reader.end()
            call.reached = call.reached or self._body.was_read
            call.request_bytes = self._body.size

    async def _wait_closed(self) -> Closed:
        with self._relay.access.bus.listen(ACCESS) as listener:
            while (closed := self._relay.access.cut(self._relay.name)) is None:
                await listener.wait()
        return closed

    async def _pass_on(self) -> None:
        relay = self._relay
        try:
            response = await self._ask()
        except httpx2.HTTPError as exc:
            await self._say_why(exc)
            return
        self._call.reached = True
        self._body.forget()
        try:
            # Counting tokens has limits of its own, and costs nothing: those must stop nobody's calls.
            if self._call.path not in FREE_PATHS or response.status_code in (401, 403):
                relay.answered(self._credential, response.status_code, response.headers)
            await self._stream_back(response)
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()

    async def _ask(self) -> httpx2.Response:
        """The provider's answer. Asked again where it closed a kept connection just as the call went out, the last time
        over a fresh one.

        The connection was at rest, it closed at once, and the head of no answer came: as far as can be told its close
        was on the way before the request was, and no work is sent twice. (Without this the program would be told 502,
        and would ask again itself.)
        """
        while True:
            connected: list[str] = []
            try:
                request = self._request(partial(_note_connecting, connected))
                return await self._relay.client.send(request, stream=True, follow_redirects=False)
            except (httpx2.RemoteProtocolError, httpx2.ReadError) as exc:
                closed = isinstance(exc, httpx2.ReadError) or str(exc) == _CLOSED_UNANSWERED
                if connected or not closed or not self._body.can_be_sent_again():
                    raise

    def _request(self, trace: Callable[..., Awaitable[None]]) -> httpx2.Request:
        # Not the client's build_request: that adds its own headers, and the cookies of every agent's answers.
        relay, scope = self._relay, self._scope
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        headers = self._credential.put_on(passed_headers(scope["headers"], _REPLACED))
        return httpx2.Request(
            scope["method"],
            f"{relay.base_url.rstrip('/')}{scope['path']}{query}",
            headers=[*headers, *_length(scope["headers"])],
            content=self._body.pieces(),
            extensions={"timeout": relay.client.timeout.as_dict(), "trace": trace},
        )

    async def _say_why(self, exc: httpx2.HTTPError) -> None:
        relay = self._relay
        if self._body.too_long:
            await _answer(self._send, 413, f"the relay of this hive passes at most {BODY_LIMIT_BYTES:,} bytes")
            return
        log.warning("the provider did not answer %s: %s", relay.name, exc, extra={"agent": relay.name})
        # Only what the network says: a complaint about the request would quote its headers, the credential's too.
        reason = str(exc) if isinstance(exc, httpx2.ConnectError) else type(exc).__name__
        await _answer(self._send, 502, f"the model provider at {relay.base_url} cannot be reached: {reason}")

    async def _stream_back(self, response: httpx2.Response) -> None:
        name, call, send = self._relay.name, self._call, self._send
        headers = passed_headers(response.headers.raw, frozenset())
        call.status = response.status_code
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        pieces = Pieces()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all, pieces)
            try:
                async with aclosing(response.aiter_raw()) as chunks:
                    async for chunk in chunks:
                        if call.reader.feed(chunk):
                            self._relay.call_moved(call)
                        await pieces.add(chunk)
                came_whole = True
            except httpx2.HTTPError as exc:
                came_whole = False
                log.warning("the answer to %s was cut: %s", name, exc, extra={"agent": name})
            pieces.close()
        if came_whole:  # else left without an end, so that the program sees that it was cut
            # Whoever has all of it but its end could not tell that nothing is missing.
            with trio.move_on_after(LAST_WORD_S, shield=True):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                call.complete = True

    async def _send_all(self, pieces: Pieces) -> None:
        while piece := await pieces.take():
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})


async def _note_connecting(connected: list[str], event: str, _: Mapping[str, object]) -> None:
    if event.startswith("connection."):
        connected.append(event)


def _content_length(headers: list[tuple[bytes, bytes]]) -> int | None:
    """How large a request says that it is; None where only its end tells."""
    if any(name == b"transfer-encoding" for name, _ in headers):
        return None
    lengths = [value for name, value in headers if name == b"content-length" and value.isdigit() and len(value) < 100]
    return int(lengths[0]) if lengths else None


def _announced_bytes(headers: list[tuple[bytes, bytes]]) -> int:
    """The same; of one that does not say, how large it may be."""
    length = _content_length(headers)
    return BODY_LIMIT_BYTES if length is None else min(length, BODY_LIMIT_BYTES)


def _length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    length = _content_length(headers)
    told = [] if length is None else [(b"content-length", str(length).encode())]  # as we have understood it
    # Plain text, so that usage can be read along.
    return [*told, (b"accept-encoding", b"identity")]


async def _refuse(send: Send, closed: Closed) -> None:
    await _answer(send, closed.status, closed.sentence, (b"x-should-retry", b"false"))


async def _answer(send: Send, status: int, sentence: str, *more: tuple[bytes, bytes]) -> None:
    kind = {
        401: "authentication_error",
        403: "permission_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "api_error",
        502: "api_error",
    }.get(status)
    body = json.dumps({"type": "error", "error": {"type": kind, "message": sentence}}).encode() if sentence else b""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
