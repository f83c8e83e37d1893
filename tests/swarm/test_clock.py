"""The clock of a whole daemon: questions, reminders and schedules come due, also behind a SIGKILL."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import WITHIN_S, open_daemon

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
INITIALIZE = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}


def call_tool(door: Path, tool: str, **arguments: Any) -> Any:
    """What a tool answers an agent, through its real socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WITHIN_S)
        sock.connect(str(door))
        lines = sock.makefile("rwb")
        call = {"name": tool, "arguments": arguments}
        for number, (method, params) in enumerate((("initialize", INITIALIZE), ("tools/call", call))):
            request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
            lines.write(json.dumps(request).encode() + b"\n")
            if method == "tools/call":
                break
            lines.flush()
            lines.readline()
            lines.write(b'{"jsonrpc": "2.0", "method": "notifications/initialized"}\n')
        lines.flush()
        return json.loads(lines.readline())["result"]["structuredContent"]


def test_what_is_due_fires_once_though_the_daemon_is_killed_before() -> None:
    with open_daemon(HIVE_QUESTION_TTL_S="3600", HIVE_DEFAULT_PROGRAM="rehearsal") as daemon:
        client = daemon.start()
        daemon.wait_live(lambda agent: agent["state"] == "idle")
        client.call("pause", agent="hm1nd")
        door = daemon.runtime / "manager" / "mcp.sock"
        assert call_tool(door, "ask", to="operator", question="May I?")["question"] == 1
        assert call_tool(door, "remind", after_s=3600, body="look again")["reminder"] == 1
        assert client.call("schedule", agent="hm1nd", body="hourly", every_s=3600)["schedule"] == 1
        assert [one["question"] for one in client.call("loose_ends")["waits_on_you"]["questions"]] == [1]
        daemon.kill()
        with contextlib.closing(sqlite3.connect(daemon.state / "hive.sqlite")) as database, database:
            # The hour is over: nobody has to be quick before it is.
            database.execute("UPDATE questions SET expires_at_ms = expires_at_ms - 3600000")
            database.execute("UPDATE reminders SET due_at_ms = due_at_ms - 3600000")
            database.execute(
                "UPDATE schedules SET created_at_ms = created_at_ms - 3600000, next_at_ms = next_at_ms - 3600000"
            )
        client = daemon.start()
        for kind in ("question_expired", "reminder_fired", "schedule_fired"):
            daemon.events(client, lambda event, kind=kind: event["kind"] == kind)
        kinds = [event["kind"] for event in client.stream("events", limit=1000)]
        assert [kinds.count(kind) for kind in ("question_expired", "reminder_fired", "schedule_fired")] == [1, 1, 1]
        bodies = [row["body"] for row in client.call("messages", agent="hm1nd")["messages"]]
        assert sum(body.startswith(("question_expired:", "reminder:", "hourly")) for body in bodies) == 3
