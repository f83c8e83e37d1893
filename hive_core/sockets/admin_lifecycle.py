"""The operator's verbs about the containers that agents run in, on host.sock."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, parse_agent_name, shown

LINES, LINES_MOST = 50, 500
Args = dict[str, Any]


def lifecycle_verbs(hive: Hive) -> dict[str, tuple[Callable[[Args], Awaitable[Any]], set[str]]]:
    """verb → (what answers it, the arguments it takes)."""

    async def restart(args: Args) -> Any:
        name = parse_agent_name(args.get("agent"))
        await hive.reconciler.restart(name, OPERATOR)
        return {"agent": name}

    async def logs(args: Args) -> Any:
        name, lines = parse_agent_name(args.get("agent")), args.get("lines", LINES)
        if isinstance(lines, bool) or not isinstance(lines, int) or not 0 < lines <= LINES_MOST:
            raise Refusal("usage", f"cannot show {shown(lines)} lines: give 1 to {LINES_MOST}")
        return {"agent": name, "lines": await hive.reconciler.logs(name, lines)}

    return {"restart": (restart, {"agent"}), "logs": (logs, {"agent", "lines"})}
