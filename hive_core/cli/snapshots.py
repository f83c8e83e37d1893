"""Snapshots of an agent's /state: what there is, one more, and one brought back."""

from __future__ import annotations

from hive_core.cli.client import Client
from hive_core.cli.output import emit
from hive_core.protocol.visible import counted, mib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def snapshots(arguments: Namespace) -> None:
    from hive_core.cli import show

    result = Client().call("snapshots", agent=arguments.agent)
    lines = [_line(one) for one in result["snapshots"]]
    none = f"there is no snapshot of {arguments.agent} yet: one is taken at the edge of its next turn"
    trouble = [show.paint(f"! {show.safe(result['trouble'])}", "amber")] if result["trouble"] else []
    emit(arguments, result, "\n".join([*trouble, *(lines or [none])]))


def snapshot(arguments: Namespace) -> None:
    result = Client().call("snapshot", agent=arguments.agent)
    if (taken := result["snapshot"]) is None:
        text = f"nothing changed in {arguments.agent}'s /state since its last snapshot"
    else:
        text = _line(taken)
    emit(arguments, result, text)


def restore_state(arguments: Namespace) -> None:
    result = Client().call("restore_state", agent=arguments.agent, snapshot=arguments.snapshot, now=arguments.now)
    name, restored, kept = result["agent"], result["restored"]["id"], result["kept"]["id"]
    way_back = f"what was there is kept: `hive restore-state {name} {kept}`"
    emit(arguments, result, f"{name}'s /state is that of {restored} again; {way_back}")


def _line(one: dict[str, Any]) -> str:
    from hive_core.cli import show

    but = [f"{one['left_out']:,} left out"] if one["left_out"] else []
    but += [f"{one['changed']:,} changed meanwhile"] if one["changed"] else []
    size = ", ".join([counted(one["files"], "file"), mib(one["bytes"]), *but])
    return f"{show.paint(one['id'], 'bold')} {show.ago(one['at_ms'])} ago, {size}: {show.safe(one['why'])}"
