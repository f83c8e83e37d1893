"""Reach: what an agent talked to, and what it was refused."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.visible import counted, mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def reach(arguments: Namespace) -> None:
    result = Client().call("reach", agent=arguments.agent, since=arguments.since)
    emit(arguments, result, _reach(result))


def _reach(result: dict[str, Any]) -> str:
    from hive_core.cli import show

    parts, name = [], show.safe(result["agent"])
    if result["hosts"]:
        cells = [
            [
                _where(row),
                f"{row['connections']:,}",
                _size(row["sent"]),
                _size(row["received"]),
                show.day(row["last_at_ms"]),
                ", ".join(f"{row[end]:,} {end}" for end in ("open", "failed", "cut") if row[end]),
            ]
            for row in result["hosts"]
        ]
        parts.append(show.table(cells, ["host", "connections", "sent", "received", "last", ""]))
    if result["refusals"]:
        refused = [
            [_where(row), show.safe(row["how"]), f"{row['count']:,}", show.day(row["last_at_ms"]), _reason(row)]
            for row in result["refusals"]
        ]
        parts.append(show.table(refused, ["refused", "how", "times", "last", "why"]))
    may = "may reach " + (", ".join(map(show.safe, result["may"])) or "nothing beside its model")
    if result["gone"]:
        may = "is no agent now, and reaches nothing; those that had the name did"
    elif result["network"] == "host":
        may = "may reach what this machine does, and nothing tells of that: it has the host's network"
    parts.insert(0, f"{name} {may}")
    total = result["total"]
    said = f"{counted(total['connections'], 'connection')}, {_size(total['sent'])} sent, "
    said += f"{_size(total['received'])} received, {counted(total['refused'], 'refusal')}"
    said += f" since {show.day(result['since_ms'])}"
    if result["kept_from_ms"]:
        said += f"; of those before {show.day(result['kept_from_ms'])} none is kept (connections_kept, history_kept_s)"
    return "\n\n".join([*parts, said])


def _where(row: dict[str, Any]) -> str:
    from hive_core.cli import show

    if row["host"] == "*":
        return "several"
    host = f"[{row['host']}]" if ":" in row["host"] else row["host"]
    return show.safe(f"{host}:{row['port']}")


def _reason(row: dict[str, Any]) -> str:
    from hive_core.cli import show

    return show.safe(row["reason"] or "")


def _size(count: int) -> str:
    return mib(count) if count >= 2**20 else f"{count:,} B"
