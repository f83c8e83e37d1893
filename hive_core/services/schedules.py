"""Schedules: messages that the operator wants sent by a clock, each due instant once.

`next_at_ms` stands in the row and is moved by the transaction that stores the message, so a crash fires again what was
not stored and nothing else. A due instant that was missed is told by an event and not made up for.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, NamedTuple

from hive_core.cron import Cron, parse_cron
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import (
    INLINE_LIMIT_BYTES,
    OPERATOR,
    SYSTEM,
    AgentName,
    MessageBody,
    parse_agent_name,
    parse_text,
    shown,
)
from hive_core.services.absent import no_such_agent
from hive_core.services.post import Cause, Letter, no_room, post_counted, unless_refused
from hive_core.services.tool_calls import first_answer, once
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

LATE_MOST_MS = 5 * 60_000  # what is later than this was missed: a restart is not, a night without the daemon is
COUNTED_MOST = 1_000  # missed instants that are counted one by one
FIRINGS_KEPT = 1_000  # of each schedule, so that a clock that is set back fires nothing again
SCHEDULES_LIMIT = 1_000
EVERY_LEAST_S, EVERY_MOST_S = 60.0, 366 * 24 * 3600.0
TOPIC = "schedules"
BATCH = 10  # that are looked at in one transaction: counting a thousand missed minutes takes 50 ms


@dataclass(frozen=True, slots=True)
class Interval:
    """Every so often from an instant on; where the clock stands does not move its grid."""

    every_ms: int
    from_ms: int

    def next_after(self, at_ms: int) -> int:
        return at_ms + self.every_ms - (at_ms - self.from_ms) % self.every_ms


Rhythm = Cron | Interval


class Plan(NamedTuple):
    """A schedule that wants to be added."""

    agent: AgentName
    body: MessageBody
    cron: Cron | None
    every_ms: int | None

    def rhythm(self, from_ms: int) -> Rhythm:
        return self.cron or Interval(self.every_ms or 0, from_ms)


def parse_plan(agent: object, body: object, cron: object = None, zone: object = None, every_s: object = None) -> Plan:
    """A schedule's words; without a zone cron is in UTC. Raises Refusal("usage") naming the one that is no good."""
    name, text = parse_agent_name(agent), MessageBody(parse_text(body, "body", INLINE_LIMIT_BYTES))
    if (cron is None) == (every_s is None):
        raise Refusal("usage", "cannot schedule: give one of `cron` and `every`")
    if every_s is None:
        return Plan(name, text, parse_cron(cron, "UTC" if zone is None else zone), None)
    if zone is not None:
        raise Refusal("usage", "cannot schedule: a time zone (tz) belongs to `cron`, an interval has none")
    if (
        isinstance(every_s, bool)
        or not isinstance(every_s, int | float)
        or not EVERY_LEAST_S <= every_s <= EVERY_MOST_S
    ):
        raise Refusal(
            "usage",
            f"cannot schedule every {shown(every_s)} s: give {EVERY_LEAST_S:.0f} to {EVERY_MOST_S:.0f} (every)",
        )
    return Plan(name, text, None, int(every_s * 1000))


class Due(NamedTuple):
    """What a schedule's clock finds."""

    fires_ms: int | None  # the due instant that is sent now
    missed: int
    more: bool  # more were missed than are counted


def due_at(rhythm: Rhythm, next_at_ms: int, now_ms: int) -> Due:
    """Of all due instants from `next_at_ms` to `now_ms` the newest fires, unless it is too late for that as well."""
    fires_ms = None
    at: int | None = rhythm.next_after(max(next_at_ms - 1, now_ms - LATE_MOST_MS - 1))
    while at is not None and at <= now_ms:
        fires_ms, at = at, rhythm.next_after(at)
    if isinstance(rhythm, Interval):
        passed = (now_ms - next_at_ms) // rhythm.every_ms + 1
        return Due(fires_ms, passed - (fires_ms is not None), False)
    missed, at = 0, next_at_ms
    while at is not None and at <= now_ms and at != fires_ms and missed < COUNTED_MOST:
        missed, at = missed + 1, rhythm.next_after(at)
    return Due(fires_ms, missed, missed == COUNTED_MOST)


