"""Approvals: what waits for the operator's click, bound to exactly what was shown.

States: pending → approved → done or failed; pending → denied. Each step is one transaction with its event.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.store.bus import APPROVED, EVENTS
from hive_core.store.door import Store
from hive_core.store.writer import Transaction


@dataclass(frozen=True, slots=True)
class Approval:
    id: int
    kind: str  # spawn or apply_commit
    agent: AgentName
    requested_by: AgentName
    reason: str
    payload: dict[str, Any]  # spawn: {files: {name: text}}; apply_commit: {sha, base, diff}
    digest: str
    state: str
    note: str | None
    requested_at_ms: int
    resolved_at_ms: int | None
    resolved_by: str | None

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def digest_of(kind: str, agent: str, payload: dict[str, Any]) -> str:
    """What a click is bound to: changes when anything that was shown changes."""
    whole = json.dumps([kind, agent, payload], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(whole.encode()).hexdigest()


def from_row(row: sqlite3.Row) -> Approval:
    values = {**dict(row), "payload": json.loads(row["payload"])}
    return Approval(**values)


def put_request(
    tx: Transaction, kind: str, agent: AgentName, requested_by: AgentName, reason: str, payload: dict[str, Any]
) -> int:
    """Put a card before the operator; the same request while one is open is that card. Returns its id."""
    digest = digest_of(kind, agent, payload)
    sql = "SELECT id FROM approvals WHERE kind = ? AND agent = ? AND digest = ? AND state IN ('pending', 'approved')"
    if row := tx.execute(sql, (kind, agent, digest)).fetchone():
        return int(row["id"])
    cursor = tx.execute(
        "INSERT INTO approvals (kind, agent, requested_by, reason, payload, digest, state, requested_at_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, 'pending', ?)",
        (kind, agent, requested_by, reason, json.dumps(payload, ensure_ascii=False), digest, tx.now_ms),
    )
    assert cursor.lastrowid is not None
    tx.emit("approval_requested", requested_by, agent, approval=cursor.lastrowid, what=kind)
    return cursor.lastrowid


def settle(tx: Transaction, approval: Approval, state: str, note: str | None, actor: str) -> None:
    """Move an approval on by one step. Raises Refusal("conflict") when it is not where the step begins."""
    begins = "approved" if state in ("done", "failed") else "pending"
    changed = tx.execute(
        "UPDATE approvals SET state = ?, note = coalesce(?, note), resolved_by = coalesce(resolved_by, ?),"
        " resolved_at_ms = coalesce(resolved_at_ms, ?) WHERE id = ? AND state = ?",
        (state, note, actor, tx.now_ms, approval.id, begins),
    ).rowcount
    if changed != 1:
        now = tx.execute("SELECT state FROM approvals WHERE id = ?", (approval.id,)).fetchone()["state"]
        raise Refusal("conflict", f"cannot set approval {approval.id} to {state}: it is {now}")
    tx.emit(f"approval_{state}", actor, approval.agent, approval=approval.id, what=approval.kind, note=note)


class Approvals:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def get(self, approval_id: int) -> Approval:
        """One approval. Raises Refusal("not_found")."""
        row = await self._store.row("SELECT * FROM approvals WHERE id = ?", (approval_id,))
        if row is None:
            raise Refusal("not_found", f"cannot find approval {approval_id}; `hive pending` shows what waits")
        return from_row(row)

    async def pending(self) -> list[Approval]:
        """What waits for the operator, oldest first."""
        rows = await self._store.rows("SELECT * FROM approvals WHERE state = 'pending' ORDER BY id")
        return [from_row(row) for row in rows]

    async def recent(self, limit: int = 20) -> list[Approval]:
        """The newest that are resolved, newest first."""
        sql = "SELECT * FROM approvals WHERE state != 'pending' ORDER BY id DESC LIMIT ?"
        return [from_row(row) for row in await self._store.rows(sql, (limit,))]

    async def approved(self) -> list[Approval]:
        """What is approved and not carried out yet, oldest first."""
        rows = await self._store.rows("SELECT * FROM approvals WHERE state = 'approved' ORDER BY id")
        return [from_row(row) for row in rows]

    async def approve(self, approval_id: int, shown_digest: str, actor: str) -> Approval:
        """The operator's click on what was shown; return once it is carried out (done or failed).

        Idempotent: approving what is approved already waits for the same end. Raises Refusal("conflict") when it
        was denied, or when what would be done is not what was shown.
        """
        approval = await self.get(approval_id)
        if shown_digest != approval.digest:
            raise Refusal(
                "conflict",
                f"cannot approve {approval_id}: it is not what you were shown; look at it again and approve that",
            )
        if approval.state == "denied":
            raise Refusal("conflict", f"cannot approve {approval_id}: it was denied")

        def write(tx: Transaction) -> None:
            state = tx.execute("SELECT state FROM approvals WHERE id = ?", (approval_id,)).fetchone()["state"]
            if state in ("pending", "denied"):
                settle(tx, approval, "approved", None, actor)
                tx.wake(APPROVED)

        await self._store.write(write)
        return await self._wait_settled(approval_id)

    async def _wait_settled(self, approval_id: int) -> Approval:
        with self._store.bus.listen(EVENTS) as listener:
            while (approval := await self.get(approval_id)).state == "approved":
                await listener.wait()
            return approval
