"""The operator's verb about agents that run in another shape than they would be started in now, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, parse_agent_name
from hive_core.revision import revision

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def update_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def update(args: Args) -> Any:
        """`agent`, or `all`: true. The answer: {revision, agents: whom that replaces}."""
        everyone, updates = args.get("all", False), hive.reconciler.updates
        if not isinstance(everyone, bool) or everyone == ("agent" in args):
            raise Refusal("usage", "cannot update: name one agent, or give `all`: true")
        if everyone:
            return {"revision": revision(), "agents": await updates.go_on(OPERATOR)}
        name = parse_agent_name(args["agent"])
        return {"revision": revision(), "agents": [name] if await updates.update(name, OPERATOR) else []}

    return {"update": (update, {"agent", "all"})}


def update_status(hive: Hive) -> dict[str, Any]:
    """What the status tells of updates: the revision, who is outdated, and why that stays so, or None."""
    updates = hive.reconciler.updates
    return {"revision": revision(), "outdated": updates.outdated, "update_trouble": updates.trouble or None}
