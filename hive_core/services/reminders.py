"""Reminders: what an agent asks to be told again at an instant. A firing is a message of the hive.

open ── its instant ──▶ due ── when its agent has room, most often at once ──▶ fired
  └──────── cancelled ◀──┘
"""

from __future__ import annotations

import sqlite3
from typing import Any

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import instant
from hive_core.protocol.words import NOTE_LIMIT_BYTES, SYSTEM, AgentName, parse_instant, parse_text, shown
from hive_core.services.notices import notice
from hive_core.services.post import Cause, Letter, no_room, post_counted
from hive_core.services.tool_calls import once
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

OPEN_LIMIT = 50  # reminders of one agent that wait
AHEAD_MOST_S = 366 * 24 * 3600.0
SAME_CHAIN_S = 3600.0  # a reminder due sooner is a hop of the turn that set it, so that a loop of them is held
TOPIC = "reminders"
BATCH = 100  # that fire in one transaction


class When:
    """At an instant, or after so many seconds: one of the two. Raises Refusal("usage")."""

    def __init__(self, at: object = None, after_s: object = None) -> None:
        if (at is None) == (after_s is None):
            raise Refusal("usage", "cannot remind: give one of `at` and `after_s`")
        self._at_ms, self._after_ms = None if at is None else parse_instant(at, "at"), 0
        if after_s is None:
            return
        if isinstance(after_s, bool) or not isinstance(after_s, int | float) or not 1 <= after_s <= AHEAD_MOST_S:
            raise Refusal("usage", f"cannot remind after {shown(after_s)} s: after_s is 1 to {AHEAD_MOST_S:.0f}")
        self._after_ms = int(after_s * 1000)

    @property
    def is_span(self) -> bool:
        return self._at_ms is None

    def due_at_ms(self, now_ms: int) -> int:
        """The instant. Raises Refusal("usage") for one that is past or too far ahead."""
        due_at_ms = self._at_ms if self._at_ms is not None else now_ms + self._after_ms
        if due_at_ms <= now_ms:
            raise Refusal("usage", f"cannot remind at {_instant(due_at_ms)}: it is {_instant(now_ms)} already")
        if due_at_ms - now_ms > AHEAD_MOST_S * 1000:
            days = AHEAD_MOST_S / 86_400
            raise Refusal("usage", f"cannot remind at {_instant(due_at_ms)}: the limit is {days:.0f} days ahead")
        return due_at_ms


def _instant(at_ms: int) -> str:
    return instant(max(0, at_ms))


