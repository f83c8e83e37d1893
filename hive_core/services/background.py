"""Work that outlives a turn: an agent's commands in the background, as its harness tells of them, and the wake.

The agent can say all of it: it can wake nobody but itself, and each wake belongs to the chain of the turn in which the
host was told that the work began, so that the hop limit holds against an agent that wakes itself for ever.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import trio

from hive_core.limits import Limits
from hive_core.protocol.harness import (
    BACKGROUND_AT_ONCE,
    BACKGROUND_COMMAND_LIMIT,
    BACKGROUND_NOTE_LIMIT,
    BACKGROUND_TAIL_LIMIT,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName, MessageBody, shown
from hive_core.services.notices import notice
from hive_core.services.post import Cause, no_room, put_message
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

STATES = ("running", "ended", "timed_out", "cut_off")
WORK_DIGITS = 32
OUTPUT_LIMIT = 300  # characters of a path
TOOK_LIMIT_MS = 2**53
SHOWN_OF_COMMAND = 120
RUNNING_LIMIT = 2 * BACKGROUND_AT_ONCE  # the harness before may have left as many
KEPT_S = 14 * 24 * 3600
UNASKED_PER_HOUR = 60  # turns that nobody asked for, of one agent: more of them tell the operator nothing new


@dataclass(frozen=True, slots=True)
class Work:
    """A command as its harness tells of it: the fields of protocol.harness.BackgroundWork."""

    id: str
    state: str
    turn: int
    command: str
    note: str
    output: str
    code: int | None = None
    took_ms: int | None = None
    tail: str = ""


class Background:
    def __init__(self, store: Store, limits: Limits | None = None) -> None:
        self._store = store
        self._limits = limits or Limits()
        self._unasked: dict[str, deque[float]] = {}  # when an agent's last ones were told

    async def tell(self, agent: AgentName, work: Work) -> bool:
        """Note that a command began, or wake its agent because it has ended. The same again does nothing: False.

        Raises Refusal("unavailable") when the agent's inbox has no room, Refusal("refused") for too many that run.
        """

        def write(tx: Transaction) -> bool:
            sql = "SELECT * FROM background_works WHERE agent = ? AND work = ?"
            known = tx.execute(sql, (agent, work.id)).fetchone()
            if known is not None and (known["state"] != "running" or work.state == "running"):
                return False
            # Of the turn that it names itself an agent could choose the first of a chain, again and again.
            told = replace(work, turn=known["turn_id"] or 0 if known else 0)
            if known is None:
                self._begin(tx, agent, told)
            if work.state != "running":
                self._end(tx, agent, told)
            return True

        return await self._store.write(write)

    async def none_runs(self, agent: AgentName) -> bool:
        """A harness has just begun: what is known to run was cut off with the one before. Whether there was any."""

        def write(tx: Transaction) -> bool:
            rows = tx.execute(_RUNNING, (agent,)).fetchall()
            for row in rows:
                self._end(tx, agent, _cut_off(row))
            return bool(rows)

        return await self._store.write(write)

    async def tell_unasked_turn(self, agent: AgentName, key: str) -> bool:
        """Note that an agent's program began a turn by itself and was ended; the same `key` again is the same one.

        False when that was told UNASKED_PER_HOUR times within the hour: then nothing is written.
        """
        now, lately = trio.current_time(), self._unasked.setdefault(agent, deque(maxlen=UNASKED_PER_HOUR))
        if len(lately) == UNASKED_PER_HOUR and now - lately[0] < 3600:
            return False

        def write(tx: Transaction) -> None:
            sql = "INSERT INTO tool_calls (agent, key, tool, result, at_ms) VALUES (?, ?, 'unasked_turn', '{}', ?)"
            with_key = (agent, f"unasked-{key}")
            if tx.execute("SELECT 1 FROM tool_calls WHERE agent = ? AND key = ?", with_key).fetchone() is None:
                tx.execute(sql, (*with_key, tx.now_ms))
                tx.emit("unasked_turn", SYSTEM, agent)

        await self._store.write(write)
        lately.append(now)
        return True

    async def running_of(self, agent: str) -> list[dict[str, Any]]:
        """The commands that run for an agent, the oldest first: {work, command, note, output, begun_at_ms, turn}."""
        rows = await self._store.rows(_RUNNING, (agent,))
        return [
            {
                **{key: row[key] for key in ("work", "command", "note", "output", "begun_at_ms")},
                "turn": row["turn_id"],
            }
            for row in sorted(rows, key=lambda row: (row["begun_at_ms"], row["work"]))
        ]

    async def prune(self, now_ms: int) -> None:
        """Forget what ended long before `now_ms`."""
        sql = "DELETE FROM background_works WHERE ended_at_ms IS NOT NULL AND ended_at_ms < ?"
        await self._store.insist(lambda tx: tx.execute(sql, (now_ms - KEPT_S * 1000,)).rowcount)

    def _begin(self, tx: Transaction, agent: AgentName, work: Work) -> None:
        (running,) = tx.execute(f"SELECT count(*) FROM ({_RUNNING})", (agent,)).fetchone()
        if running >= RUNNING_LIMIT and work.state == "running":
            raise Refusal("refused", f"cannot note {work.id}: {running} commands of {agent} run, which is the limit")
        if tx.short and work.state == "running":
            raise no_room("note a command in the background")
        turn = _turn(tx, agent, work.turn)
        row = (agent, work.id, turn["id"] if turn else None, work.command, work.note, work.output, tx.now_ms)
        tx.execute(
            "INSERT INTO background_works (agent, work, turn_id, command, note, output, state, begun_at_ms)"
            " VALUES (?, ?, ?, ?, ?, ?, 'running', ?)",
            row,
        )
        tx.emit("background_begun", agent, agent, work=work.id, turn=row[2], what=_what(work))

    def _end(self, tx: Transaction, agent: AgentName, work: Work) -> None:
        turn = _turn(tx, agent, work.turn)
        chain, hops = (turn["chain_id"], turn["hops"] + 1) if turn else (None, 0)
        self._check_room(tx, agent, hops)
        cause = Cause("turn", turn["id"] if turn else None, chain, hops)
        message = put_message(tx, SYSTEM, agent, _words(work), None, cause, self._limits)
        tx.execute(
            "UPDATE background_works SET state = ?, ended_at_ms = ?, message_id = ? WHERE agent = ? AND work = ?",
            (work.state, tx.now_ms, message, agent, work.id),
        )
        tx.emit("background_ended", SYSTEM, agent, work=work.id, state=work.state, code=work.code, message=message)

    def _check_room(self, tx: Transaction, agent: AgentName, hops: int) -> None:
        """The hive's own letters pass a full inbox; these an agent can set off."""
        row = tx.execute(_WAITING, (agent,)).fetchone()
        held = hops > self._limits.hops
        waiting, limit, key = (
            (row["held"], self._limits.held_depth, "held_depth")
            if held
            else (row["queued"], self._limits.inbox_depth, "inbox_depth")
        )
        if waiting >= limit:
            where = "are held for the operator" if held else "wait for it"
            raise Refusal(
                "unavailable",
                f"cannot wake {agent}: {waiting} messages {where}, which is the limit ({key}); tell it later",
            )


