"""Records of turns: what each was given, what its program printed, how it ended and what it sent.

A record is written with a turn's first lines. The message's body stays with the message, and the settings' prompt is
kept once for all turns that had it. Records go with the lines of their time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping
from typing import Any

from hive_core.protocol.refusal import Refusal
from hive_core.services.charges import UNSURE_OF_TURN
from hive_core.services.turns import LINE_KEPT_S
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

RECORDS_PER_AGENT = 2_000
LINES_SHOWN = 500
SENT_AMONG = 5_000  # messages after the one that a turn began with, among which those that it sent are looked for
DROPPED_AT_ONCE = 1_000
_LATER = "how many messages waited when it began, and its settings then: the daemon went away, and these are of later"
_DIGITS = frozenset("0123456789abcdef")


def add_record(tx: Transaction, agent: str, given: Mapping[str, Any], asked_sha256: object) -> None:
    """Keep what a turn was given, a lease of protocol.harness; `asked_sha256` is its harness's claim."""
    settings = given.get("settings") or {}
    prompt = str(settings.get("prompt", ""))
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    message = given.get("message")
    kept = {
        **given,
        "settings": {key: value for key, value in settings.items() if key != "prompt"},
        "message": message and {key: value for key, value in message.items() if key != "body"},
    }
    tx.execute("INSERT INTO turn_prompts (sha256, text) VALUES (?, ?) ON CONFLICT DO NOTHING", (digest, prompt))
    tx.execute(
        "INSERT INTO turn_records (turn_id, agent, at_ms, given, prompt_sha256, asked_sha256)"
        " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (given["turn"], agent, tx.now_ms, json.dumps(kept, ensure_ascii=False), digest, _sha256(asked_sha256)),
    )


def _sha256(raw: object) -> str | None:
    return raw if isinstance(raw, str) and len(raw) == 64 and not set(raw) - _DIGITS else None


