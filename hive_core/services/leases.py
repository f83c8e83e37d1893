"""Which message a turn begins with, and what it takes more of."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import SYSTEM, AgentName
from hive_core.services.access import Reason
from hive_core.services.attachments import FILES, files_of
from hive_core.services.post import forget_depth, note_depth
from hive_core.services.rests import IS_DUE, agent_far_ms, far_ms
from hive_core.services.tool_calls import first_answer, once
from hive_core.store.bus import mail
from hive_core.store.writer import Transaction

RECV_BYTES = 128 * 1024  # of bodies in one answer, but one message always: programs cut long answers of tools


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as its harness knows it: the fence shows that the lease is still its own."""

    id: int
    fence: str


class Lease(NamedTuple):
    """What a turn begins with: a message, or an errand."""

    turn: Turn
    message: Any  # protocol.harness.LeasedMessage; None on an errand
    waiting: int  # how many more messages wait
    refused: int  # how many the agent's full inbox did not take, ever
    settings: dict[str, Any] | None
    session: str | None
    errand: str | None = None  # what is to be done with the session: compact, or save_and_compact


def begin_turn(
    tx: Transaction,
    agent: AgentName,
    fence: str,
    limits: Limits,
    closed: Reason = lambda _: None,
    to_reserve: Callable[[AgentName], int | None] = lambda _: 0,
) -> Lease | None:
    """Begin a turn with the agent's errand or its first message that is due, or find the one this fence began already.

    None begins while the agent's way to the model is `closed`, nor where a budget does not hold what is `to_reserve`
    for it, in micro-USD.
    """
    seat = tx.execute(_SEAT, {"agent": agent, "now": tx.now_ms, "far": far_ms(limits)}).fetchone()
    if seat is None:
        return None
    if seat["turn_id"] is not None:
        if seat["fence"] != fence:
            raise Refusal("conflict", f"cannot lease: turn {seat['turn_id']} of {agent} still runs; ack it first")
        if seat["turn_errand"]:
            return _as_lease(seat, Turn(seat["turn_id"], fence), None, 0, seat["queued"])
        (message,) = tx.execute(_ONE_MAIL, (agent, seat["begun_with"])).fetchall()
        return _as_lease(seat, Turn(seat["turn_id"], fence), message, message["attempts"], seat["queued"])
    if seat["wanted"] != "up" or closed(agent) is not None or _rests(tx, seat, limits):
        return None
    # Behind a turn that had to wait mail goes first: an errand that waits for its own sake would keep all of it back.
    if seat["errand"] and (seat["rests_until_ms"] is None or seat["id"] is None):
        reserved = to_reserve(agent)
        return None if reserved is None else _begin_errand(tx, agent, fence, seat, reserved)
    first = _first_due(tx, agent, seat, limits)
    if first is None or (reserved := to_reserve(agent)) is None:
        return None
    cursor = tx.execute(
        "INSERT INTO turns (agent, fence, state, message_id, chain_id, hops, started_at_ms, reserved_micro_usd)"
        " VALUES (?, ?, 'running', ?, ?, ?, ?, ?)",
        (agent, fence, first["id"], first["chain_id"], first["hops"], tx.now_ms, reserved),
    )
    assert cursor.lastrowid is not None
    turn = Turn(cursor.lastrowid, fence)
    _mark_leased(tx, agent, turn.id, [first])
    tx.emit("turn_started", agent, agent, turn=turn.id, message=first["id"])
    waiting = seat["queued"] - 1
    note_depth(tx, agent, waiting)
    return _as_lease(seat, turn, first, first["attempts"] + 1, waiting)


def _begin_errand(tx: Transaction, agent: AgentName, fence: str, seat: sqlite3.Row, reserved: int) -> Lease:
    """A turn without a message. The errand stays on the agent's row until it has ended."""
    cursor = tx.execute(
        "INSERT INTO turns (agent, fence, state, errand, errand_by, started_at_ms, reserved_micro_usd)"
        " VALUES (?, ?, 'running', ?, ?, ?, ?)",
        (agent, fence, seat["errand"], seat["errand_by"], tx.now_ms, reserved),
    )
    assert cursor.lastrowid is not None
    tx.emit("turn_started", agent, agent, turn=cursor.lastrowid, errand=seat["errand"], by=seat["errand_by"])
    return _as_lease(seat, Turn(cursor.lastrowid, fence), None, 0, seat["queued"])