class Schedules:
    """Also a Timer of the hive's clock."""

    topic = TOPIC

    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()

    async def add(self, plan: Plan, key: str | None = None) -> dict[str, Any]:
        """Add a schedule: {"schedule", "next_at_ms"}. A repeated `key` gets the first answer. Raises Refusal."""

        def put(tx: Transaction) -> dict[str, Any]:
            if tx.short:
                raise no_room("schedule")
            return self.put(tx, plan)

        return await self._store.write(lambda tx: once(tx, OPERATOR, key, "schedule", lambda: put(tx)))

    def put(self, tx: Transaction, plan: Plan) -> dict[str, Any]:
        """The same as a part of another change, which has looked for room on the disk."""
        if tx.execute("SELECT 1 FROM agents WHERE name = ?", (plan.agent,)).fetchone() is None:
            raise no_such_agent(tx, plan.agent, "schedule for")
        (count,) = tx.execute("SELECT count(*) FROM schedules WHERE state != 'removed'").fetchone()
        if count >= SCHEDULES_LIMIT:
            raise Refusal("refused", f"cannot schedule: there are {count} schedules, the limit; remove some")
        next_at_ms = plan.rhythm(tx.now_ms).next_after(tx.now_ms)
        if next_at_ms is None:
            raise Refusal("usage", "cannot schedule: such a day never comes")
        cron, zone = (plan.cron.expression, plan.cron.zone) if plan.cron else (None, None)
        cursor = tx.execute(
            "INSERT INTO schedules (agent, body, cron, zone, every_ms, state, created_at_ms, next_at_ms,"
            " moved_at_ms) VALUES (?, ?, ?, ?, ?, 'on', ?, ?, ?)",
            (plan.agent, plan.body, cron, zone, plan.every_ms, tx.now_ms, next_at_ms, tx.now_ms),
        )
        tx.emit("schedule_added", OPERATOR, plan.agent, schedule=cursor.lastrowid, next_at_ms=next_at_ms)
        tx.wake(TOPIC)
        return {"schedule": cursor.lastrowid, "next_at_ms": next_at_ms}

    async def pause(self, schedule_id: int) -> dict[str, Any]:
        """Let it rest until `resume`; what would have been due meanwhile is not missed. Again is fine."""

        def write(tx: Transaction) -> dict[str, Any]:
            row = _get(tx, schedule_id)
            if row["state"] == "on":
                _pause(tx, row, OPERATOR, None)
            return {"schedule": schedule_id, "state": "paused"}

        return await self._store.write(write)

    async def resume(self, schedule_id: int) -> dict[str, Any]:
        """Go on with the next due instant: {"schedule", "state", "next_at_ms"}. Again is fine."""

        def write(tx: Transaction) -> dict[str, Any]:
            row = _get(tx, schedule_id)
            next_at_ms = row["next_at_ms"]
            if row["state"] == "paused":
                next_at_ms = _next(tx, row)
                tx.execute(
                    "UPDATE schedules SET state = 'on', note = NULL, next_at_ms = ?, moved_at_ms = ? WHERE id = ?",
                    (next_at_ms, tx.now_ms, schedule_id),
                )
                tx.emit("schedule_resumed", OPERATOR, row["agent"], schedule=schedule_id, next_at_ms=next_at_ms)
                tx.wake(TOPIC)
            return {"schedule": schedule_id, "state": "on", "next_at_ms": next_at_ms}

        return await self._store.write(write)

    async def remove(self, schedule_id: int) -> dict[str, Any]:
        """End it for good. Again is fine."""

        def write(tx: Transaction) -> dict[str, Any]:
            row = tx.execute("SELECT * FROM schedules WHERE id = ?", (schedule_id,)).fetchone()
            if row is None:
                raise _no_schedule(schedule_id)
            if row["state"] != "removed":
                sql = "UPDATE schedules SET state = 'removed', next_at_ms = NULL, moved_at_ms = ? WHERE id = ?"
                tx.execute(sql, (tx.now_ms, schedule_id))
                tx.emit("schedule_removed", OPERATOR, row["agent"], schedule=schedule_id)
            return {"schedule": schedule_id, "state": "removed"}

        return await self._store.write(write)

    async def run(self, schedule_id: int, key: str | None = None) -> dict[str, Any]:
        """Send its message now: {"schedule", "message"}. Its next due instant stays. A repeated `key` sends it once."""

        tool = f"schedule run {schedule_id}"

        def write(tx: Transaction) -> dict[str, Any] | Refusal:
            if first := first_answer(tx, OPERATOR, key, tool):
                return first
            row = _get(tx, schedule_id)
            sent = post_counted(tx, _letter(row), self._limits)
            if isinstance(sent, Refusal):
                return sent
            tx.emit("schedule_run", OPERATOR, row["agent"], schedule=schedule_id, message=sent["message"])
            return once(tx, OPERATOR, key, tool, lambda: {"schedule": schedule_id, **sent})

        return unless_refused(await self._store.write(write))

    # -- the clock ----------------------------------------------------------------------------------------------------

    def fire(self, tx: Transaction) -> None:
        """Send what is due and move each schedule on; what was due while nobody looked is counted in an event."""
        sql = """
            SELECT * FROM schedules WHERE state = 'on' AND (next_at_ms <= :now OR moved_at_ms > :now)
            ORDER BY next_at_ms, id LIMIT :batch
        """
        for row in tx.execute(sql, {"now": tx.now_ms, "batch": BATCH}).fetchall():
            try:
                self._fire_one(tx, row)
            except Refusal as refusal:
                # This machine knows its time zone no more: it must not stop the clock of all the others.
                _pause(tx, row, SYSTEM, refusal.message)

    def _fire_one(self, tx: Transaction, row: sqlite3.Row) -> None:
        # A clock that was set back finds `next_at_ms` too far ahead: then what comes next is worked out again.
        due = Due(None, 0, False)
        if row["next_at_ms"] <= tx.now_ms:
            due = due_at(_rhythm(row), row["next_at_ms"], tx.now_ms)
        next_at_ms = _next(tx, row)
        tx.execute(
            "UPDATE schedules SET next_at_ms = ?, moved_at_ms = ? WHERE id = ?", (next_at_ms, tx.now_ms, row["id"])
        )
        if due.missed:
            more = {"more": True} if due.more else {}
            first = {"first_at_ms": row["next_at_ms"]}
            tx.emit("schedule_missed", SYSTEM, row["agent"], schedule=row["id"], missed=due.missed, **first, **more)
        if due.fires_ms is not None and _claim(tx, row["id"], due.fires_ms):
            self._send(tx, row, due.fires_ms)

    def _send(self, tx: Transaction, row: sqlite3.Row, due_at_ms: int) -> None:
        sent = post_counted(tx, _letter(row), self._limits)
        if isinstance(sent, Refusal):
            tx.emit("schedule_refused", SYSTEM, row["agent"], schedule=row["id"], why=str(sent))
            return
        message_id = sent["message"]
        sql = "UPDATE schedule_firings SET message_id = ? WHERE schedule_id = ? AND due_at_ms = ?"
        tx.execute(sql, (message_id, row["id"], due_at_ms))
        tx.emit("schedule_fired", SYSTEM, row["agent"], schedule=row["id"], message=message_id, due_at_ms=due_at_ms)

    def next_after(self, tx: Transaction) -> int | None:
        """The next due instant; now, while there are some that a clock which was set back has still to move."""
        row = tx.execute(_NEXT).fetchone()
        ahead = row["moved_at_ms"] is not None and row["moved_at_ms"] > tx.now_ms
        at: int | None = tx.now_ms if ahead else row["next_at_ms"]
        return at

    async def all(self) -> list[dict[str, Any]]:
        """Every schedule that was not removed, with its newest firing."""
        sql = """
            SELECT s.id AS schedule, s.agent, s.body, s.cron, s.zone, s.every_ms / 1000.0 AS every_s, s.state, s.note,
                   s.next_at_ms, (SELECT max(due_at_ms) FROM schedule_firings WHERE schedule_id = s.id) AS fired_at_ms
            FROM schedules s WHERE s.state != 'removed' ORDER BY s.id
        """
        return [dict(row) for row in await self._store.rows(sql)]