class Reminders:
    """Also a Timer of the hive's clock."""

    topic = TOPIC

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()

    async def remind(self, agent: AgentName, when: When, given_body: object, key: str | None = None) -> dict[str, Any]:
        """Set a reminder: {"reminder", "at_ms"}. A repeated `key` gets the first answer. Raises Refusal."""
        body = parse_text(given_body, "body", NOTE_LIMIT_BYTES)

        def set_it(tx: Transaction) -> dict[str, Any]:
            if tx.short:
                raise no_room("remind")
            (mine,) = tx.execute(
                "SELECT count(*) FROM reminders WHERE agent = ? AND state IN ('open', 'due')", (agent,)
            ).fetchone()
            if mine >= OPEN_LIMIT:
                raise Refusal(
                    "refused", f"cannot remind: {mine} reminders of yours wait, which is the limit; cancel some"
                )
            due_at_ms = when.due_at_ms(tx.now_ms)
            # The newest turn is the one that runs, if any does.
            sql = "SELECT chain_id, hops FROM turns WHERE agent = ? ORDER BY id DESC LIMIT 1"
            turn = tx.execute(sql, (agent,)).fetchone()
            soon = turn is not None and due_at_ms - tx.now_ms <= SAME_CHAIN_S * 1000
            chain_id, hops = (turn["chain_id"], turn["hops"] + 1) if soon else (None, 0)
            cursor = tx.execute(
                "INSERT INTO reminders (agent, body, set_at_ms, due_at_ms, counts_from_ms, chain_id, hops, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, 'open')",
                (agent, body, tx.now_ms, due_at_ms, tx.now_ms if when.is_span else None, chain_id, hops),
            )
            tx.emit("reminder_set", agent, agent, reminder=cursor.lastrowid, at_ms=due_at_ms)
            tx.wake(TOPIC)
            return {"reminder": cursor.lastrowid, "at_ms": due_at_ms}

        return await self._store.write(lambda tx: once(tx, agent, key, "remind", lambda: set_it(tx)))

    async def cancel(self, agent: AgentName, reminder_id: int) -> dict[str, Any]:
        """Cancel a reminder; again is fine. Raises Refusal when it is not the agent's or has fired."""

        def write(tx: Transaction) -> dict[str, Any]:
            sql = "SELECT state, settled_at_ms FROM reminders WHERE id = ? AND agent = ?"
            row = tx.execute(sql, (reminder_id, agent)).fetchone()
            if row is None:
                raise Refusal("not_found", f"cannot cancel reminder {reminder_id}: you did not set it")
            if row["state"] == "fired":
                fired = instant(row["settled_at_ms"])
                raise Refusal("conflict", f"cannot cancel reminder {reminder_id}: it has fired at {fired}")
            if row["state"] in ("open", "due"):
                sql = "UPDATE reminders SET state = 'cancelled', settled_at_ms = ? WHERE id = ?"
                tx.execute(sql, (tx.now_ms, reminder_id))
                tx.emit("reminder_cancelled", agent, agent, reminder=reminder_id)
            return {"reminder": reminder_id}

        return await self._store.write(write)

    def fire(self, tx: Transaction) -> None:
        """Send what is due, late ones too: an agent that counts on being told again is told.

        One for which its agent has no room, by inbox_depth or held_depth, stays due and is looked at each time. One
        `after_s` that was set at an instant which the clock has still to reach, so before it was set back, waits as
        long as ever from when that was seen.
        """
        given = {"now": tx.now_ms, "batch": BATCH}
        tx.execute(_SET_BACK, given)
        new = [row["id"] for row in tx.execute(_DUE, given).fetchall()]
        tx.executemany("UPDATE reminders SET state = 'due' WHERE id = ?", [(number,) for number in new])
        due = tx.execute("SELECT DISTINCT agent FROM reminders INDEXED BY reminders_due WHERE state = 'due'")
        for row in due.fetchall():
            for number in self._send(tx, row["agent"]):
                if number in new:
                    tx.emit("reminder_waits", SYSTEM, row["agent"], reminder=number)

    def _send(self, tx: Transaction, agent: AgentName) -> list[int]:
        """Send what is due to an agent as far as it has room, the oldest first. The numbers of the others."""
        sql = (
            "SELECT * FROM reminders INDEXED BY reminders_due WHERE agent = ? AND state = 'due' ORDER BY due_at_ms, id"
        )
        room, waits = self._room(tx, agent), []
        for row in tx.execute(sql, (agent,)).fetchall():
            place = "held" if row["hops"] > self._limits.hops else "queued"
            room[place] -= 1
            if room[place] < 0:
                waits.append(row["id"])
            else:
                self._send_one(tx, row)
        return waits

    def _send_one(self, tx: Transaction, row: sqlite3.Row) -> None:
        text = f"reminder {row['id']}, which you set at {_instant(row['set_at_ms'])}, is due"
        body = notice("reminder", text, reminder=row["id"], body=row["body"])
        cause = Cause("reminder", row["id"], row["chain_id"], row["hops"])
        sent = post_counted(tx, Letter(SYSTEM, (row["agent"],), body, cause=cause), self._limits)
        message_id = None if isinstance(sent, Refusal) else sent["message"]
        tx.execute(
            "UPDATE reminders SET state = 'fired', settled_at_ms = ?, message_id = ? WHERE id = ?",
            (tx.now_ms, message_id, row["id"]),
        )
        tx.emit("reminder_fired", SYSTEM, row["agent"], reminder=row["id"], message=message_id)

    def _room(self, tx: Transaction, agent: AgentName) -> dict[str, int]:
        """How many more messages may wait for an agent, and how many more of its own and its firings may be held."""
        row = tx.execute(_WAITING, (agent,)).fetchone()
        return {"queued": self._limits.inbox_depth - row["queued"], "held": self._limits.held_depth - row["held"]}

    def next_after(self, tx: Transaction) -> int | None:
        at: int | None = tx.execute("SELECT min(due_at_ms) FROM reminders WHERE state = 'open'").fetchone()[0]
        return at

    async def open_of(self, agent: str) -> list[dict[str, Any]]:
        """The reminders of an agent that wait, the next one first: {reminder, at_ms, body, due}.

        due: its instant has passed, and it waits for room.
        """
        sql = """
            SELECT id AS reminder, due_at_ms AS at_ms, body, state = 'due' AS due FROM reminders
            WHERE agent = ? AND state IN ('open', 'due') ORDER BY due_at_ms, id
        """
        return [{**dict(row), "due": bool(row["due"])} for row in await self._store.rows(sql, (agent,))]


_SET_BACK = """
    UPDATE reminders INDEXED BY reminders_set SET counts_from_ms = :now
    WHERE state = 'open' AND set_at_ms > :now AND counts_from_ms > :now
"""
_DUE = """
    SELECT id FROM (
        SELECT due_at_ms, id FROM reminders INDEXED BY reminders_open WHERE state = 'open' AND due_at_ms <= :now
        UNION ALL
        SELECT due_at_ms, id FROM reminders INDEXED BY reminders_set
        WHERE state = 'open' AND set_at_ms > :now AND counts_from_ms + due_at_ms - set_at_ms <= :now
    ) ORDER BY due_at_ms, id LIMIT :batch
"""
_WAITING = """
    SELECT (
        SELECT count(*) FROM deliveries INDEXED BY deliveries_queued WHERE recipient = ?1 AND state = 'queued'
    ) AS queued, (
        SELECT count(*) FROM deliveries INDEXED BY deliveries_held
        WHERE state = 'held' AND sender IN (?1, 'system') AND (sender = ?1 OR recipient = ?1)
    ) AS held
"""
