"""Tombstones: agents, and configurations of agents to be, that were destroyed. Their names and ports are free, and
their directories are kept.

destroying ──▶ kept ──▶ purging ──▶ gone
                 │
                 └────▶ reviving ─▶ an agent again

What is under way is carried out by procedures/destruction.py, also by the next daemon.
"""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName, parse_agent_name, shown
from hive_core.services.absent import no_such_agent
from hive_core.services.agents import LINE_BYTES, check_free, pick_port
from hive_core.services.approvals import COMMITS
from hive_core.services.budgets import bring_back, put_away
from hive_core.services.configured import note_configured
from hive_core.services.uid_ranges import UidRanges
from hive_core.store.bus import DEPLOYED, WANTED, mail
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

TOMBSTONES = "tombstones"  # the bus topic: something is to be done with one
_INSTANT = re.compile(r"[0-9TZ:-]{1,20}")


@dataclass(frozen=True, slots=True)
class Tombstone:
    id: int
    name: AgentName
    label: str  # NAME@INSTANT: what tells it from others of that name
    state: str  # destroying, kept, reviving or purging
    at_once: bool
    bytes: int | None  # that its directories take; None: not known yet
    destroyed_by: str
    destroyed_at_ms: int
    configured: bool  # it was no agent yet, and is none when it is revived

    def to_wire(self) -> dict[str, Any]:
        return {
            "tombstone": self.label,
            "name": self.name,
            "state": self.state,
            "bytes": self.bytes,
            "destroyed_by": self.destroyed_by,
            "destroyed_at_ms": self.destroyed_at_ms,
            "configured": self.configured,
        }


def parse_tombstone(raw: object) -> tuple[AgentName, str]:
    """NAME, or NAME@INSTANT, of which a beginning is enough: (the name, the label's beginning). Raises Refusal."""
    name, at, instant = raw.partition("@") if isinstance(raw, str) else ("", "", "")
    if at and not _INSTANT.fullmatch(instant):
        raise Refusal("usage", f"cannot use {shown(raw)} as a tombstone: give NAME, or NAME@2026-01-31")
    agent = parse_agent_name(name if isinstance(raw, str) else raw)
    return agent, f"{agent}@{instant}"