_NEXT = """
    SELECT (SELECT min(next_at_ms) FROM schedules WHERE state = 'on') AS next_at_ms,
           (SELECT max(moved_at_ms) FROM schedules WHERE state = 'on') AS moved_at_ms
"""


def _no_schedule(schedule_id: int) -> Refusal:
    return Refusal("not_found", f"cannot find schedule {schedule_id}; `hive schedule list` shows them")


def _get(tx: Transaction, schedule_id: int) -> sqlite3.Row:
    sql = "SELECT * FROM schedules WHERE id = ? AND state != 'removed'"
    row: sqlite3.Row | None = tx.execute(sql, (schedule_id,)).fetchone()
    if row is None:
        raise _no_schedule(schedule_id)
    return row


def _rhythm(row: sqlite3.Row) -> Rhythm:
    if row["cron"] is None:
        return Interval(row["every_ms"], row["created_at_ms"])
    return Cron(row["cron"], row["zone"])


def _letter(row: sqlite3.Row) -> Letter:
    # From the operator, who is to be answered; a full inbox refuses it, or an agent that is down would be flooded.
    return Letter(OPERATOR, (row["agent"],), MessageBody(row["body"]), cause=Cause("schedule", row["id"]))


def _next(tx: Transaction, row: sqlite3.Row) -> int:
    """The first due instant after now. Where the clock was set back it may have fired: `_claim` knows."""
    found = _rhythm(row).next_after(tx.now_ms)
    if found is None:
        raise Refusal("refused", "its next day never comes")
    return found


