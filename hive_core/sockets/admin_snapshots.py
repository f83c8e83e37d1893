"""The operator's verbs about snapshots of agents' /state, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_agent_name

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def snapshot_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def snapshots(args: Args) -> Any:
        agent = await hive.agents.get(parse_agent_name(args.get("agent")))
        listed = [asdict(one) for one in await hive.snapshots.all(agent.name)]
        trouble = hive.snapshots.trouble(agent.name) or None
        return {"agent": agent.name, "snapshots": listed, "trouble": trouble}

    async def snapshot(args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        taken = await hive.snapshots.take(name)
        return {"agent": name, "snapshot": asdict(taken) if taken else None}

    async def restore_state(args: Args) -> Any:
        name, at_once = parse_agent_name(args.get("agent")), args.get("now", False)
        if not isinstance(at_once, bool):
            raise Refusal("usage", "cannot use `now`: give true or false")
        restored, kept = await hive.snapshots.restore(name, args.get("snapshot"), at_once=at_once)
        return {"agent": name, "restored": asdict(restored), "kept": asdict(kept)}

    return {
        "snapshots": (snapshots, {"agent"}),
        "snapshot": (snapshot, {"agent"}),
        "restore_state": (restore_state, {"agent", "snapshot", "now"}),
    }
