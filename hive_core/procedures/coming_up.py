"""Whether an agent that was begun anew has come up, as far as it can be seen now."""

from __future__ import annotations

from enum import Enum

from hive_core.procedures.supervise import Supervisor, Tools


class End(Enum):
    UP = "it has said hello"
    FAILED = "it did not come up"
    DROPPED = "it is not wanted any more"


async def how_it_came_up(tools: Tools, one: Supervisor, starts: int) -> End | None:
    """None: nobody can say yet; it may change with every event on LIVE and WANTED. Raises Refusal when there is no such
    agent.

    starts: how often it was started before.
    """
    agent, live = await tools.agents.get(one.name), tools.agents.live(one.name)
    if agent.wanted == "down" or tools.draining or one.gone.is_set():
        return End.DROPPED
    if live.state == "quarantined" or (live.state == "crashed" and one.starts > starts):
        return End.FAILED
    if one.running is None:
        return End.FAILED if live.state == "down" and live.detail else None  # it may not run here any more
    return End.UP if one.starts > starts and one.desk.said_hello.is_set() else None
