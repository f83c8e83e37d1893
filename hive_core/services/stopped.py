"""Which agents stand still although they shall run, why, and what lets them go on: for the operator's summary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hive_core.protocol.harness import STUCK
from hive_core.protocol.words import AgentName
from hive_core.services.access import Closed
from hive_core.services.agents import Agent, Agents


def stopped(agents: Agents, everybody: Iterable[Agent], trouble: Callable[[AgentName], str]) -> list[dict[str, Any]]:
    """A row for each reason: `agents` (names), `state`, `why` (cause and way out), `until_ms` (or None).

    trouble    why an agent cannot be seen to now, such as a helper that is away; else an empty text
    """
    rows: dict[Closed, list[str]] = {}
    for agent in everybody:
        reason = agents.access.closed(agent.name) or _broken(agents, agent) or _unseen(agents, agent, trouble)
        if agent.wanted != "down" and reason:
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


def _unseen(agents: Agents, agent: Agent, trouble: Callable[[AgentName], str]) -> Closed | None:
    """Who cannot be started or found, though its state does not say that something is wrong."""
    why = trouble(agent.name)
    return Closed(agents.live(agent.name).state, f"{why}; that is tried again by itself") if why else None
