"""JSON-RPC between one client of an agent's socket and the library's server: by lines, bounded, with true errors."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types
import trio
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.exceptions import MCPError
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp.shared.message import SessionMessage
from pydantic import ValidationError

from hive_core.protocol.lines import LINE_LIMIT_BYTES, decode, encode
from hive_core.protocol.refusal import Refusal
from hive_core.settings import describe
from hive_core.sockets.unix import Connection, Lines

IN_FLIGHT_LIMIT = 64  # requests of one connection that are not answered yet: each is a task
CANCELLED_KEPT = 256  # of a connection, to know a cancelled call by: more than are in flight


class Wire:
    """One client's connection. Of its requests no more are in flight than the limit.

    One is answered by what is written, or without a word where the client has cancelled it. A hang-up cancels none.
    """

    def __init__(self, stream: Connection) -> None:
        self._stream = stream
        self._writing = trio.Lock()
        self._ids: set[object] = set()
        self._room = trio.Event()
        self._cancelled: deque[types.RequestId] = deque(maxlen=CANCELLED_KEPT)

    async def write_out(self, from_server: Any) -> None:
        """Write what the server says, until it ends."""
        async with from_server:
            async for message in from_server:
                self._leave(getattr(message.message, "id", None))
                line = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                await self._write(line.encode() + b"\n")

    async def read_in(self, to_server: Any) -> None:
        """Hand the client's lines to the server, until it hangs up. A line that is no message gets its error."""
        lines = Lines(self._stream, LINE_LIMIT_BYTES)
        async with to_server:
            while (line := await lines.next_line()) is not None:
                async with self._writing:
                    pass  # who does not read the answers asks for no more: each of them waits in our memory
                if (error := await self._hand_over(line, to_server)) is not None:
                    await self._write(encode(error))

    def was_cancelled(self, number: types.RequestId) -> bool:
        """Whether the client has taken that request back."""
        return coerce_request_id(number) in self._cancelled

    async def leave_when_answered(self, ctx: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            return await call_next(ctx)
        finally:
            self._leave(ctx.request_id)

    async def _write(self, line: bytes) -> None:
        async with self._writing:
            await self._stream.send_all(line)

    async def _enter(self, number: types.RequestId) -> None:
        while len(self._ids) >= IN_FLIGHT_LIMIT:
            self._room = trio.Event()
            await self._room.wait()
        self._ids.add(number)

    def _leave(self, number: object) -> None:
        self._ids.discard(number)
        self._room.set()

    def _note_cancelled(self, number: types.RequestId | None) -> None:
        """The library tells a call that it is cancelled, and not by whom."""
        if number is not None:
            self._cancelled.append(coerce_request_id(number))

    async def _hand_over(self, line: bytes | Refusal, to_server: Any) -> dict[str, Any] | None:
        """Give one line to the server; the JSON-RPC error for one that is none, and the connection goes on."""
        if isinstance(line, Refusal):
            return _rpc_error(-32700, line.message)
        if not line.strip():
            return None
        try:
            message = types.jsonrpc_message_adapter.validate_json(line, by_name=False)
        except (ValidationError, ValueError) as exc:
            return _rpc_error(-32700, _trouble_of(line, exc), _id_in(line))
        if isinstance(message, types.JSONRPCNotification) and "id" in json.loads(line):
            # An id that is none makes a notification of it, and whoever asked would wait for ever.
            needs = "a request needs one that is a whole number or text, a notification has none"
            return _rpc_error(-32600, f"cannot answer {ascii(message.method)[:60]}: its id is neither; {needs}")
        if isinstance(message, types.JSONRPCRequest):
            await self._enter(message.id)
        elif isinstance(message, types.JSONRPCNotification) and message.method == "notifications/cancelled":
            self._note_cancelled(cancelled_request_id_from_params(message.params))
        await to_server.send(SessionMessage(message))
        return None


async def say_what_is_wrong(ctx: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    """The library says of every request that it does not let through no more than that its parameters are invalid."""
    try:
        return await call_next(ctx)
    except ValidationError as exc:
        raise MCPError(types.INVALID_PARAMS, f"cannot answer {ctx.method}: {describe(exc)}") from None
    except MCPError as exc:
        if exc.code != types.INVALID_PARAMS or exc.data != "":
            raise
        why = "this connection is not initialized; send initialize first"
        raise MCPError(types.INVALID_REQUEST, f"cannot answer {ctx.method}: {why}") from None


def _trouble_of(line: bytes, error: ValueError) -> str:
    """Why a line is no message of JSON-RPC: as host.sock would say it, where it is not even an object."""
    try:
        decode(line)
    except Refusal as refusal:
        return refusal.message
    first = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
    if first is not None and first["type"] == "json_invalid":  # of JSON that Python reads, and the library does not
        return f"cannot read the line: {str(first['ctx']['error'])[:200]}; send plain, flat JSON"
    return (
        'cannot read the line as JSON-RPC: it needs "jsonrpc": "2.0", a method that is text, an id that is a whole '
        "number or text where it is a request, and params, if any, that are an object"
    )


def _id_in(line: bytes) -> int | str | None:
    """The id of a request that is no good, so that its caller need not wait for ever."""
    try:
        number = json.loads(line).get("id")
    except (ValueError, AttributeError, RecursionError):
        return None
    return number if isinstance(number, int | str) and not isinstance(number, bool) else None


def _rpc_error(code: int, message: str, number: int | str | None = None) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": number, "error": {"code": code, "message": message}}
