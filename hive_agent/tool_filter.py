"""`hive-agent only TOOLS -- COMMAND …`: a server of tools on stdio, of which only some tools are to be seen and called.

It stands between the program and the server: what it lets through it reads, so that both ends read the same. It keeps
the model to the tools that agent.toml names; a shell in the same sandbox can start the server by itself.
Standard library alone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

from hive_agent.bridge import ANSWER_LIMIT_BYTES, Lines, TooLong
from hive_core.protocol.lines import LINE_LIMIT_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

READ_BYTES = 256 * 1024
PATIENCE_S = 2.0  # of a server whose stdin has ended


class ToolFilter:
    """The lines of one connection, newline included, both ways."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = allowed

    def to_server(self, line: bytes) -> tuple[bytes, bytes]:
        """What of a line of the program's is for the server, and what is its answer already; either may be empty."""
        message = _parse(line)
        if not isinstance(message, dict):
            return b"", _error(None, "one JSON object in a line is needed")
        if message.get("method") == "tools/call":
            params = message.get("params")
            name = params.get("name") if isinstance(params, dict) else None
            if name not in self._allowed:
                allowed = ", ".join(self._allowed)
                told = f"cannot call {str(name)[:80]}: agent.toml allows {allowed} of this server"
                return b"", _error(message.get("id"), told) if "id" in message else b""
        return _line(message), b""

    def to_program(self, line: bytes) -> bytes:
        """What the program is to read of a line of the server's."""
        message = _parse(line)
        if not isinstance(message, dict):
            return line  # of an old server that batches or prints: no answer that the program would take
        # Whatever it answers: by its id it could be taken for another one, since to the program 1 and 1.0 are the same.
        result = message.get("result")
        if isinstance(result, dict) and isinstance(result.get("tools"), list):
            result["tools"] = [
                one for one in result["tools"] if isinstance(one, dict) and one.get("name") in self._allowed
            ]
        return _line(message)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def _error(number: object, told: str) -> bytes:
    return _line({"jsonrpc": "2.0", "id": number, "error": {"code": -32602, "message": told}})


def run(allowed: Sequence[str], command: list[str]) -> int:
    """Start the server and pass lines on until it ends, or the program does; its exit code."""
    try:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except OSError as exc:
        print(f"hive-agent: cannot start {command[0]}: {exc.strerror}", file=sys.stderr)
        return 127
    into, out_of = server.stdin, server.stdout
    assert into is not None
    assert out_of is not None
    signal.signal(signal.SIGTERM, lambda number, frame: server.terminate())
    signal.signal(signal.SIGINT, lambda number, frame: server.send_signal(signal.SIGINT))
    passing, speaking = ToolFilter(allowed), threading.Lock()

    def say(line: bytes) -> None:
        with speaking:
            _write(1, line)

    def from_program(line: bytes | TooLong) -> None:
        if isinstance(line, TooLong):
            say(line.as_error())
            return
        inwards, answer = passing.to_server(line)
        _write(into.fileno(), inwards)
        say(answer)

    def read_program() -> None:
        with into:
            _read(0, Lines(LINE_LIMIT_BYTES), from_program)

    threading.Thread(target=read_program, daemon=True).start()
    _read(
        out_of.fileno(),
        Lines(ANSWER_LIMIT_BYTES),
        lambda line: say(line.as_error() if isinstance(line, TooLong) else passing.to_program(line)),
    )
    try:
        return server.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        server.kill()
        return server.wait()


def _read(descriptor: int, lines: Lines, take: Callable[[bytes | TooLong], None]) -> None:
    """Every line until the end, or until nobody takes them."""
    try:
        while data := os.read(descriptor, READ_BYTES):
            for line in lines.feed(data):
                take(line)
    except OSError:
        return


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main(arguments: list[str]) -> int:
    match arguments:
        case [tools, "--", command, *rest] if tools:
            return run(tools.split(","), [command, *rest])
        case _:
            print("usage: hive-agent only TOOL[,TOOL…] -- COMMAND …", file=sys.stderr)
            return 2
