"""The versions of claude that the hive was pinned to. What agents run is the newest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hive_core.program_copies import Seen
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


@dataclass(frozen=True, slots=True)
class Pin:
    """
    kept      whether the hive has a copy; else something else decides what agents run, and this was seen of it
    source    where it was found
    seen      what was found there, to be known again
    approval  by which it came; None: it was the first one that was found
    """

    kept: bool
    version: str
    sha256: str
    source: Path
    seen: Seen
    approval: int | None
    at_ms: int

    def to_wire(self) -> dict[str, Any]:
        return {
            "kept": self.kept,
            "version": self.version,
            "sha256": self.sha256,
            "source": str(self.source),
            "approval": self.approval,
            "at_ms": self.at_ms,
        }


async def newest_pins(store: Store, limit: int, *, kept: bool = True) -> list[Pin]:
    """The newest first."""
    rows = await store.rows("SELECT * FROM claude_pins WHERE kept = ? ORDER BY id DESC LIMIT ?", (int(kept), limit))
    return [
        Pin(
            bool(row["kept"]),
            row["version"],
            row["sha256"],
            Path(row["source"]),
            Seen(row["bytes"], row["mtime_ns"]),
            row["approval"],
            row["at_ms"],
        )
        for row in rows
    ]


def add_pin(
    tx: Transaction,
    actor: str,
    version: str,
    sha256: str,
    source: Path,
    seen: Seen,
    approval: int | None = None,
    *,
    kept: bool = True,
) -> None:
    """Agents run this from now on."""
    tx.execute(
        "INSERT INTO claude_pins (kept, version, sha256, source, bytes, mtime_ns, approval, at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (int(kept), version, sha256, str(source), *seen, approval, tx.now_ms),
    )
    kind = "claude_pinned" if kept else "claude_seen"
    tx.emit(kind, actor, None, version=version, sha256=sha256, source=str(source), approval=approval)


def note_source(tx: Transaction, source: Path, seen: Seen, *, kept: bool = True) -> None:
    """What agents run lies there now, and looks like this."""
    tx.execute(
        "UPDATE claude_pins SET source = ?, bytes = ?, mtime_ns = ?"
        " WHERE id = (SELECT max(id) FROM claude_pins WHERE kept = ?)",
        (str(source), *seen, int(kept)),
    )


async def was_asked_for(store: Store, sha256: str) -> bool:
    """Whether the operator was asked for this program already, whatever he said."""
    sql = "SELECT 1 FROM approvals WHERE kind = 'claude' AND payload ->> 'sha256' = ? LIMIT 1"
    return await store.row(sql, (sha256,)) is not None
