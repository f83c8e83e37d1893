"""The tool `run_in_background` as the bridge offers it: the harness does the work, through a socket of its own.

The socket's name is an abstract one, so no process that dies leaves a file; a sandbox has such names for itself, unless
it shares a network: then it is a path in there.
Standard library alone.
"""

from __future__ import annotations

import json
import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NAME = "run_in_background"
ANSWER_WITHIN_S = 10.0
ANSWER_LIMIT_BYTES = 64 * 1024
# Each character of it is in every prompt.
TOOL = {
    "name": NAME,
    "description": "Run a shell command that goes on when this turn has ended. A message wakes you when it ends. "
    "`kill -- -GROUP` stops it.",
    "inputSchema": {
        "type": "object",
        "properties": {"command": {"type": "string"}, "note": {"type": "string"}},
        "required": ["command"],
    },
}


def with_tool(result: object) -> bool:
    """Add the tool to the result of a `tools/list`, if it is the last part of one. Whether it was."""
    if not isinstance(result, dict) or not isinstance(result.get("tools"), list) or result.get("nextCursor"):
        return False
    result["tools"].append(TOOL)
    return True


def call(address: str, arguments: object) -> dict[str, Any]:
    """Ask the harness, and return the result in MCP's form."""
    try:
        answer = _ask(address, {"arguments": arguments, "env": dict(os.environ)})
    except (OSError, ValueError) as exc:
        answer = {"error": f"cannot run in the background: the harness does not answer ({exc})"}
    if "error" in answer:
        return {"content": [{"type": "text", "text": str(answer["error"])}], "isError": True}
    return {"content": [{"type": "text", "text": json.dumps(answer)}], "structuredContent": answer}


def socket_name(address: str) -> str:
    """What the socket of an address is called: a path, or an abstract name."""
    return address if address.startswith("/") else f"\0{address}"


def _ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as harness:
        harness.settimeout(ANSWER_WITHIN_S)
        harness.connect(socket_name(address))
        harness.sendall(json.dumps(request).encode("utf-8", "replace") + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            if not (data := harness.recv(ANSWER_LIMIT_BYTES)):
                raise ValueError("it hung up")
            answer += data
    found = json.loads(answer)
    if not isinstance(found, dict):
        raise ValueError("it said something else")
    return found
