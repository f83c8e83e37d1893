"""The operator's verbs about an agent's session, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.words import OPERATOR, parse_agent_name

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def steering_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def compact(args: Args) -> Any:
        return await hive.steering.compact(parse_agent_name(args.get("agent")), OPERATOR)

    async def new_session(args: Args) -> Any:
        return await hive.steering.new_session(parse_agent_name(args.get("agent")), OPERATOR)

    async def model(args: Args) -> Any:
        return await hive.steering.choose(parse_agent_name(args.get("agent")), "model", args.get("model"), OPERATOR)

    async def effort(args: Args) -> Any:
        return await hive.steering.choose(parse_agent_name(args.get("agent")), "effort", args.get("effort"), OPERATOR)

    return {
        "compact": (compact, {"agent"}),
        "new_session": (new_session, {"agent"}),
        "model": (model, {"agent", "model"}),
        "effort": (effort, {"agent", "effort"}),
    }
