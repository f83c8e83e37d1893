"""model.sock: the relay from an agent to the model provider.

The credential stays on the host: the agent's program holds a placeholder, and the relay puts the real one in its
place. Bodies pass unchanged as they come, in both directions; the answer's `usage` is read along, never altered. Only
what the pinned program uses is let through.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import httpx2
import trio
from starlette.types import Message, Receive, Scope, Send

from hive_core.credentials import Credential
from hive_core.protocol.words import AgentName

log = logging.getLogger(__name__)

ALLOWED = frozenset({("HEAD", "/"), ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens")})
CALLS_LIMIT = 16  # of one agent at a time
PIECE_WITHIN_S = 60.0  # how long a body may pause
BODY_LIMIT_BYTES = 64 * 1024 * 1024
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


class UsageReader:
    """Reads `usage` along a provider's answer, streaming or whole, in bounded memory."""

    _KEPT_BYTES = 256 * 1024

    def __init__(self) -> None:
        self.usage: dict[str, int] = {}
        self._rest = b""

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-self._KEPT_BYTES :]
        for line in lines:
            self._read(line)

    def end(self) -> dict[str, int]:
        """Token counts by kind, the last word of each; empty when the answer told none."""
        self._read(self._rest)
        return self.usage

    def _read(self, line: bytes) -> None:
        if b'"usage"' not in line:
            return
        try:
            event = json.loads(line.removeprefix(b"data:"))
            found = event.get("usage") or event["message"]["usage"]
            counts = {str(k): v for k, v in found.items() if isinstance(v, int) and not isinstance(v, bool)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        self.usage.update(counts)


@dataclass
class ModelRelay:
    """One agent's relay, an ASGI application.

    refusal  gives None, or the sentence that answers every call with 503 (the agent is paused)
    told     is called with the usage of each answer
    """

    name: AgentName
    client: httpx2.AsyncClient
    base_url: str
    credential: Callable[[], Credential | None]
    refusal: Callable[[], Awaitable[str | None]]
    told: Callable[[dict[str, int]], None]
    under_way: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        method, path = scope["method"], scope["path"]
        if (method, path) not in ALLOWED:
            await _answer(send, 403, f"the relay of this hive does not pass {method} {ascii(path)[:80]}")
        elif sentence := await self.refusal():
            await _answer(send, 503, sentence)
        elif method == "HEAD":
            await _answer(send, 200, "")
        elif self.under_way >= CALLS_LIMIT:
            await _answer(send, 429, f"{CALLS_LIMIT} calls of {self.name} are under way, which is the limit")
        else:
            self.under_way += 1
            try:
                await self._pass_on(scope, receive, send)
            finally:
                self.under_way -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        credential = self.credential()
        if credential is None:
            await _answer(
                send, 401, "this hive has no credential for the model provider; `hive up` says how to give one"
            )
            return
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        headers = passed_headers(scope["headers"], _REPLACED) + credential.headers()
        body = _Body(receive)
        # Not the client's build_request: that adds its own headers, and the cookies of every agent's answers.
        request = httpx2.Request(
            scope["method"],
            f"{self.base_url.rstrip('/')}{scope['path']}{query}",
            headers=[*headers, *_length(scope["headers"])],
            content=body.pieces(),
            extensions={"timeout": self.client.timeout.as_dict()},
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(body.wait_hung_up, nursery.cancel_scope)
            await self._exchange(request, body, send)
            nursery.cancel_scope.cancel()

    async def _exchange(self, request: httpx2.Request, body: _Body, send: Send) -> None:
        try:
            response = await self.client.send(request, stream=True, follow_redirects=False)
        except httpx2.HTTPError as exc:
            if body.too_long:
                await _answer(send, 413, f"the relay of this hive passes at most {BODY_LIMIT_BYTES:,} bytes")
                return
            log.warning("the provider did not answer %s: %s", self.name, exc, extra={"agent": self.name})
            # Only what the network says: a complaint about the request would quote its headers, the credential's too.
            reason = str(exc) if isinstance(exc, httpx2.ConnectError) else type(exc).__name__
            await _answer(send, 502, f"the model provider at {self.base_url} cannot be reached: {reason}")
            return
        try:
            await self._stream_back(response, send)
        finally:
            with trio.CancelScope(shield=True):
                await response.aclose()

    async def _stream_back(self, response: httpx2.Response, send: Send) -> None:
        headers = passed_headers(response.headers.raw, frozenset())
        await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        reader = UsageReader()
        try:
            async with aclosing(response.aiter_raw()) as chunks:
                async for chunk in chunks:
                    reader.feed(chunk)
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx2.HTTPError as exc:
            # Left without an end, so that the program sees that it was cut.
            log.warning("the answer to %s was cut: %s", self.name, exc, extra={"agent": self.name})
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if usage := reader.end():
                self.told(usage)


def _length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    length = [] if chunked else [(name, value) for name, value in headers if name == b"content-length"]
    # Plain text, so that usage can be read along.
    return [*length, (b"accept-encoding", b"identity")]


class _Body:
    """A request's body as it comes, and after it the wait for the hang-up: ASGI tells both on one channel."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._whole = trio.Event()
        self.too_long = False

    async def pieces(self) -> AsyncIterator[bytes]:
        more, size = True, 0
        while more:
            with trio.move_on_after(PIECE_WITHIN_S) as pause:
                message: Message = await self._receive()
            if pause.cancelled_caught or message["type"] == "http.disconnect":
                raise httpx2.ReadError("the agent hung up")
            size += len(message.get("body", b""))
            if size > BODY_LIMIT_BYTES:
                self.too_long = True
                raise httpx2.WriteError("the body is too long")
            yield message.get("body", b"")
            more = message.get("more_body", False)
        self._whole.set()

    async def wait_hung_up(self, scope: trio.CancelScope) -> None:
        """Cancel `scope` when the agent hangs up: nobody waits for the answer, and it costs."""
        await self._whole.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


async def _answer(send: Send, status: int, sentence: str) -> None:
    kind = {
        401: "authentication_error",
        403: "permission_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "api_error",
        502: "api_error",
    }.get(status)
    body = json.dumps({"type": "error", "error": {"type": kind, "message": sentence}}).encode() if sentence else b""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
