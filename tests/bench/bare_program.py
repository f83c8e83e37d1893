"""The agent's program without a harness: run by its path inside a sandbox, on the standard library alone.

It is told JSON lines and answers each with one. `argv` and `env` start a new process; `line` is written to its stdin,
and the answer comes when the turn's `result` was read, or with `end` when the process has ended after it.

    {"argv"?, "env"?, "line", "end"}  →  {"begun_at", "ended_at", "session", "error"}, times of time.monotonic()
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def take_turn(process: subprocess.Popen[bytes], line: str, end: bool) -> dict[str, Any]:
    """Give the process its line, and read until the turn has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line.encode())
    process.stdin.flush()
    if end:
        process.stdin.close()
    result: dict[str, Any] = {}
    for told in process.stdout:
        event = json.loads(told)
        if event.get("type") == "result":
            result = event
            if not end:
                break
    if end or not result:
        process.wait()
    error = None if result and not result.get("is_error") else f"no good result: {result}"
    return {"session": result.get("session_id"), "error": error}


def main() -> None:
    process: subprocess.Popen[bytes] | None = None
    for order in map(json.loads, sys.stdin):
        begun_at = time.monotonic()
        if "argv" in order:
            process = subprocess.Popen(
                order["argv"],
                env=order["env"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        assert process is not None
        answer = {"begun_at": begun_at, **take_turn(process, order["line"], order["end"])}
        print(json.dumps({**answer, "ended_at": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