def parse_work(request: dict[str, Any]) -> Work:
    """The work that a request of a harness tells of. Raises Refusal("usage")."""
    work, state, turn = request.get("work"), request.get("state"), request.get("turn")
    if not isinstance(work, str) or not 0 < len(work) <= WORK_DIGITS or set(work) - set("0123456789abcdef"):
        raise Refusal("usage", f"cannot use {shown(work)} as a work: give 1 to {WORK_DIGITS} hexadecimal digits")
    if state not in STATES:
        raise Refusal("usage", f"cannot use {shown(state)} as the state of a work: give one of {', '.join(STATES)}")
    return Work(
        id=work,
        state=state,
        turn=_whole(turn, 0, 2**62) or 0,
        command=_text(request.get("command"), BACKGROUND_COMMAND_LIMIT),
        note=_text(request.get("note"), BACKGROUND_NOTE_LIMIT),
        output=_text(request.get("output"), OUTPUT_LIMIT),
        code=_whole(request.get("code"), -255, 255),
        took_ms=_whole(request.get("took_ms"), 0, TOOK_LIMIT_MS),
        tail=_text(request.get("tail"), BACKGROUND_TAIL_LIMIT),
    )


def _text(raw: object, limit: int) -> str:
    """JSON can hold half a surrogate pair, and neither sqlite nor a page can."""
    return raw[:limit].encode("utf-8", "replace").decode() if isinstance(raw, str) else ""


def _whole(raw: object, least: int, most: int) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and least <= raw <= most else None


def _turn(tx: Transaction, agent: str, turn_id: int) -> sqlite3.Row | None:
    """The turn that a work belongs to, if it is its agent's and still known; else the newest that its agent had."""
    turns = "SELECT id, chain_id, hops FROM turns WHERE agent = ?"
    row: sqlite3.Row | None = tx.execute(f"{turns} AND id = ?", (agent, turn_id)).fetchone()
    return row or tx.execute(f"{turns} ORDER BY id DESC LIMIT 1", (agent,)).fetchone()


def _cut_off(row: sqlite3.Row) -> Work:
    known = {key: row[key] for key in ("command", "note", "output")}
    return Work(row["work"], "cut_off", row["turn_id"] or 0, **known)


def _what(work: Work) -> str:
    """What a work is, by its note, or by its command."""
    words = work.note or work.command
    return words if len(words) <= SHOWN_OF_COMMAND else words[: SHOWN_OF_COMMAND - 1] + "…"


def _words(work: Work) -> MessageBody:
    """What its agent reads when a work has ended."""
    if work.state == "cut_off":
        how = "was cut off by a restart"
    elif work.state == "timed_out":
        how = "was ended after the longest time that it may take (background_s in agent.toml)"
    elif work.code is None:
        how = "has ended"
    else:
        how = f"was ended by signal {-work.code}" if work.code < 0 else f"has ended with exit code {work.code}"
    took = "" if work.took_ms is None else f" after {work.took_ms / 1000:.0f} s"
    text = f"work {work.id} {how}{took}"
    said = {"command": _what(work), "output": work.output, "tail": work.tail.strip() and work.tail}
    return notice("background", text, work=work.id, **said)


_RUNNING = "SELECT * FROM background_works INDEXED BY background_works_running WHERE agent = ? AND state = 'running'"
_WAITING = """
    SELECT (
        SELECT count(*) FROM deliveries INDEXED BY deliveries_queued WHERE recipient = ?1 AND state = 'queued'
    ) AS queued, (
        SELECT count(*) FROM deliveries INDEXED BY deliveries_held
        WHERE state = 'held' AND sender = 'system' AND recipient = ?1
    ) AS held
"""
