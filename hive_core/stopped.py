"""Which agents stand still although they shall run, why, and what lets them go on: for the operator's summary."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hive_core.access import Closed
from hive_core.agents import Agent, Agents
from hive_core.protocol.harness import STUCK


def stopped(agents: Agents, everybody: Iterable[Agent]) -> list[dict[str, Any]]:
    """A row for each reason: `agents` (names), `state`, `why` (cause and way out), `until_ms` (or None)."""
    rows: dict[Closed, list[str]] = {}
    for agent in everybody:
        if agent.wanted != "down" and (reason := agents.access.closed(agent.name) or _broken(agents, agent)):
            rows.setdefault(reason, []).append(agent.name)
    return [
        {"agents": names, "state": one.state, "why": one.sentence, "until_ms": one.until_ms}
        for one, names in rows.items()
    ]


def _broken(agents: Agents, agent: Agent) -> Closed | None:
    """What is wrong with an agent itself, as far as it is seen."""
    live = agents.live(agent.name)
    if live.state == "crashed":
        return Closed(live.state, f"{live.detail}; it is started again by itself")
    if live.state == "stuck" and live.detail in STUCK:
        return Closed(live.state, f"its turn is {live.detail}; `hive cancel {agent.name}` ends it at once")
    if live.state == "waiting" and agent.rests_until_ms:
        # Without its own instant: what several wait for is told once.
        return Closed(live.state, f"{live.detail or 'its last turn had to wait'}; it tries again by itself")
    if live.state in ("stuck", "down", "quarantined") and live.detail:
        return Closed(live.state, live.detail)
    return None
