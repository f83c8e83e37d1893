"""The operator's verbs about what was deployed, on host.sock: its log, who set what, and the way back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_agent_name
from hive_core.services.deploy_log import HISTORY_LIMIT

Args = dict[str, Any]
Verbs = dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]


def deploy_verbs(hive: Hive) -> Verbs:
    """verb → (what answers it, the arguments it takes)."""

    async def history(args: Args) -> Any:
        limit = args.get("limit", HISTORY_LIMIT)
        if type(limit) is not int or not 0 < limit <= HISTORY_LIMIT:
            raise Refusal("usage", f"cannot tell the history: limit is a whole number from 1 to {HISTORY_LIMIT}")
        log = await hive.gate.deploy_log.of(parse_agent_name(args.get("agent")), limit)
        return {"deployments": [each.to_wire() for each in log]}

    async def blame(args: Args) -> Any:
        key = args.get("key")
        if not isinstance(key, str) or not 0 < len(key) <= 300:
            raise Refusal("usage", "cannot blame anybody: give a key of agent.toml, or FILE:LINE")
        return await hive.gate.deploy_log.blame(parse_agent_name(args.get("agent")), key)

    async def request_rollback(args: Args) -> Any:
        """`{"approval": id}`: the card of it, with the `rule` by which it passed already, where one let it."""
        return await hive.gate.apply_commit.ask_back(args)

    return {
        "history": (history, {"agent", "limit"}),
        "blame": (blame, {"agent", "key"}),
        "request_rollback": (request_rollback, {"agent", "to", "reason"}),
    }
