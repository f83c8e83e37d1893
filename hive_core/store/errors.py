"""What the store raises, and what an error of sqlite's means."""

from __future__ import annotations

import sqlite3

from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal


class StoreError(Exception):
    """The database cannot be used; the message says why and names the way out."""


class StoreBusy(Refusal):
    """The disk takes nothing just now. The store goes on, and so can the caller, later."""

    def __init__(self, message: str) -> None:
        super().__init__("unavailable", message)


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


def of_the_disk(exc: Exception) -> bool:
    """Whether sqlite speaks of the file and not of the statement: then it is everybody's trouble.

    A full-text index that is not what it was says so by a code of its own; the file around it is whole.
    """
    code = getattr(exc, "sqlite_errorcode", 0)
    return code != sqlite3.SQLITE_CORRUPT_VTAB and code & 0xFF in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CANTOPEN,
    )


def passes(exc: Exception) -> bool:
    """Whether the next write may do better. Not after a failed sync: what the file holds then, nobody knows."""
    code = getattr(exc, "sqlite_errorcode", 0)
    return code in (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE) or code & 0xFF in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
    )


def is_full(exc: sqlite3.Error) -> bool:
    """The index of the log, which sqlite maps into memory, says by its own name that it cannot grow."""
    return exc.sqlite_errorcode in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


def why_not_now(exc: Exception) -> str:
    """What the disk has against a write that may go through later, with the way out."""
    code = getattr(exc, "sqlite_errorcode", 0)
    if isinstance(exc, sqlite3.Error) and is_full(exc):
        return "no space is left on the disk of the hive's state_dir; make room there"
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        return "another program has the hive's database locked; end that program"
    return f"the disk of the hive's state_dir takes no writes ({exc}); see whether it is read-only"
