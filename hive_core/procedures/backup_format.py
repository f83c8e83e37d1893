"""The form of a backup: what making one and bringing one back agree on."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from hive_core.protocol.refusal import Refusal
from hive_core.store.schema import APPLICATION_ID, migrations

FORMAT = 1
HEAD = "hyperhive.json"
MANIFEST = "manifest.json"
DATABASE = "hive.sqlite"
PIECE_BYTES = 1024 * 1024
DEPTH_LIMIT = 200
PATH_LIMIT_BYTES = 3_000  # below a state directory, whose own path takes of the 4,095 that the kernel has
MTIME_MOST_S = 2**33  # in the year 2242; disks differ in what they keep behind it
# What a backup may hold, beside the database.
ROOMS = ("bodies", "applied", "proposed", "agents", "tombstones", "shared", "meta", "credentials")
# What agents write. A link is as safe there as it was: the daemon follows none below these.
AGENTS_OWN = ("proposed/", "agents/", "tombstones/", "shared/")

Tell = Callable[[int, int], None]  # how many files and bytes are done


def check_database(database: sqlite3.Connection) -> None:
    """Raises Refusal when it is not the whole database of a hive that this version knows."""
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (sound,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        foreign = database.execute("PRAGMA foreign_key_check").fetchone()
        if version <= len(migrations()):
            database.execute("SELECT name, wanted, deployed_sha FROM agents LIMIT 1")
    except sqlite3.Error as exc:
        raise Refusal("failed", f"cannot use the copy of the database: {exc}") from None
    if application != APPLICATION_ID:
        raise Refusal("failed", "cannot use the copy of the database: it is not the database of a hive")
    if version > len(migrations()):
        raise Refusal(
            "refused",
            f"cannot use the copy of the database: a newer hyperhive wrote it (schema {version}, this one knows "
            f"{len(migrations())}); use that version",
        )
    if sound != "ok" or foreign is not None:
        damage = sound if foreign is None else "rows are missing"
        raise Refusal("failed", f"cannot use the copy of the database: it is damaged ({damage})")


def shown(name: str) -> str:
    """A name that an agent may have chosen, for a line of a report."""
    return name if name.isascii() and name.isprintable() else ascii(name)[1:-1]
