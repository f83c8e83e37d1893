"""The projects that are registered, and who lists them: a row each. What git does is procedures/projects.py."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any

from hive_core.project_rules import Project
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName, ProjectName
from hive_core.services.forges import forget_forge, no_such_project
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

PROJECTS = "projects"  # the bus topic: a project came, went, or has other branches


@dataclass(frozen=True, slots=True)
class Registered:
    """
    source      where the repository is: a path of the host, or a url
    credential  what it is reached with: none, key or token
    branch      that a clone begins with
    bytes       that its mirror takes
    trouble     why it could not be fetched since `fetched_at_ms`
    """

    name: ProjectName
    source: str
    credential: str
    branch: str
    added_by: str
    added_at_ms: int
    fetched_at_ms: int
    bytes: int
    trouble: str | None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


class Projects:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> list[Registered]:
        """Every one, by name."""
        return [_from_row(row) for row in await self._store.rows("SELECT * FROM projects ORDER BY name")]

    async def find(self, name: ProjectName) -> Registered | None:
        row = await self._store.row("SELECT * FROM projects WHERE name = ?", (name,))
        return None if row is None else _from_row(row)

    async def get(self, name: ProjectName) -> Registered:
        """Raises Refusal("not_found")."""
        if (found := await self.find(name)) is None:
            raise no_such_project(name)
        return found

    async def add(self, name: ProjectName, source: str, credential: str, branch: str, size: int, actor: str) -> None:
        """Raises Refusal("conflict") for a name that is taken."""

        def write(tx: Transaction) -> None:
            if tx.execute("SELECT 1 FROM projects WHERE name = ?", (name,)).fetchone():
                raise taken(name)
            values = (name, source, credential, branch, actor, tx.now_ms, tx.now_ms, size)
            tx.execute("INSERT INTO projects VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)
            tx.emit("project_added", actor, None, project=name, source=source, credential=credential)
            tx.wake(PROJECTS)

        await self._store.write(write)

    async def renew(self, name: ProjectName, credential: str, actor: str) -> None:
        """It has another credential."""

        def write(tx: Transaction) -> None:
            tx.execute("UPDATE projects SET credential = ? WHERE name = ?", (credential, name))
            tx.emit("project_credential_changed", actor, None, project=name, credential=credential)
            tx.wake(PROJECTS)

        await self._store.write(write)

    async def remove(self, name: ProjectName, actor: str) -> None:
        """Its forge too. Raises Refusal: there is none, or an agent lists it."""

        def write(tx: Transaction) -> None:
            rows = tx.execute("SELECT name, policy FROM agents ORDER BY name").fetchall()
            if users := [row["name"] for row in rows if any(one.name == name for one in _listed(row["policy"]))]:
                why = f"{', '.join(users)} works on it; take it out of `projects` of that agent.toml first"
                raise Refusal("conflict", f"cannot remove the project {name}: {why}")
            if tx.execute("DELETE FROM projects WHERE name = ?", (name,)).rowcount == 0:
                raise no_such_project(name)
            forget_forge(tx, name)
            tx.emit("project_removed", actor, None, project=name)
            tx.wake(PROJECTS)

        await self._store.write(write)

    async def note_fetched(self, name: ProjectName, moved: int, branch: str, size: int) -> None:
        """It was fetched; `moved` branches and tags came, moved or went."""

        def write(tx: Transaction) -> None:
            sql = "UPDATE projects SET fetched_at_ms = ?, branch = ?, bytes = ?, trouble = NULL WHERE name = ?"
            tx.execute(sql, (tx.now_ms, branch, size, name))
            if moved:
                tx.emit("project_fetched", SYSTEM, None, project=name, moved=moved)
            tx.wake(PROJECTS)

        await self._store.write(write)

    async def note_trouble(self, name: ProjectName, trouble: str) -> None:
        """It could not be fetched. The same reason again is no news."""

        def write(tx: Transaction) -> None:
            sql = "UPDATE projects SET trouble = ?1 WHERE name = ?2 AND trouble IS NOT ?1"
            if tx.execute(sql, (trouble, name)).rowcount:
                tx.emit("project_fetch_failed", SYSTEM, None, project=name, reason=trouble)
                tx.wake(PROJECTS)

        await self._store.write(write)

    async def listed_by(self, agent: AgentName) -> list[Project]:
        """What an agent's deployed settings say of projects; nothing for a name that is no agent."""
        row = await self._store.row("SELECT policy FROM agents WHERE name = ?", (agent,))
        return [] if row is None else _listed(row["policy"])

    async def listings(self) -> dict[AgentName, list[Project]]:
        """The same of every agent."""
        rows = await self._store.rows("SELECT name, policy FROM agents")
        return {AgentName(row["name"]): _listed(row["policy"]) for row in rows}


def taken(name: str) -> Refusal:
    why = "there is one of that name; choose another, or `hive project rm` it first (a credential: give its own url)"
    return Refusal("conflict", f"cannot add the project {name}: {why}")


def _listed(policy: str | None) -> list[Project]:
    return [Project.model_validate(one) for one in json.loads(policy or "{}").get("projects", [])]


def _from_row(row: sqlite3.Row) -> Registered:
    return Registered(**{**dict(row), "name": ProjectName(row["name"])})