def _as_lease(seat: sqlite3.Row, turn: Turn, message: sqlite3.Row | None, attempt: int, waiting: int) -> Lease:
    settings = json.loads(seat["settings"]) if seat["settings"] else None
    # What the operator has chosen wins over agent.toml, from the edge of a turn on.
    chosen = {key: seat[f"chosen_{key}"] for key in ("model", "effort") if seat[f"chosen_{key}"]}
    settings = {**settings, **chosen} if settings else settings
    shown = _for_agent(message, attempt) if message is not None else None
    errand = (seat["turn_errand"] or seat["errand"]) if message is None else None
    return Lease(turn, shown, waiting, seat["refused"], settings, seat["session"], errand)


@dataclass(slots=True)
class Take:
    """One `recv` as the transactions that wake it see it: it belongs to the turn it was first asked in.

    Its key, too, holds in one turn: what another turn was given with it was leased by that one.
    """

    agent: AgentName
    limit: int
    key: str
    limits: Limits
    turn: int | None = field(default=None, init=False)

    def __call__(self, tx: Transaction, last: bool = False) -> dict[str, Any] | None:
        sql = "SELECT id FROM turns WHERE agent = ? AND state = 'running'"
        running = tx.execute(sql, (self.agent,)).fetchone()
        if running is None or self.turn not in (None, running["id"]):
            raise Refusal("refused", "cannot receive: no turn runs; messages are taken in a turn")
        turn = self.turn = int(running["id"])
        tx.execute(_FORGET_OTHER_TURNS, (self.agent, self.key, turn))
        known = first_answer(tx, self.agent, self.key, "recv")
        due = [] if known else _within(_due(tx, self.agent, self.limit, self.limits), RECV_BYTES)
        if not (known or due or last):
            return None
        taken = known or once(tx, self.agent, self.key, "recv", lambda: self._lease_more(tx, turn, due))
        return {name: taken[name] for name in ("messages", "waiting")}

    def undo(self, tx: Transaction) -> None:
        """Let what was taken wait again, as though it had never been handed out: also what its turn acked unseen."""
        if self.turn is None:
            return
        taken = first_answer(tx, self.agent, self.key, "recv")
        given = [(message["id"], self.agent, self.turn) for message in taken["messages"]] if taken else []
        for message_id, agent, turn in given:
            back = tx.execute(
                "UPDATE deliveries SET state = 'queued', attempts = attempts - 1, turn_id = NULL, settled_at_ms = NULL,"
                " note = iif(state = 'acked', NULL, note)"
                " WHERE message_id = ? AND recipient = ? AND turn_id = ? AND state IN ('leased', 'acked')",
                (message_id, agent, turn),
            )
            if back.rowcount:
                tx.execute("DELETE FROM leases WHERE turn_id = ? AND message_id = ?", (turn, message_id))
                tx.emit("message_put_back", SYSTEM, agent, about=message_id, message=message_id, turn=turn)
        tx.execute("DELETE FROM tool_calls WHERE agent = ? AND key = ?", (self.agent, self.key))
        if given:
            forget_depth(tx, self.agent)
            tx.wake(mail(self.agent))

    def _lease_more(self, tx: Transaction, turn: int, due: list[sqlite3.Row]) -> dict[str, Any]:
        if due:
            _mark_leased(tx, self.agent, turn, due)
            deepest = max(due, key=lambda row: row["hops"])
            tx.execute(
                "UPDATE turns SET chain_id = ?, hops = ? WHERE id = ? AND hops < ?",
                (deepest["chain_id"], deepest["hops"], turn, deepest["hops"]),
            )
            tx.emit("messages_taken", self.agent, self.agent, turn=turn, messages=[row["id"] for row in due])
        shown = [_for_agent(row, row["attempts"] + 1) for row in due]
        return {"messages": shown, "waiting": _waiting(tx, self.agent), "turn": turn}


