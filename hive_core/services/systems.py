"""What agents' containers were built from, as deployed. A row that is older than its agent counts for nothing: whoever
reads one holds it against the commit that is deployed, and against the system that the container has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hive_core.extras import NONE, Extras
from hive_core.protocol.words import AgentName, CommitSha, StorePath
from hive_core.services.agents import set_deployed
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


@dataclass(frozen=True, slots=True)
class System:
    """sha: the commit it was built from. inputs: where hyperhive and nixpkgs were then."""

    sha: CommitSha
    path: StorePath
    inputs: str


@dataclass(frozen=True, slots=True)
class Deployed:
    """The harness settings that a commit gives, as `Repos.read` has them, and the system where one was built of it.

    extras: the skills and plugins that the settings speak of; none where the rows were read: these lie there already
    """

    settings: dict[str, Any]
    system: System | None = None
    extras: Extras = field(default=NONE, compare=False)


def note_deployed(tx: Transaction, name: AgentName, sha: CommitSha, deployed: Deployed) -> None:
    """What the agent runs on from its next turn, or its next start: a commit and what was made of it."""
    set_deployed(tx, name, sha, deployed.settings)
    tx.execute("DELETE FROM systems WHERE agent = ?", (name,))
    if (system := deployed.system) is not None:
        tx.execute(
            "INSERT INTO systems (agent, sha, path, inputs) VALUES (?, ?, ?, ?)",
            (name, system.sha, system.path, system.inputs),
        )


async def deployed_now(store: Store, name: AgentName) -> tuple[CommitSha | None, Deployed]:
    """The commit in an agent's rows, and what was made of it."""
    row = await store.row("SELECT deployed_sha, settings, policy FROM agents WHERE name = ?", (name,))
    if row is None or row["settings"] is None:
        return None, Deployed({})
    settings = {**json.loads(row["settings"]), "policy": json.loads(row["policy"] or "{}")}
    return CommitSha(row["deployed_sha"]), Deployed(settings, await system_of(store, name))


async def system_of(store: Store, name: AgentName) -> System | None:
    row = await store.row("SELECT sha, path, inputs FROM systems WHERE agent = ?", (name,))
    return None if row is None else System(**dict(row))


async def built_commits(store: Store) -> Mapping[AgentName, CommitSha]:
    """Of each agent that there is and that was built: the commit it was built from."""
    rows = await store.rows("SELECT agent, sha FROM systems JOIN agents ON name = agent")
    return {AgentName(row["agent"]): CommitSha(row["sha"]) for row in rows}