class Tombstones:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def all(self) -> list[Tombstone]:
        """Every one, the newest first."""
        return [_from_row(row) for row in await self._store.rows(f"{_SELECT} ORDER BY id DESC")]

    async def under_way(self) -> list[Tombstone]:
        """Those with which something is to be done."""
        return [_from_row(row) for row in await self._store.rows(f"{_SELECT} WHERE state != 'kept' ORDER BY id")]

    async def by_id(self, number: int) -> Tombstone | None:
        row = await self._store.row(f"{_SELECT} WHERE id = ?", (number,))
        return None if row is None else _from_row(row)

    async def find(self, raw: object) -> Tombstone:
        """The one that is meant. Raises Refusal when there is none, or more than one."""
        name, label = parse_tombstone(raw)
        rows = [one for one in await self.all() if one.name == name and one.label.startswith(label)]
        if not rows:
            raise Refusal(
                "not_found", f"cannot find a tombstone {label.rstrip('@')}: `hive tombstones` shows those that are kept"
            )
        if len(rows) > 1:
            which = ", ".join(one.label for one in rows)
            raise Refusal("conflict", f"cannot tell which tombstone is meant: there are {which}; name one of them")
        return rows[0]

    async def destroy(self, name: AgentName, actor: str, *, at_once: bool) -> Tombstone:
        """Begin to destroy an agent, or the configuration of one to be; again is fine, and may hasten it. Raises
        Refusal."""
        if name == MANAGER:
            raise Refusal("refused", f"cannot destroy {name}: a hive has one manager; `hive kill {name}` keeps it down")
        found = await self.by_id(await self._store.write(lambda tx: self.begin(tx, name, actor, at_once=at_once)))
        assert found is not None
        return found

    def begin(self, tx: Transaction, name: AgentName, actor: str, *, at_once: bool) -> int:
        """The same as a part of another change: the tombstone's id."""
        if tx.execute("UPDATE agents SET wanted = 'down' WHERE name = ?", (name,)).rowcount == 0:
            _check_configured(tx, name)
        sql = "SELECT id, state FROM tombstones WHERE name = ? AND state IN ('destroying', 'reviving')"
        if row := tx.execute(sql, (name,)).fetchone():
            if row["state"] == "reviving":
                raise Refusal("conflict", f"cannot destroy {name}: it is being revived; try again in a moment")
            number = int(row["id"])
            tx.execute("UPDATE tombstones SET at_once = max(at_once, ?) WHERE id = ?", (at_once, number))
        else:
            number = self._put(tx, name, actor, at_once)
        for topic in (WANTED, TOMBSTONES, mail(name)):
            tx.wake(topic)
        return number

    def _put(self, tx: Transaction, name: AgentName, actor: str, at_once: bool) -> int:
        # Two of a name never have the same second in their labels.
        (last,) = tx.execute("SELECT max(destroyed_at_ms) FROM tombstones WHERE name = ?", (name,)).fetchone()
        at_ms = max(tx.now_ms, (last or 0) + 1000)
        label = f"{name}@{datetime.fromtimestamp(at_ms // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
        cursor = tx.execute(
            "INSERT INTO tombstones (name, label, state, at_once, destroyed_by, destroyed_at_ms)"
            " VALUES (?, ?, 'destroying', ?, ?, ?)",
            (name, label, at_once, actor, at_ms),
        )
        assert cursor.lastrowid is not None
        tx.emit("agent_destroying", actor, name, tombstone=label, at_once=at_once)
        return cursor.lastrowid

    async def check_nobody_has(self, name: AgentName) -> None:
        """Raise Refusal when a name, or its container's, is taken: nothing under it could be revived."""
        await self._store.write(lambda tx: _check_nobody_has(tx, name))

    async def revive(self, tombstone: Tombstone, actor: str, ports: range) -> None:
        """Begin to make an agent of it again; again is fine. Raises Refusal when its name, or container's, is taken."""

        def write(tx: Transaction) -> None:
            if _begin(tx, tombstone, "reviving", "revive"):
                _check_nobody_has(tx, tombstone.name)
                (text,) = tx.execute("SELECT agent FROM tombstones WHERE id = ?", (tombstone.id,)).fetchone()
                if tombstone.configured:
                    row = json.loads(text)
                    note_configured(tx, tombstone.name, row["sha"], row["requested_by"], row["icon"])
                else:
                    _insert_agent(tx, tombstone, json.loads(text), ports)
                    tx.emit("agent_reviving", actor, tombstone.name, tombstone=tombstone.label)

        await self._store.write(write)

    async def purge(self, tombstone: Tombstone, actor: str) -> None:
        """Begin to remove it with its directories; again is fine. Raises Refusal."""

        def write(tx: Transaction) -> None:
            if _begin(tx, tombstone, "purging", "purge"):
                tx.emit("agent_purging", actor, tombstone.name, tombstone=tombstone.label, bytes=tombstone.bytes)

        await self._store.write(write)


def keep(tx: Transaction, tombstone: Tombstone, size: int) -> None:
    """The agent's row, or that of its configuration, goes into its tombstone: it is no agent any more."""
    found = (tx.execute(f"SELECT * FROM {each} WHERE name = ?", (tombstone.name,)) for each in ("agents", "configured"))
    row = dict(next(row for each in found if (row := each.fetchone()) is not None))
    row["budgets"] = put_away(tx, tombstone.name)
    sql = "UPDATE tombstones SET state = 'kept', agent = ?, bytes = ? WHERE id = ?"
    tx.execute(sql, (json.dumps(row, ensure_ascii=False), size, tombstone.id))
    for table in ("container_states", "disk_warnings", "systems", "tool_calls"):
        tx.execute(f"DELETE FROM {table} WHERE agent = ?", (tombstone.name,))
    for table in ("agents", "configured"):
        tx.execute(f"DELETE FROM {table} WHERE name = ?", (tombstone.name,))
    tx.emit("agent_destroyed", tombstone.destroyed_by, tombstone.name, tombstone=tombstone.label, bytes=size)
    for topic in (WANTED, DEPLOYED):
        tx.wake(topic)