class TurnRecords:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def newest(self, agent: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """The newest turns, of all agents or one, newest first."""
        whose = "" if agent is None else "WHERE agent = :agent"
        sql = f"SELECT {_TURN} FROM turns t {whose} ORDER BY id DESC LIMIT :limit"
        return [_turn(row) for row in await self._store.rows(sql, {"agent": agent, "limit": limit})]

    async def show(self, turn_id: int) -> dict[str, Any]:
        """One turn: its row, `given` (None when it was not recorded), `missing`, `before` and `sent`.

        given    the lease that its harness got; its message has no body when that was forgotten
        before   the last result of its session before it, from which a process may have counted on
        missing  sentences that say what is not there any more, or was not kept; empty: the record is whole
        Raises Refusal("not_found").
        """
        row = await self._store.row(f"SELECT {_TURN} FROM turns t WHERE id = ?", (turn_id,))
        if row is None:
            raise Refusal("not_found", f"cannot find turn {turn_id}: there was none; `hive turns` lists them")
        record = await self._store.row(_RECORD, (turn_id,))
        given, missing = await self._given(record)
        kept = await self._store.row("SELECT count(*) FROM turn_lines WHERE turn_id = ?", (turn_id,))
        assert kept is not None
        if kept[0] < row["lines"]:
            missing.append(f"{row['lines'] - kept[0]} of its {row['lines']} lines, which were too many or are too old")
        return {
            **_turn(row),
            "given": given,
            "asked_sha256": record["asked_sha256"] if record else None,
            "missing": missing,
            "before": await self._result_before(row, given),
            "sent": await self._sent(row),
        }

    async def lines(self, turn_id: int, after: int = -1) -> dict[str, Any]:
        """Some lines of a turn from the one behind number `after`: {"lines": [{n, at_ms, line}], "next_after"}."""
        sql = "SELECT n, at_ms, line FROM turn_lines WHERE turn_id = ? AND n > ? ORDER BY n LIMIT ?"
        rows = [dict(row) for row in await self._store.rows(sql, (turn_id, after, LINES_SHOWN))]
        return {"lines": rows, "next_after": rows[-1]["n"] if len(rows) == LINES_SHOWN else None}

    async def prune(self, now_ms: int) -> None:
        """Forget records that are too old at `now_ms`, those over each agent's bound, and prompts that nothing has."""
        given = {"before": now_ms - LINE_KEPT_S * 1000, "kept": RECORDS_PER_AGENT, "limit": DROPPED_AT_ONCE}

        def write(tx: Transaction) -> int:
            dropped = tx.execute(_DROP_OLD, given).rowcount
            for row in tx.execute("SELECT name FROM agents").fetchall():
                dropped += tx.execute(_DROP_OVER, {**given, "agent": row["name"]}).rowcount
            tx.execute(_DROP_PROMPTS, given)
            return dropped

        while await self._store.insist(write):
            pass  # in small transactions, between which others write

    async def _given(self, record: sqlite3.Row | None) -> tuple[dict[str, Any] | None, list[str]]:
        if record is None:
            return None, ["what it was given, which is kept from its first lines on, and as long as they are"]
        given: dict[str, Any] = json.loads(record["given"])
        given["settings"]["prompt"] = record["prompt"]
        missing = [_LATER] if given.pop("later", False) else []
        if given.get("message") is None:
            return given, missing
        if record["body"] is None:
            return given, [*missing, "the body of its message, which is forgotten"]
        given["message"]["body"] = record["body"]
        return given, missing

    async def _result_before(self, row: sqlite3.Row, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """The last result of the turn before in the same session: its process may have gone on counting from there."""
        if given is None or given.get("session") is None:
            return None
        sql = """
            SELECT line FROM turn_lines WHERE turn_id = (
                SELECT id FROM turns WHERE agent = ? AND id < ? ORDER BY id DESC LIMIT 1
            ) ORDER BY n DESC LIMIT 20
        """
        for line in await self._store.rows(sql, (row["agent"], row["turn"])):
            try:
                event = json.loads(line["line"])
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and event.get("type") == "result":
                return event
        return None

    async def _sent(self, row: sqlite3.Row) -> list[dict[str, Any]]:
        found = await self._store.rows(_SENT, (row["message"] or 0, SENT_AMONG, row["turn"], row["agent"]))
        return [{**dict(one), "recipients": json.loads(one["recipients"])} for one in found]


def _turn(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "usage": json.loads(row["usage"]) if row["usage"] else None}


_TURN = f"""
    t.id AS turn, t.agent, t.state, t.message_id AS message, t.errand, t.started_at_ms, t.ended_at_ms, t.reason,
    t.error, t.usage, t.lines, t.cost_micro_usd, {UNSURE_OF_TURN}
"""
_RECORD = """
    SELECT r.given, r.asked_sha256, p.text AS prompt, m.body FROM turn_records r
    JOIN turn_prompts p ON p.sha256 = r.prompt_sha256 LEFT JOIN messages m ON m.id = r.given ->> '$.message.id'
    WHERE r.turn_id = ?
"""
_SENT = """
    SELECT m.id AS message, substr(m.body, 1, 500) AS body, m.sent_at_ms, (
        SELECT json_group_array(recipient) FROM deliveries WHERE message_id = m.id
    ) AS recipients
    FROM (SELECT * FROM messages WHERE id > ? ORDER BY id LIMIT ?) m
    WHERE m.cause = 'turn' AND m.cause_id = ? AND m.sender = ? ORDER BY m.id
"""
_DROP_OLD = """
    DELETE FROM turn_records WHERE turn_id IN (
        SELECT turn_id FROM turn_records INDEXED BY turn_records_by_age WHERE at_ms < :before LIMIT :limit)
"""
_DROP_OVER = """
    DELETE FROM turn_records WHERE turn_id IN (
        SELECT turn_id FROM turn_records INDEXED BY turn_records_by_agent WHERE agent = :agent AND turn_id <= (
            SELECT turn_id FROM turn_records INDEXED BY turn_records_by_agent WHERE agent = :agent
            ORDER BY turn_id DESC LIMIT 1 OFFSET :kept
        ) LIMIT :limit)
"""
_DROP_PROMPTS = """
    DELETE FROM turn_prompts WHERE sha256 IN (
        SELECT sha256 FROM turn_prompts p WHERE NOT EXISTS (
            SELECT 1 FROM turn_records INDEXED BY turn_records_by_prompt WHERE prompt_sha256 = p.sha256
        ) LIMIT :limit)
"""
