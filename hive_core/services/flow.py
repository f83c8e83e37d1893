"""The flow: messages as the operator sees them, each once, with what became of it at every recipient."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hive_core.services.archive import newest_of_agent
from hive_core.services.attachments import FILES, files_of
from hive_core.store.door import Store

_MESSAGE = "m.id, m.sender, m.body, m.body_bytes, m.in_reply_to, m.thread_id, m.cause, m.cause_id, m.chain_id, m.hops"
_WITH_RECIPIENTS = f"""
    SELECT {_MESSAGE}, m.sent_at_ms, (
        SELECT json_group_array(json_object(
            'recipient', recipient, 'state', state, 'attempts', attempts, 'failures', failures,
            'held', held, 'note', note, 'turn_id', turn_id
        )) FROM deliveries WHERE message_id = m.id
    ) AS deliveries, {FILES} FROM messages m
"""
_OF_AGENT = """
    (:agent IS NULL OR m.sender = :agent
     OR EXISTS (SELECT 1 FROM deliveries WHERE message_id = m.id AND recipient = :agent))
"""


async def newest_messages(store: Store, agent: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest messages (from or to `agent`), oldest first, each with its `deliveries` by the recipients' names."""
    if agent is None:
        sql = f"{_WITH_RECIPIENTS} ORDER BY m.id DESC LIMIT :limit"
        return list(reversed(await _messages(store, sql, limit=limit)))
    numbers = await newest_of_agent(store, agent, 2**62, limit)
    sql = f"{_WITH_RECIPIENTS} WHERE m.id IN (SELECT value FROM json_each(:numbers)) ORDER BY m.id"
    return await _messages(store, sql, numbers=json.dumps(numbers))


async def these_messages(store: Store, numbers: Iterable[int], agent: str | None = None) -> dict[int, dict[str, Any]]:
    """Those of these messages that are there (and from or to `agent`), by number."""
    sql = f"{_WITH_RECIPIENTS} WHERE m.id IN (SELECT value FROM json_each(:numbers)) AND {_OF_AGENT}"
    found = await _messages(store, sql, numbers=json.dumps(sorted(set(numbers))), agent=agent)
    return {message["id"]: message for message in found}


async def messages_of_turns(store: Store, turns: Iterable[int]) -> dict[int, list[int]]:
    """The numbers of the messages that each of these turns leased."""
    sql = "SELECT turn_id, message_id FROM leases WHERE turn_id IN (SELECT value FROM json_each(?)) ORDER BY message_id"
    found: dict[int, list[int]] = {}
    for row in await store.rows(sql, (json.dumps(sorted(set(turns))),)):
        found.setdefault(row["turn_id"], []).append(row["message_id"])
    return found


async def messages_aside(store: Store, limit: int = 50) -> list[dict[str, Any]]:
    """The oldest messages that are held from somebody or dead for somebody: they wait for the operator."""
    sql = f"""
        {_WITH_RECIPIENTS} WHERE m.id IN (
            SELECT message_id FROM deliveries INDEXED BY deliveries_held WHERE state = 'held'
            UNION SELECT message_id FROM deliveries INDEXED BY deliveries_dead WHERE state = 'dead'
            ORDER BY message_id LIMIT :limit
        ) ORDER BY m.id
    """
    return await _messages(store, sql, limit=limit)


async def count_aside(store: Store) -> dict[str, int]:
    """How many deliveries are `held` and how many `dead`."""
    sql = """
        SELECT (SELECT count(*) FROM deliveries INDEXED BY deliveries_held WHERE state = 'held') AS held,
               (SELECT count(*) FROM deliveries INDEXED BY deliveries_dead WHERE state = 'dead') AS dead
    """
    row = await store.row(sql)
    assert row is not None
    return dict(row)


async def _messages(store: Store, sql: str, **given: Any) -> list[dict[str, Any]]:
    return [
        {**dict(row), "deliveries": json.loads(row["deliveries"]), "files": files_of(row["files"])}
        for row in await store.rows(sql, given)
    ]