def forget(tx: Transaction, tombstone: Tombstone, deed: str, actor: str) -> None:
    """The tombstone is no more: `purged`, or `revived`, and then its agent is started."""
    tx.execute("DELETE FROM tombstones WHERE id = ?", (tombstone.id,))
    others = "SELECT 1 FROM tombstones WHERE name = ?1 UNION ALL SELECT 1 FROM agents WHERE name = ?1"
    if deed == "purged" and tx.execute(others, (tombstone.name,)).fetchone() is None:
        UidRanges.release(tx, tombstone.name)
    if deed == "revived":
        tx.execute("UPDATE agents SET wanted = 'up' WHERE name = ?", (tombstone.name,))
    label, number, size = tombstone.label, tombstone.id, tombstone.bytes
    tx.emit(f"agent_{deed}", actor, tombstone.name, tombstone=label, number=number, bytes=size)
    for topic in (WANTED, DEPLOYED, mail(tombstone.name)):
        tx.wake(topic)


def _begin(tx: Transaction, tombstone: Tombstone, state: str, deed: str) -> bool:
    """Move one on from kept. False when that was done before; raises Refusal when something else is under way."""
    row = tx.execute("SELECT state FROM tombstones WHERE id = ?", (tombstone.id,)).fetchone()
    if row is None or row["state"] not in ("kept", state):
        now = _UNDER_WAY.get(row["state"], row["state"]) if row else "gone"
        raise Refusal("conflict", f"cannot {deed} {tombstone.label}: it is {now}; look at `hive tombstones`")
    tx.wake(TOMBSTONES)
    if row["state"] == state:
        return False
    tx.execute("UPDATE tombstones SET state = ? WHERE id = ?", (state, tombstone.id))
    return True


def _check_configured(tx: Transaction, name: AgentName) -> None:
    """Raise Refusal for a name that is no configuration, or of which an agent is being made now."""
    if tx.execute("SELECT 1 FROM configured WHERE name = ?", (name,)).fetchone() is None:
        raise no_such_agent(tx, name, "destroy")
    _check_not_becoming(tx, name, "destroy")


def _check_nobody_has(tx: Transaction, name: AgentName) -> None:
    check_free(tx, name, "revive")
    _check_not_becoming(tx, name, "revive")
    if tx.execute("SELECT 1 FROM configured WHERE name = ?", (name,)).fetchone():
        why = f"the configuration of an agent to be has its name; `hive destroy {name}` first"
        raise Refusal("conflict", f"cannot revive {name}: {why}")


def _check_not_becoming(tx: Transaction, name: AgentName, deed: str) -> None:
    """Raise Refusal while the repositories of an agent to be are made, or it is."""
    if row := tx.execute(_BECOMING, (name,)).fetchone():
        why = f"approval {row['id']} is being carried out; try again when that is over"
        raise Refusal("conflict", f"cannot {deed} {name}: {why}")


def _insert_agent(tx: Transaction, tombstone: Tombstone, row: dict[str, Any], ports: range) -> None:
    """Its row as it was, kept down for now, with its port where that is free."""
    known = {row["name"] for row in tx.execute("SELECT name FROM pragma_table_info('agents')").fetchall()}
    values = {key: value for key, value in row.items() if key in known}
    taken = [row["page_port"] for row in tx.execute("SELECT page_port FROM agents").fetchall()]
    if values["page_port"] in taken or values["page_port"] not in ports:
        values["page_port"] = pick_port(tombstone.name, ports, taken)
    gone = tx.execute("SELECT min(id) - 1 FROM turn_lines WHERE agent = ?", (tombstone.name,)).fetchone()[0]
    values |= {"wanted": "down", "rests_until_ms": None, "lines_gone": max(values["lines_gone"], gone or 0)}
    tx.insert("agents", list(values), [list(values.values())])
    bring_back(tx, tombstone.name, row.get("budgets", ()))
    tx.execute(f"UPDATE agents SET line_bytes = {LINE_BYTES} WHERE name = ?1", (tombstone.name,))


def _from_row(row: sqlite3.Row) -> Tombstone:
    given = {"at_once": bool(row["at_once"]), "configured": bool(row["configured"]), "name": AgentName(row["name"])}
    return Tombstone(**{**dict(row), **given})


_UNDER_WAY = {"destroying": "being destroyed", "reviving": "being revived", "purging": "being purged"}

_SELECT = """
    SELECT id, name, label, state, at_once, bytes, destroyed_by, destroyed_at_ms,
           agent ->> 'sha' IS NOT NULL AS configured
    FROM tombstones
"""
_BECOMING = f"""
    SELECT id FROM approvals INDEXED BY approvals_approved
    WHERE state = 'approved' AND agent = ? AND kind IN {("spawn", "init_config", *COMMITS)} LIMIT 1
"""
