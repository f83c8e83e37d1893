"""The projects and their forges, who works on them, and what was pushed of late, on a page of their own."""

from __future__ import annotations

from typing import Any

from hive_core.hive import Hive
from hive_core.protocol.visible import mib
from hive_core.services.events import event_from_row

PUSHES_SHOWN = 30
EVENTS_SEEN = 50_000  # of the newest, in which pushes are looked for: no index has them
_PUSHES = """
    SELECT * FROM events WHERE seq > ? AND kind IN ('project_pushed', 'push_refused') ORDER BY seq DESC LIMIT ?
"""


async def projects_now(hive: Hive) -> dict[str, Any]:
    """Every project with its forge and with the agents that list it, and the newest pushes, refused ones too."""
    listings = await hive.mirrors.projects.listings()
    forges = {row["project"]: row for row in await hive.forges.rows()}
    projects = [
        {
            **row.to_wire(),
            "size": mib(row.bytes),
            "agents": {
                agent: {"push": one.pushes(agent), "force": one.force, "tags": one.tags}
                for agent, listed in sorted(listings.items())
                for one in listed
                if one.name == row.name
            },
            "forge": forges.get(row.name),
        }
        for row in await hive.mirrors.projects.all()
    ]
    since = await hive.store.last_seq() - EVENTS_SEEN
    pushes = [event_from_row(row) for row in await hive.store.rows(_PUSHES, (since, PUSHES_SHOWN))]
    return {"projects": projects, "pushes": pushes}
