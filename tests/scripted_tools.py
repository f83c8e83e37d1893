"""The hive's tools for a test: an MCP server on a unix socket with `send` and `fail`, which remembers what was called.

with ScriptedTools(tmp_path / "mcp.sock") as tools:
    ...
assert tools.calls == [("send", {"to": "operator", "body": "hi"})]
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any, Self

TEXT = {"type": "string"}
TOOLS = [
    {
        "name": "send",
        "description": "Send a message.",
        "inputSchema": {
            "type": "object",
            "properties": {"to": TEXT, "body": TEXT, "in_reply_to": {"type": "integer"}},
            "required": ["to", "body"],
        },
    },
    {"name": "fail", "description": "Always refuses.", "inputSchema": {"type": "object", "properties": {}}},
]


class ScriptedTools:
    """Open inside `with`. `calls` are the tools' names and arguments, `metas` the `_meta` of each call."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, name="scripted tools")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.metas: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        serving = []
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                break
            serving.append(threading.Thread(target=self._serve, args=(connection,)))
            serving[-1].start()
        for thread in serving:
            thread.join()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rwb") as lines:
            try:
                for line in lines:
                    message = json.loads(line)
                    if "id" in message:
                        answer = {"jsonrpc": "2.0", "id": message["id"], "result": self._answer(message)}
                        lines.write(json.dumps(answer).encode() + b"\n")
                        lines.flush()
            except OSError:
                return  # the client is gone

    def _answer(self, message: dict[str, Any]) -> dict[str, Any]:
        match message["method"]:
            case "initialize":
                return {
                    "protocolVersion": message["params"]["protocolVersion"],
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "hive", "version": "1"},
                }
            case "tools/list":
                return {"tools": TOOLS}
            case "tools/call":
                return self._call(message["params"])
            case _:
                return {}

    def _call(self, params: dict[str, Any]) -> dict[str, Any]:
        self.calls.append((params["name"], params["arguments"]))
        self.metas.append(params.get("_meta", {}))
        if params["name"] == "fail":
            return {"content": [{"type": "text", "text": "cannot do it: a rule says no"}], "isError": True}
        result = {"message": 40 + len(self.calls)}
        return {"content": [{"type": "text", "text": json.dumps(result)}], "structuredContent": result}
