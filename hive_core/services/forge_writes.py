"""What agents write on forges: counted, begun before the forge is asked and settled behind its answer, each once.

Between the two the hive does not know whether it is there. Each has a mark in it by which the next try finds it.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal, NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.forges import Registered
from hive_core.services.post import no_room
from hive_core.services.tool_calls import first_answer, once
from hive_core.store.writer import Transaction

What = Literal["pull_request", "issue", "comment"]
HOUR_MS = 3600 * 1000


class Begun(NamedTuple):
    """A write that has begun. again: the forge may have it already, from an earlier try."""

    id: int
    mark: str
    at_ms: int
    again: bool


def begin_write(
    tx: Transaction,
    agent: AgentName,
    forge: Registered,
    what: What,
    digest: str,
    key: str | None,
    tool: str,
    limits: Limits,
) -> Begun | dict[str, Any]:
    """Begin a write, or take up one that was cut off; the first answer of the same call. Raises Refusal."""
    if (first := first_answer(tx, agent, key, tool)) is not None:
        return first
    sql = """
        SELECT id, mark, at_ms FROM forge_writes
        WHERE agent = ? AND forge_id = ? AND what = ? AND digest = ? AND state = 'begun' ORDER BY id DESC LIMIT 1
    """
    if (row := tx.execute(sql, (agent, forge.id, what, digest)).fetchone()) is not None:
        return Begun(row["id"], row["mark"], row["at_ms"], True)
    if tx.short:
        raise no_room("write on the forge")
    sql = "SELECT count(*) FROM forge_writes WHERE agent = ? AND at_ms > ? AND at_ms <= ?"
    (count,) = tx.execute(sql, (agent, tx.now_ms - HOUR_MS, tx.now_ms)).fetchone()
    if count >= limits.forge_writes_per_hour:
        why = f"{agent} has written {count} times within an hour, which is the limit (forge_writes_per_hour)"
        raise Refusal("refused", f"cannot write on the forge of {forge.project}: {why}; do it later")
    mark = secrets.token_hex(6)
    cursor = tx.execute(
        "INSERT INTO forge_writes (forge_id, agent, what, digest, mark, state, at_ms)"
        " VALUES (?, ?, ?, ?, ?, 'begun', ?)",
        (forge.id, agent, what, digest, mark, tx.now_ms),
    )
    return Begun(int(cursor.lastrowid or 0), mark, tx.now_ms, False)


def end_write(
    tx: Transaction, agent: AgentName, begun: Begun, key: str | None, tool: str, what: What, result: dict[str, Any]
) -> dict[str, Any]:
    """It is there: the answer of the call, which is told by an event."""
    tx.execute("UPDATE forge_writes SET state = 'done', number = ? WHERE id = ?", (result["number"], begun.id))
    sql = "SELECT id FROM turns WHERE agent = ? AND state = 'running'"
    row = tx.execute(sql, (agent,)).fetchone()
    tx.emit("forge_written", agent, agent, what=what, **result, turn=row["id"] if row else None)
    return once(tx, agent, key, tool, lambda: result)


def refuse_write(tx: Transaction, begun: Begun) -> None:
    """The forge has said that it is not there."""
    tx.execute("UPDATE forge_writes SET state = 'refused' WHERE id = ?", (begun.id,))
