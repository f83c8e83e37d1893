"""Agents that are destroyed: their tombstones, and what becomes of those."""

from __future__ import annotations

import sys

from hive_core.cli.client import Client
from hive_core.cli.output import confirmed, emit
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def destroy(arguments: Namespace) -> None:
    result = Client().call("destroy", agent=arguments.agent, now=arguments.now)
    name = arguments.agent
    if result is not None and result["state"] == "destroying" and result["trouble"]:
        text = f"{name} is destroyed as soon as that can be done: {result['trouble']}"
    elif result is not None and result["state"] == "destroying" and arguments.now:
        text = f"{name} was killed and has not gone yet; it is destroyed when it has: `hive tombstones` tells"
    elif result is not None and result["state"] == "destroying":
        text = f"{name} ends at its turn's edge and is destroyed then; `hive destroy {name} --now` does not wait"
    else:
        text = f"{name} is destroyed; what it had is kept: `hive revive {name}`, or `hive purge {name}`"
    emit(arguments, result, text)


def tombstones(arguments: Namespace) -> None:
    result = Client().call("tombstones")
    rows = [_line(row) for row in result["tombstones"]] or ["no agent was destroyed"]
    emit(arguments, result, "\n".join(rows))


def revive(arguments: Namespace) -> None:
    result = Client().call("revive", tombstone=arguments.tombstone)
    again = "configured again, and no agent yet" if result["configured"] else "an agent again, and is started"
    emit(arguments, result, f"{result['name']} is {again}")


def purge(arguments: Namespace) -> int:
    client = Client()
    found = client.call("tombstone", tombstone=arguments.tombstone)
    if not arguments.yes:
        _ask(found)
    # By its label: the one that was shown, and no other.
    result = client.call("purge", tombstone=found["tombstone"])
    emit(arguments, result, f"{found['tombstone']} is removed: {_size(found)}")
    return 0


def _ask(found: dict[str, Any]) -> None:
    what = f"{found['tombstone']}: its notes, sessions and configuration, {_size(found)}"
    if not sys.stdin.isatty():
        raise Refusal("usage", f"cannot ask whether to remove {what}: there is no terminal; give --yes")
    print(f"this removes {what}, for good", file=sys.stderr)
    if not confirmed("remove it?"):
        raise Refusal("refused", f"cannot purge {found['tombstone']}: you did not say yes; nothing was removed")


def _line(row: dict[str, Any]) -> str:
    from hive_core.cli import show

    state = "" if row["state"] == "kept" else f" {show.paint(row['state'], 'amber')}"
    trouble = f"\n    {show.safe(row['trouble'])}" if row["trouble"] else ""
    when = show.ago(row["destroyed_at_ms"])
    told = f"since {when}" if row["state"] == "destroying" else f"{_size(row)}, destroyed {when} ago"
    return f"{show.paint(row['tombstone'], 'bold')}{state} {told}{trouble}"


def _size(row: dict[str, Any]) -> str:
    return "size unknown" if row["bytes"] is None else mib(row["bytes"])
