"""The operator's verbs about agents that are destroyed, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_agent_name
from hive_core.services.tombstones import Tombstone

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def tombstone_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    def row(tombstone: Tombstone) -> dict[str, Any]:
        return {**tombstone.to_wire(), "trouble": hive.destruction.trouble(tombstone) or None}

    async def destroy(args: Args) -> Any:
        at_once = args.get("now", False)
        if not isinstance(at_once, bool):
            raise Refusal("usage", "cannot use `now`: give true or false")
        found = await hive.destruction.destroy(parse_agent_name(args.get("agent")), at_once=at_once)
        return None if found is None else row(found)

    async def tombstones(_: Args) -> Any:
        return {"tombstones": [row(one) for one in await hive.tombstones.all()]}

    async def tombstone(args: Args) -> Any:
        return row(await hive.tombstones.find(args.get("tombstone")))

    async def revive(args: Args) -> Any:
        return row(await hive.destruction.revive(args.get("tombstone")))

    async def purge(args: Args) -> Any:
        return row(await hive.destruction.purge(args.get("tombstone")))

    return {
        "destroy": (destroy, {"agent", "now"}),
        "tombstones": (tombstones, set()),
        "tombstone": (tombstone, {"tombstone"}),
        "revive": (revive, {"tombstone"}),
        "purge": (purge, {"tombstone"}),
    }