def _claim(tx: Transaction, schedule_id: int, due_at_ms: int) -> bool:
    """Note a firing. False when this due instant has fired before."""
    # What lies before all that is kept of many firings has fired, for all that is known.
    sql = "SELECT count(*) >= ? AND min(due_at_ms) > ? FROM schedule_firings WHERE schedule_id = ?"
    if tx.execute(sql, (FIRINGS_KEPT, due_at_ms, schedule_id)).fetchone()[0]:
        return False
    sql = "INSERT INTO schedule_firings (schedule_id, due_at_ms) VALUES (?, ?) ON CONFLICT DO NOTHING"
    if tx.execute(sql, (schedule_id, due_at_ms)).rowcount == 0:
        return False
    # By count, and by the order in which they fired: an age would ask the clock that may be wrong.
    old = "SELECT id FROM schedule_firings WHERE schedule_id = ? ORDER BY id DESC LIMIT 1 OFFSET ?"
    tx.execute(
        f"DELETE FROM schedule_firings WHERE schedule_id = ? AND id <= ({old})",
        (schedule_id, schedule_id, FIRINGS_KEPT),
    )
    return True


def _pause(tx: Transaction, row: sqlite3.Row, actor: AgentName, note: str | None) -> None:
    sql = "UPDATE schedules SET state = 'paused', next_at_ms = NULL, note = ? WHERE id = ?"
    tx.execute(sql, (note, row["id"]))
    tx.emit("schedule_paused", actor, row["agent"], schedule=row["id"], why=note)
