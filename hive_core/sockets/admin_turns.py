"""The operator's verbs about turns, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_agent_name, parse_id, shown

Args = dict[str, Any]
LIMIT_MOST = 1000


def turn_verbs(hive: Hive) -> dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]:
    """verb → (what answers it, the arguments it takes)."""

    async def turns(args: Args) -> Any:
        limit, agent = args.get("limit", 50), None
        if isinstance(limit, bool) or not isinstance(limit, int) or not 0 < limit <= LIMIT_MOST:
            raise Refusal("usage", f"cannot use {shown(limit)} as the limit: give 1 to {LIMIT_MOST}")
        if args.get("agent") is not None:
            agent = parse_agent_name(args["agent"])
        found = await hive.turn_records.newest(agent, limit)
        if agent is not None and not found:
            await hive.agents.get(agent)  # the turns of one that was destroyed can still be read
        return {"turns": found}

    async def turn(args: Args) -> Any:
        return await hive.turn_records.show(parse_id(args.get("turn"), "a turn"))

    async def turn_lines(args: Args) -> Any:
        after = args.get("after", -1)
        if isinstance(after, bool) or not isinstance(after, int) or not -1 <= after < 2**62:
            raise Refusal("usage", f"cannot use {shown(after)} as `after`: give the number of a line")
        return await hive.turn_records.lines(parse_id(args.get("turn"), "a turn"), after)

    return {
        "turns": (turns, {"agent", "limit"}),
        "turn": (turn, {"turn"}),
        "turn_lines": (turn_lines, {"turn", "after"}),
    }
