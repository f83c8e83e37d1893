"""`hive-agent mcp`: MCP over stdio on one side, over the hive's unix socket on the other; JSON-RPC, one line each.

The socket may close and come back, as it does when the daemon is started anew; the program must not notice. So the
bridge keeps every request that has no answer yet, and on a new connection replays the handshake, swallows its answer
and sends those requests again, in order. The host makes a repeated call count once (claude's tool-use id is the key).

    away       no connection: it tries again, 0.05 s to 1 s apart, as long as stdin is open
    greeting   connected, and the replayed `initialize` has no answer yet
    ready      lines pass both ways

Little more than the standard library, one thread, one poll: it is started with each turn and must be quick.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import time

from hive_agent import background_tool
from hive_core.protocol.lines import LINE_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_LIMIT_BYTES = 10 * 1024 * 1024
BACKLOG_BYTES = 1024 * 1024  # a side that takes its bytes slower than this stops the reading of the other
READ_BYTES = 256 * 1024
RETRY_FIRST_S = 0.05
RETRY_LAST_S = 1.0
KEPT_OF_LONG_LINE_BYTES = 256
_ID = re.compile(rb'"id"\s*:\s*(\d{1,18}|"[^"\\]{1,100}")\s*[,}]')

AWAY, GREETING, READY = "away", "greeting", "ready"


class TooLong:
    """A line over the limit; `id` is the JSON text of its request's id where that could be seen, `null` otherwise."""

    def __init__(self, head: bytes, tail: bytes, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        found = _ID.findall(tail) or _ID.findall(head)
        self.id = found[-1].decode() if found else "null"

    def as_error(self) -> bytes:
        limit = f"{self.limit_bytes:,} bytes"
        message = f"cannot pass the line on: it is longer than the limit of {limit}; send less in one line"
        error = json.dumps({"code": -32600, "message": message})
        return f'{{"jsonrpc":"2.0","id":{self.id},"error":{error}}}\n'.encode()


class Lines:
    """Bytes in, whole lines out, newline included. Of a line over the limit only its two ends are kept."""

    def __init__(self, limit_bytes: int = ANSWER_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._rest = bytearray()
        self._head = b""

    def feed(self, data: bytes) -> list[bytes | TooLong]:
        *ends, rest = data.split(b"\n")
        lines = [self._end(piece) for piece in ends]
        self._keep(rest)
        return lines

    def _keep(self, piece: bytes) -> None:
        self._rest += piece
        if self._head or len(self._rest) > self._limit_bytes:
            self._head = self._head or bytes(self._rest[:KEPT_OF_LONG_LINE_BYTES])
            del self._rest[:-KEPT_OF_LONG_LINE_BYTES]

    def _end(self, piece: bytes) -> bytes | TooLong:
        self._keep(piece)
        line = TooLong(self._head, bytes(self._rest), self._limit_bytes) if self._head else bytes(self._rest) + b"\n"
        self._rest.clear()
        self._head = b""
        return line


class Bridge:
    """The two ends and what must be said again. `run` returns when stdin ends or nobody reads stdout any more.

    harness   the address of the harness's own tool; "" where there is none
    """

    def __init__(self, path: str, stdin_fd: int, stdout_fd: int, harness: str = "") -> None:
        self._path = path
        self._harness = harness
        self._stdin_fd = stdin_fd
        self._stdout_fd = stdout_fd
        self._host: socket.socket | None = None
        self._state = AWAY
        self._retry_at = 0.0
        self._retry_s = RETRY_FIRST_S
        self._to_host = bytearray()
        self._to_program = bytearray()
        # The host's own limit: a refusal from here can still carry the request's id.
        self._program_lines = Lines(LINE_LIMIT_BYTES)
        self._host_lines = Lines()
        self._initialize = b""
        self._initialize_id: object = None
        self._initialized = b""
        self._welcomed = False  # the program has its answer to `initialize`
        self._in_flight: dict[object, bytes] = {}  # requests without an answer, in order
        self._lists: set[object] = set()  # those that ask for the tools
        self._late: list[bytes] = []  # notifications and junk that wait for a connection

    def run(self) -> int:
        while True:
            if self._state == AWAY and time.monotonic() >= self._retry_at:
                self._connect()
            ready = self._poll()
            if ready.get(self._stdin_fd, 0) & ~select.POLLOUT and not self._read_program():
                return 0
            if self._stdout_fd in ready and not self._write_program():
                return 0
            if self._host is not None and (events := ready.get(self._host.fileno())):
                self._serve_host(self._host, events)

    def _poll(self) -> dict[int, int]:
        poll = select.poll()
        if len(self._to_host) < BACKLOG_BYTES:
            poll.register(self._stdin_fd, select.POLLIN)
        if self._to_program:
            poll.register(self._stdout_fd, select.POLLOUT)
        if self._host is None:
            return dict(poll.poll(max(0.0, self._retry_at - time.monotonic()) * 1000))
        reading = select.POLLIN if len(self._to_program) < BACKLOG_BYTES else 0
        poll.register(self._host.fileno(), reading | (select.POLLOUT if self._to_host else 0))
        return dict(poll.poll())

    def _read_program(self) -> bool:
        data = os.read(self._stdin_fd, READ_BYTES)
        for line in self._program_lines.feed(data):
            if isinstance(line, TooLong):
                self._to_program += line.as_error()
            else:
                self._take_from_program(line)
        return bool(data)

    def _write_program(self) -> bool:
        # At most PIPE_BUF bytes: that many never block once poll has said that there is room.
        try:
            written = os.write(self._stdout_fd, self._to_program[: select.PIPE_BUF])
        except OSError:
            return False
        del self._to_program[:written]
        return True

    def _take_from_program(self, line: bytes) -> None:
        message = parse(line)
        method, request_id = message.get("method"), message.get("id")
        if method is not None and isinstance(request_id, str | int):
            if self._harness and method == "tools/call" and _named(message) == background_tool.NAME:
                return self._call_harness(message)
            if self._harness and method == "tools/list":
                self._lists.add(request_id)
            self._in_flight[request_id] = line
            if method == "initialize":
                self._initialize, self._initialize_id = line, request_id
        elif method == "notifications/initialized":
            self._initialized = line
        elif method == "notifications/cancelled":
            self._forget(message)
        elif self._state != READY and message.get("jsonrpc") and method is None:
            return None  # an answer: whoever asked is gone
        elif self._state != READY:
            self._late.append(line)
        if self._state == READY:
            self._to_host += line
        return None

    def _call_harness(self, call: dict[str, Any]) -> None:
        result = background_tool.call(self._harness, call["params"].get("arguments"))
        answer = {"jsonrpc": "2.0", "id": call["id"], "result": result}
        self._to_program += json.dumps(answer).encode() + b"\n"

    def _forget(self, cancelled: dict[str, Any]) -> None:
        params = cancelled.get("params")
        if isinstance(params, dict) and isinstance(params.get("requestId"), str | int):
            self._in_flight.pop(params["requestId"], None)

    def _connect(self) -> None:
        host = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        host.setblocking(False)
        try:
            host.connect(self._path)
        except OSError:
            host.close()
            self._back_off()
            return
        self._host = host
        self._host_lines = Lines()
        if self._welcomed:
            self._state = GREETING
            self._to_host += self._initialize
        else:
            self._resume()

    def _resume(self) -> None:
        """Say all that a new connection has not heard."""
        self._state = READY
        if self._welcomed:
            self._to_host += self._initialized
        for line in (*self._in_flight.values(), *self._late):
            self._to_host += line
        self._late.clear()

    def _hang_up(self) -> None:
        if self._host is not None:
            self._host.close()
        self._host = None
        self._to_host.clear()
        self._back_off()

    def _back_off(self) -> None:
        self._state = AWAY
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, RETRY_LAST_S)

    def _serve_host(self, host: socket.socket, events: int) -> None:
        try:
            if events & select.POLLOUT:
                del self._to_host[: host.send(self._to_host)]
            if events & ~select.POLLOUT:
                data = host.recv(READ_BYTES)
                if not data:
                    return self._hang_up()
                for line in self._host_lines.feed(data):
                    self._take_from_host(line)
        except BlockingIOError:
            return None
        except OSError:
            return self._hang_up()

    def _take_from_host(self, line: bytes | TooLong) -> None:
        if isinstance(line, TooLong):
            line = line.as_error()
        message = parse(line)
        if "id" in message and "method" not in message:
            self._retry_s = RETRY_FIRST_S
            if self._state == GREETING and message["id"] == self._initialize_id:
                return self._hang_up() if "error" in message else self._resume()
            if not self._settle(message["id"]):
                return None
            if message["id"] in self._lists:
                self._lists.discard(message["id"])
                if background_tool.with_tool(message.get("result")):
                    line = json.dumps(message).encode() + b"\n"
        if self._host is not None:
            self._to_program += line
        return None

    def _settle(self, answered: object) -> bool:
        """Note that a request has its answer. False if nobody waits for it: it was cancelled, or answered before."""
        if answered is None:
            return True  # the answer to a line that was not JSON
        if not isinstance(answered, str | int) or self._in_flight.pop(answered, None) is None:
            return False
        self._welcomed = self._welcomed or answered == self._initialize_id
        return True


def parse(line: bytes) -> dict[str, Any]:
    """The message in a line, {} when it is none: such a line is passed on, and the host says what is wrong with it."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _named(call: dict[str, Any]) -> object:
    params = call.get("params")
    return params.get("name") if isinstance(params, dict) else None


def main(argv: list[str], program: str = "hive-agent") -> int:
    match argv:
        case ["--socket", path]:
            return Bridge(path, 0, 1).run()
        case ["--socket", path, "--harness", address]:
            return Bridge(path, 0, 1, address).run()
        case _:
            print(f"usage: {program} mcp --socket PATH [--harness ADDRESS]", file=sys.stderr)
            return 2
