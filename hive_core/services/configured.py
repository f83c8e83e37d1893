"""Configurations of agents to be: their repositories are there to be shaped, and nothing of them runs yet."""

from __future__ import annotations

from typing import Any

from hive_core.protocol.words import AgentName, CommitSha
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


def note_configured(
    tx: Transaction, name: AgentName, sha: CommitSha, requested_by: AgentName, icon: str | None
) -> None:
    """The repositories of an agent to be hold this commit; again is fine."""
    tx.execute(
        "INSERT OR REPLACE INTO configured (name, sha, requested_by, icon, at_ms) VALUES (?, ?, ?, ?, ?)",
        (name, sha, requested_by, icon, tx.now_ms),
    )
    tx.emit("agent_configured", requested_by, name, sha=sha)


def forget_configured(tx: Transaction, name: AgentName) -> None:
    """It is an agent now, or begins with other files."""
    tx.execute("DELETE FROM configured WHERE name = ?", (name,))


async def is_configured(store: Store, name: AgentName) -> bool:
    return await store.row("SELECT 1 FROM configured WHERE name = ?", (name,)) is not None


async def all_configured(store: Store) -> list[dict[str, Any]]:
    """`{"name", "sha", "requested_by", "icon", "at_ms"}` of each, by name."""
    sql = "SELECT name, sha, requested_by, icon, at_ms FROM configured ORDER BY name"
    return [dict(row) for row in await store.rows(sql)]
