"""Calls that count once: the first answer of each, by the key that its caller gave it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hive_core.protocol.call_key import CallKey
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

TOOL_CALL_KEPT_S = 7 * 24 * 3600


def first_answer(tx: Transaction, agent: AgentName, key: str | None, tool: str) -> dict[str, Any] | None:
    """The result of the earlier call of `agent` with the same `key`. Raises Refusal as `once` does."""
    if key is None:
        return None
    sql = "SELECT tool, digest, result FROM tool_calls WHERE agent = ? AND key = ?"
    row = tx.execute(sql, (agent, key)).fetchone()
    if row is None:
        return None
    if row["tool"] != tool:
        raise Refusal("usage", f"cannot use this key for {tool}: it was used for a call of {row['tool']}")
    if isinstance(key, CallKey) and row["digest"] not in (None, key.digest):
        why = "it was used for one with other arguments; give each call a key of its own"
        raise Refusal("usage", f"cannot use this key for this call of {tool}: {why}")
    first: dict[str, Any] = json.loads(row["result"])
    return first


def once(
    tx: Transaction, agent: AgentName, key: str | None, tool: str, do: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of `do`, or of the earlier call of `agent` with the same `key`: it counts once.

    Raises Refusal("usage") when the key was used for another tool, or (a CallKey) for other arguments.
    """
    first = first_answer(tx, agent, key, tool)
    if first is not None:
        return first
    result = do()
    if key is None:
        return result
    tx.execute(
        "INSERT INTO tool_calls (agent, key, tool, digest, result, at_ms) VALUES (?, ?, ?, ?, ?, ?)",
        (agent, key, tool, key.digest if isinstance(key, CallKey) else None, json.dumps(result), tx.now_ms),
    )
    return result


async def forget_old_tool_calls(store: Store, now_ms: int) -> None:
    """Remove the answers that nobody asks for again at `now_ms`, in small transactions, between which others write."""
    sql = """
        DELETE FROM tool_calls WHERE (agent, key) IN (
            SELECT agent, key FROM tool_calls WHERE at_ms < ? LIMIT 500
        )
    """
    while await store.insist(lambda tx: tx.execute(sql, (now_ms - TOOL_CALL_KEPT_S * 1000,)).rowcount):
        pass
