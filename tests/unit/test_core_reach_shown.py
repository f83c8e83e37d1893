"""What `hive reach` prints."""

from __future__ import annotations

from typing import Any

from hive_core.cli.reach import _reach
from hive_core.cli.show import day

SINCE, LAST = 1_790_000_000_000, 1_790_000_100_000
NONE = dict.fromkeys(("connections", "open", "failed", "cut", "sent", "received", "refused"), 0)


def host(name: str, port: int, **more: int) -> dict[str, Any]:
    return {**NONE, "host": name, "port": port, "last_at_ms": LAST, **more}


def result(**changes: Any) -> dict[str, Any]:
    nothing = {
        "gone": False,
        "network": "private",
        "may": [],
        "since_ms": SINCE,
        "kept_from_ms": None,
        "hosts": [],
        "refusals": [],
        "total": NONE,
    }
    return {"agent": "iris", **nothing, **changes}


def test_an_agent_that_reached_nothing_is_two_lines() -> None:
    assert _reach(result()).splitlines() == [
        "iris may reach nothing beside its model",
        "",
        f"0 connections, 0 B sent, 0 B received, 0 refusals since {day(SINCE)}",
    ]


def test_hosts_and_refusals_are_tables_in_which_nothing_is_hidden() -> None:
    refusal = {"host": "2001:db8::1", "port": 80, "how": "GET", "count": 2, "reason": "no\u202e", "last_at_ms": LAST}
    total = {**NONE, "connections": 1_203, "sent": 12_000_000, "refused": 2}
    hosts = [host("git.lan", 443, connections=1_200, open=1, failed=2, sent=12_000_000), host("*", 0, connections=3)]
    shown = _reach(result(may=["git.lan:443"], hosts=hosts, refusals=[refusal], total=total, kept_from_ms=LAST))
    assert "iris may reach git.lan:443" in shown
    assert "git.lan:443  1,200" in shown
    assert "11.4 MiB" in shown
    assert "1 open, 2 failed" in shown
    assert "several" in shown
    assert "[2001:db8::1]:80  GET" in shown
    assert "\u202e" not in shown
    assert (
        f"2 refusals since {day(SINCE)}; of those before {day(LAST)} none is kept (connections_kept, history_kept_s)"
        in shown
    )
