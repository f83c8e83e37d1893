"""A client of one MCP server over stdio, as claude starts it: for the rehearsal. Standard library alone."""

from __future__ import annotations

import json
import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PROTOCOL_VERSION = "2025-11-25"


class ToolServerGone(Exception):
    """The server ended, or never was."""


class ToolServer:
    """One server of an mcpServers entry. Raises ToolServerGone when it cannot be started, or ends."""

    def __init__(self, entry: dict[str, Any]) -> None:
        command = [entry["command"], *entry["args"]]
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as exc:
            raise ToolServerGone(f"cannot start {command[0]}: {exc.strerror}") from None
        self._last_id = -1
        client = {"name": "rehearsal", "version": "1"}
        self._ask("initialize", {"protocolVersion": PROTOCOL_VERSION, "capabilities": {}, "clientInfo": client})
        self._say({"method": "notifications/initialized"})

    def tools(self) -> list[str]:
        return [str(tool["name"]) for tool in self._ask("tools/list", {}).get("tools", [])]

    def call(self, name: str, arguments: dict[str, Any], tool_use_id: str) -> dict[str, Any]:
        """The result of a tool, in MCP's form; a protocol error becomes a result that is an error."""
        meta = {"claudecode/toolUseId": tool_use_id, "progressToken": self._last_id + 1}
        return self._ask("tools/call", {"name": name, "arguments": arguments, "_meta": meta})

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        self._last_id += 1
        self._say({"id": self._last_id, "method": method, "params": params})
        while True:
            message = self._hear()
            if "method" in message:
                if "id" in message:
                    self._say({"id": message["id"], "error": {"code": -32601, "message": "not offered"}})
            elif message.get("id") == self._last_id:
                break
        if "error" in message:
            text = str(message["error"].get("message", message["error"]))
            return {"content": [{"type": "text", "text": text}], "isError": True}
        result: dict[str, Any] = message["result"]
        return result

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise ToolServerGone("Connection closed") from None

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ToolServerGone("Connection closed")
        message: dict[str, Any] = json.loads(line)
        return message


def result_text(result: dict[str, Any]) -> str:
    return "\n".join(str(part.get("text", "")) for part in result.get("content", []) if part.get("type") == "text")


def result_fields(result: dict[str, Any]) -> dict[str, Any]:
    """The structured result, or what the text holds when that is a JSON object."""
    structured = result.get("structuredContent")
    if structured is None:
        try:
            structured = json.loads(result_text(result))
        except ValueError:
            structured = None
    return structured if isinstance(structured, dict) else {}
