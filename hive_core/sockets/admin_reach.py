"""host.sock: what agents talked to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from hive_core.hive import Hive
from hive_core.protocol.words import parse_agent_name
from hive_core.services.costs import parse_since
from hive_core.services.reach import reach

FLUSH_WITHIN_S = 1.0
Args = dict[str, Any]


def reach_verbs(hive: Hive) -> dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]:
    """verb → (what answers it, the arguments it takes)."""

    async def tell_reach(args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        now_ms = hive.connections.now_ms
        span = parse_since(args.get("since") or "7d", now_ms)
        with trio.move_on_after(FLUSH_WITHIN_S):  # a full disk takes nothing: then what is on it counts
            await hive.connections.flush(sums=True)
        most, kept_s = hive.config.connections_kept, hive.config.history_kept_s
        return await reach(hive.store, name, span, now_ms, most, kept_s)

    return {"reach": (tell_reach, {"agent", "since"})}