_FORGET_OTHER_TURNS = """
    DELETE FROM tool_calls WHERE agent = ? AND key = ? AND tool = 'recv' AND result ->> 'turn' != ?
"""
_WHAT = f"""
    m.id, m.sender, m.body, m.body_bytes, m.body_sha256, m.in_reply_to, m.cause, m.cause_id, m.chain_id, m.hops,
    m.sent_at_ms, d.attempts, (SELECT a.pronouns FROM agents a WHERE a.name = m.sender) AS pronouns,
    {FILES}
"""
_MAIL = f"SELECT {_WHAT} FROM deliveries d{{index}} JOIN messages m ON m.id = d.message_id"
_ONE_MAIL = f"{_MAIL.format(index='')} WHERE d.recipient = ? AND d.message_id = ?"
_IS_DUE = f"""
    d.recipient = :agent AND d.state = 'queued' AND {IS_DUE}
"""
_FIRST_DUE = f"""
    SELECT d.message_id FROM deliveries d INDEXED BY deliveries_queued WHERE {_IS_DUE} ORDER BY d.message_id LIMIT 1
"""
_DUE_MAIL = f"""
    {_MAIL.format(index=" INDEXED BY deliveries_queued")} WHERE {_IS_DUE} ORDER BY d.message_id LIMIT :limit
"""
# All that a lease asks for: the agent, the turn that it may have, and the first message that is due.
_SEAT = f"""
    SELECT wanted, settings, session, refused, rests_until_ms, agents.errand, agents.errand_by,
           chosen_model, chosen_effort, t.id AS turn_id, t.fence, t.message_id AS begun_with, t.errand AS turn_errand,
           (SELECT count(*) FROM deliveries INDEXED BY deliveries_queued
            WHERE recipient = name AND state = 'queued') AS queued,
           {_WHAT}
    FROM agents LEFT JOIN turns t ON t.agent = name AND t.state = 'running'
    LEFT JOIN deliveries d ON d.recipient = name AND d.message_id = ({_FIRST_DUE})
    LEFT JOIN messages m ON m.id = d.message_id
    WHERE name = :agent
"""
_LEAST_HANDED_OUT = f"""
    SELECT d.message_id FROM deliveries d INDEXED BY deliveries_queued WHERE {_IS_DUE}
    ORDER BY d.attempts, d.message_id LIMIT 1
"""


def _due(tx: Transaction, agent: str, limit: int, limits: Limits) -> list[sqlite3.Row]:
    given = {"agent": agent, "now": tx.now_ms, "far": far_ms(limits), "limit": limit}
    return tx.execute(_DUE_MAIL, given).fetchall()


def _rests(tx: Transaction, seat: sqlite3.Row, limits: Limits) -> bool:
    until_ms = seat["rests_until_ms"]
    return until_ms is not None and tx.now_ms < until_ms <= tx.now_ms + agent_far_ms(limits)


def _first_due(tx: Transaction, agent: str, seat: sqlite3.Row, limits: Limits) -> sqlite3.Row | None:
    """The message for the agent's next turn, where there is one.

    After a rest it is the one that was handed out least often: the message whose turn had to wait has rested too, and
    were it always the next, a turn that has to wait for the message's own sake would keep all others back.
    """
    if seat["id"] is None:
        return None
    if seat["rests_until_ms"] is None:
        return seat
    given = {"agent": agent, "now": tx.now_ms, "far": far_ms(limits)}
    least = tx.execute(_LEAST_HANDED_OUT, given).fetchone()
    first: sqlite3.Row = tx.execute(_ONE_MAIL, (agent, least["message_id"])).fetchone()
    return first


def _within(rows: list[sqlite3.Row], limit_bytes: int) -> list[sqlite3.Row]:
    """The first rows whose bodies together stay within the limit; one at least."""
    size = 0
    for count, row in enumerate(rows):
        size += len(row["body"].encode())
        if count and size > limit_bytes:
            return rows[:count]
    return rows


def _mark_leased(tx: Transaction, agent: str, turn_id: int, due: list[sqlite3.Row]) -> None:
    tx.executemany(
        "UPDATE deliveries SET state = 'leased', attempts = attempts + 1, turn_id = ?"
        " WHERE message_id = ? AND recipient = ?",
        [(turn_id, row["id"], agent) for row in due],
    )
    leases = [(turn_id, row["id"], row["attempts"] + 1, tx.now_ms) for row in due]
    tx.insert("leases", ("turn_id", "message_id", "attempt", "at_ms"), leases)


def _waiting(tx: Transaction, agent: str) -> int:
    sql = "SELECT count(*) AS n FROM deliveries INDEXED BY deliveries_queued WHERE recipient = ? AND state = 'queued'"
    return int(tx.execute(sql, (agent,)).fetchone()["n"])


def _for_agent(row: sqlite3.Row, attempt: int) -> dict[str, Any]:
    """A message as the agent sees it; a body that goes on elsewhere says so by its size."""
    keys = ("id", "sender", "body", "in_reply_to", "sent_at_ms", "cause", "cause_id")
    more = {"body_bytes": row["body_bytes"]} if row["body_sha256"] else {}
    more |= {"pronouns": row["pronouns"]} if row["pronouns"] else {}
    more |= {"files": files} if (files := files_of(row["files"])) else {}
    return {**{key: row[key] for key in keys}, "attempt": attempt, **more}
