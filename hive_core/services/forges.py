"""The forges of the hive's projects: which there are, and how the last look at each went."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from hive_core.forge.words import Kind, Place
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, SYSTEM, ProjectName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

FORGES = "forges"  # the bus topic: a forge was added or removed


@dataclass(frozen=True, slots=True)
class Registered:
    """A forge of a project. Instants are ms since 1970."""

    id: int
    project: ProjectName
    place: Place
    login: str
    added_at_ms: int
    looked_at_ms: int | None
    failures: int
    rests_until_ms: int | None
    error: str | None

    def to_wire(self) -> dict[str, Any]:
        return {
            "project": self.project,
            "kind": self.place.kind,
            "url": self.place.url,
            "repository": self.place.repository,
            "login": self.login,
            "state": "failing" if self.failures else "ok" if self.looked_at_ms else "new",
            "looked_at_ms": self.looked_at_ms,
            "rests_until_ms": self.rests_until_ms,
            "error": self.error,
        }


async def all_forges(store: Store) -> list[Registered]:
    """By project."""
    return [_registered(row) for row in await store.rows("SELECT * FROM forges ORDER BY project")]


async def forge_of(store: Store, project: ProjectName) -> Registered:
    """Raises Refusal("not_found")."""
    row = await store.row("SELECT * FROM forges WHERE project = ?", (project,))
    if row is None:
        raise no_forge(project)
    return _registered(row)


def no_forge(project: str) -> Refusal:
    return Refusal("not_found", f"cannot find a forge of {project}: it has none; `hive forge list` shows them")


def put_forge(tx: Transaction, project: ProjectName, place: Place, login: str) -> None:
    """Register it. At the same place as before only its token and login are others; at another it begins anew.

    Raises Refusal("not_found") where there is no such project.
    """
    if tx.execute("SELECT 1 FROM projects WHERE name = ?", (project,)).fetchone() is None:
        raise no_such_project(project)
    row = tx.execute("SELECT * FROM forges WHERE project = ?", (project,)).fetchone()
    if row is not None and _registered(row).place == place:
        sql = "UPDATE forges SET login = ?, failures = 0, rests_until_ms = NULL, error = NULL WHERE id = ?"
        tx.execute(sql, (login, row["id"]))
    else:
        tx.execute("DELETE FROM forges WHERE project = ?", (project,))
        tx.execute(
            "INSERT INTO forges (project, kind, url, repository, login, added_at_ms) VALUES (?, ?, ?, ?, ?, ?)",
            (project, place.kind, place.url, place.repository, login, tx.now_ms),
        )
    where: dict[str, Any] = {"forge": place.kind, "url": place.url, "repository": place.repository}
    tx.emit("forge_added", OPERATOR, project=project, login=login, **where)
    tx.wake(FORGES)


def remove_forge(tx: Transaction, project: ProjectName) -> None:
    """Raises Refusal("not_found")."""
    if not forget_forge(tx, project):
        raise no_forge(project)


def forget_forge(tx: Transaction, project: ProjectName) -> bool:
    """Remove the forge that a project has; whether it had one."""
    if not tx.execute("DELETE FROM forges WHERE project = ?", (project,)).rowcount:
        return False
    tx.emit("forge_removed", OPERATOR, project=project)
    tx.wake(FORGES)
    return True


def no_such_project(name: str) -> Refusal:
    return Refusal("not_found", f"there is no project {name}: `hive project add {name} PATH|URL` registers one")


def note_look(tx: Transaction, forge: Registered, error: str | None, rests_until_ms: int | None) -> None:
    """How a look at a forge went. An event tells when it begins to fail, and when it works again."""
    row = tx.execute("SELECT failures FROM forges WHERE id = ?", (forge.id,)).fetchone()
    if row is None:
        return  # it was removed meanwhile
    sql = """
        UPDATE forges SET looked_at_ms = ?1, failures = iif(?2 IS NULL, 0, failures + 1), error = ?2,
               rests_until_ms = ?3
        WHERE id = ?4
    """
    tx.execute(sql, (tx.now_ms, error, rests_until_ms, forge.id))
    if error is not None and not row["failures"]:
        tx.emit("forge_failing", SYSTEM, project=forge.project, why=error)
    elif error is None and row["failures"]:
        tx.emit("forge_works", SYSTEM, project=forge.project)


def _registered(row: sqlite3.Row) -> Registered:
    kind: Kind = row["kind"]
    return Registered(
        row["id"],
        ProjectName(row["project"]),
        Place(kind, row["url"], row["repository"]),
        row["login"],
        row["added_at_ms"],
        row["looked_at_ms"],
        row["failures"],
        row["rests_until_ms"],
        row["error"],
    )
