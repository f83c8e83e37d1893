"""Numbered, append-only migrations, and the refusal of a database that is newer than this program."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from functools import cache
from importlib import resources

from hive_core.store.errors import StoreError

# "hive" in ASCII: tells our file from any other sqlite file.
APPLICATION_ID = 0x68697665
Step = tuple[int, str]


@cache
def migrations() -> tuple[Step, ...]:
    """(number, sql) of each migration, in order, without gaps from 1."""
    found = []
    for entry in resources.files("hive_core.store").joinpath("migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_\w+\.sql", entry.name):
            found.append((int(match[1]), entry.read_text("utf-8")))
    found.sort()
    assert [number for number, _ in found] == list(range(1, len(found) + 1)), "migrations must be numbered without gaps"
    return tuple(found)


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
    """Bring the schema up to date, one transaction a migration, a new database in one. Raises StoreError."""
    check_ours(connection, path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    steps = migrations()
    if version == 0:
        _fill(connection, steps)
        return
    if _schema(connection) != _schema_after(steps[:version]):
        raise StoreError(
            f"cannot open {path}: a hyperhive between two releases made it, and its tables are of no "
            "release; run that one again, or move it away with its -wal and -shm to begin anew"
        )
    _run(connection, steps[version:])


def _fill(connection: sqlite3.Connection, steps: tuple[Step, ...]) -> None:
    # Python's backup waits without end for who has it locked; this gives up as any other write.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("ROLLBACK")
    with closing(_opened(_made_by(steps))) as made:
        made.execute("UPDATE timeline SET id = lower(hex(randomblob(8)))")  # no two hives have the same
        made.backup(connection)


def _run(connection: sqlite3.Connection, steps: tuple[Step, ...]) -> None:
    for number, sql in steps:
        connection.executescript(
            f"BEGIN IMMEDIATE; {sql}\n;"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number}; COMMIT;"
        )


@cache
def _made_by(steps: tuple[Step, ...]) -> bytes:
    """An empty database with the schema that these migrations make, as a file of sqlite's."""
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as empty:
        _run(empty, steps)
        return empty.serialize()


@cache
def _schema_after(steps: tuple[Step, ...]) -> frozenset[tuple[object, ...]]:
    with closing(_opened(_made_by(steps))) as made:
        return _schema(made)


def _opened(file: bytes) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.deserialize(file)
    return connection


def _schema(connection: sqlite3.Connection) -> frozenset[tuple[object, ...]]:
    # sqlite's own tables are no part of it: an ANALYZE by hand adds one.
    sql = "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    return frozenset(tuple(row) for row in connection.execute(sql))
