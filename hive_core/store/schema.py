"""Numbered, append-only migrations, and the refusal of a database that is newer than this program."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from importlib import resources

from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal

# "hive" in ASCII: tells our file from any other sqlite file.
APPLICATION_ID = 0x68697665


class StoreError(Exception):
    """The database cannot be used; the message says why and names the way out."""


def damaged(exc: BaseException) -> bool:
    """Whether sqlite says that what it reads is no database, or not a whole one."""
    return getattr(exc, "sqlite_errorname", "").startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT"))


def cannot_open(path: object, exc: Exception) -> StoreError:
    """Why the database at `path` cannot be opened, with the way out."""
    name = getattr(exc, "sqlite_errorname", "")
    if isinstance(exc, OSError):
        why = explain(exc, "state_dir")
    elif damaged(exc):
        why = (
            f"it is no database, or a damaged one ({exc}); restore a backup, or move it away with its -wal and -shm "
            "to begin anew"
        )
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        why = "another program has it open; end that program"
    elif name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        why = f"{exc}; see who owns it, its -wal and -shm and their directory, or set state_dir to another"
    elif name.startswith("SQLITE_FULL"):
        why = "no space is left; make room, or set state_dir to another"
    else:
        why = f"{exc}; see whether its disk is well, or set state_dir to another"
    return StoreError(f"cannot open {path}: {why}")


class StoreBusy(Refusal):
    """The disk takes nothing just now. The store goes on, and so can the caller, later."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)


def migrations() -> list[tuple[int, str]]:
    """(number, sql) of each migration, in order, without gaps from 1."""
    found = []
    for entry in resources.files("hive_core.store").joinpath("migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", entry.name):
            found.append((int(match[1]), entry.read_text("utf-8")))
    found.sort()
    assert [number for number, _ in found] == list(range(1, len(found) + 1)), "migrations must be numbered without gaps"
    return found


def check_ours(connection: sqlite3.Connection, path: str) -> None:
    """Raise StoreError for a database that is not ours to open, before anything in it is touched."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    known = migrations()
    empty = (version, application) == (0, 0) and connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None
    if application != APPLICATION_ID and not empty:
        raise StoreError(
            f"cannot open {path}: it is a sqlite file of another program; move it away or change state_dir"
        )
    if version > len(known):
        raise StoreError(
            f"cannot open {path}: a newer hyperhive wrote it (schema {version}, this one knows {len(known)}); "
            "run that version again, or restore a backup made before the upgrade"
        )


def migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the schema up to date, one transaction a migration. Raises StoreError."""
    check_ours(connection, path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = migrations()
    if version and _schema(connection) != _schema_after(steps[:version]):
        raise StoreError(
            f"cannot open {path}: a hyperhive between two releases made it, and its tables are of no "
            "release; run that one again, or move it away with its -wal and -shm to begin anew"
        )
    _run(connection, steps[version:])


def _run(connection: sqlite3.Connection, steps: Sequence[tuple[int, str]]) -> None:
    for number, sql in steps:
        connection.executescript(
            f"BEGIN IMMEDIATE; {sql}\n;"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
        )


def _schema_after(steps: Sequence[tuple[int, str]]) -> set[tuple[object, ...]]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        _run(empty, steps)
        return _schema(empty)


def _schema(connection: sqlite3.Connection) -> set[tuple[object, ...]]:
    # sqlite's own tables are no part of it: an ANALYZE by hand adds one.
    sql = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    return {tuple(row) for row in connection.execute(sql)}
