"""Messages and the turns that take them: leases with a fence, acks, what comes back and what is given up.

The promise: when `send` has answered, the message is on disk; it is handed to a turn at least once, and a turn that
did not end well puts it back. An agent runs one turn at a time, and the turn's fence proves who speaks for it.

    held ── released ──▶ queued ── leased by a turn ──▶ acked
      │                    ▲  └──── failed, after a rest ─┤
      └── dropped          └──────── requeued ── dead ◀──┘ after `tries`
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import outcome
import trio

from hive_core import question_ends
from hive_core.archive import newest_of_agent
from hive_core.bodies import Bodies, is_large, piece
from hive_core.limits import Limits
from hive_core.post import AT_ONCE, Cause, Letter, forget_depth, post, put_message
from hive_core.protocol.call_key import CallKey
from hive_core.protocol.harness import OUTCOMES
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted, quoted
from hive_core.protocol.words import OPERATOR, SYSTEM, AgentName, MessageBody
from hive_core.store.bus import RESTING, mail
from hive_core.store.door import Store
from hive_core.store.schema import StoreBusy, StoreError
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)

RECV_LIMIT = 32
RECV_BYTES = 128 * 1024  # of bodies in one answer, but one message always: programs cut long answers of tools
RECV_WAIT_LIMIT_S = 180.0
REST_MOST_S = 3600.0  # where doubling ends
TOOL_CALL_KEPT_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as its harness knows it: the fence shows that the lease is still its own."""

    id: int
    fence: str


class Lease(NamedTuple):
    """What a turn begins with."""

    turn: Turn
    message: dict[str, Any]  # protocol.harness.LeasedMessage
    waiting: int  # how many more messages wait
    refused: int  # how many the agent's full inbox did not take, ever
    settings: dict[str, Any] | None
    session: str | None


@dataclass(frozen=True, slots=True)
class Acked:
    """What an ack did. counted False: the turn was not running any more, and nothing has changed."""

    counted: bool
    paused: bool = False
    lease: Lease | None = None  # the next turn, where one was asked for and a message was due


class Found(NamedTuple):
    """The turns of an agent whose harness says hello."""

    alive: int | None  # the turn that it holds
    lost: list[int]


class _Ending(NamedTuple):
    outcome: str
    error: str | None = None
    usage: object = None
    session: str | None = None
    on_purpose: bool = False  # by whoever ended the agent: nothing that it has to rest from


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


class Broker:
    """chance: for the jitter of rests; given by a test that wants the same again. Without `bodies` all stand inline."""

    def __init__(
        self,
        store: Store,
        limits: Limits | None = None,
        chance: random.Random | None = None,
        bodies: Bodies | None = None,
    ) -> None:
        self._store = store
        self._bodies = bodies
        self.limits = limits or Limits()
        self._chance = chance or random.Random()
        self._heard: dict[int, tuple[AgentName, float]] = {}  # running turn → its agent, when its harness last spoke
        self._post_all = self._post  # one object, so that the sends of a batch find each other

    # -- sending ------------------------------------------------------------------------------------------------------

    async def send(
        self,
        sender: AgentName,
        recipients: AgentName | Sequence[AgentName],
        body: MessageBody,
        in_reply_to: int | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Send one message; `{"message": id}` once it is on disk, with `held` for whom it waits for the operator.

        A repeated `key` gets the first answer, if it is the same message. Raises Refusal, and then nobody got it.
        """
        to = (recipients,) if isinstance(recipients, str) else tuple(recipients)
        letter = Letter(sender, to, body, in_reply_to, key)
        if self._bodies is None or not is_large(body):
            return await self._store.write_together(self._post_all, letter)
        async with self._bodies.kept(body) as kept:
            letter = replace(letter, body=kept.beginning, file=kept.file)
            return await self._store.write_together(self._post_all, letter)

    def _post(self, tx: Transaction, letters: list[Letter]) -> list[outcome.Outcome[dict[str, Any]]]:
        return post(tx, letters, self.limits)

    # -- turns --------------------------------------------------------------------------------------------------------

    async def lease(self, agent: AgentName, fence: str | None = None) -> Lease:
        """Wait for a message of `agent` and begin a turn with it; asked again with its `fence`, the same turn.

        Cancelling it may leave a begun turn behind; the harness's next hello closes that as lost.
        Raises Refusal("conflict") while another turn of the agent runs.
        """
        asked = fence or secrets.token_hex(8)
        begin = partial(_lease, agent=agent, fence=asked, limits=self.limits)
        return self._note(agent, await self._store.write_when(mail(agent), begin))

    async def ack(
        self,
        agent: AgentName,
        turn: Turn,
        outcome: str,
        error: str | None = None,
        usage: object = None,
        session: str | None = None,
        next_fence: str | None = None,
    ) -> Acked:
        """End a turn: `done` and `cancelled` ack what it leased, `failed` puts it back, `waiting` without a try.

        What made one turn wait would make the next one wait, so the agent rests too, as long as a message does.
        With `next_fence` the same transaction begins the next turn, if a message is due. The same ack again gets the
        same answer; the ack of a turn that was taken away counts for nothing.
        """
        if outcome not in OUTCOMES:
            raise Refusal("usage", f"cannot end the turn: its outcome must be one of {', '.join(sorted(OUTCOMES))}")
        ending = _Ending(outcome, error, usage, session)
        acked = await self._store.write(lambda tx: self._ack(tx, agent, turn, ending, next_fence))
        if acked.counted:
            self._heard.pop(turn.id, None)
        if acked.lease is not None:
            self._note(agent, acked.lease)
        return acked

    def _ack(self, tx: Transaction, agent: AgentName, turn: Turn, ending: _Ending, next_fence: str | None) -> Acked:
        sql = "SELECT state, wanted FROM turns JOIN agents ON name = agent WHERE id = ? AND agent = ? AND fence = ?"
        row = tx.execute(sql, (turn.id, agent, turn.fence)).fetchone()
        if row is None or row["state"] not in ("running", ending.outcome):
            return Acked(False)
        if row["state"] == "running":
            self.end_turn(tx, agent, turn.id, ending)
        try:
            lease = _lease(tx, agent, next_fence, self.limits) if next_fence else None
        except Refusal:
            lease = None  # an old ack, sent again: another turn runs by now
        return Acked(True, row["wanted"] == "paused", lease)

    async def recv(self, agent: AgentName, limit: int, wait_s: float, key: str | None = None) -> dict[str, Any]:
        """Lease up to `limit` more messages under the turn that runs; wait up to `wait_s` for the first.

        Returns {"messages": [...], "waiting": n}. Raises Refusal("refused") outside a turn, and when the turn ends
        while this waits: what comes then belongs to the next turn. When this is cancelled without a `key`, what it has
        taken waits again: nobody saw it.
        """
        # The wait may end just when a commit has taken some: asked again with the key, they are the same.
        take = _Take(agent, limit, key or f"recv-{secrets.token_hex(8)}", self.limits)
        try:
            with trio.move_on_after(wait_s):
                if wait_s > 0:
                    return await self._store.write_when(mail(agent), take)
            taken = await self._store.write(partial(take, last=True))
        except trio.Cancelled:
            if key is None:
                with trio.CancelScope(shield=True), suppress(StoreError, StoreBusy):
                    await self._store.write(take.undo)
            raise
        assert taken is not None
        return taken

    async def cancel_turn(self, agent: AgentName, actor: AgentName) -> int:
        """End the running turn for good: its messages are acked as cancelled. Its number; Refusal when none runs.

        The harness learns of it with its next word and ends the program; what it says of the turn counts no more.
        """

        def write(tx: Transaction) -> int:
            row = tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone()
            if row is None:
                raise Refusal("not_found", f"cannot cancel: no turn of {agent} runs")
            self.end_turn(tx, agent, row["id"], _Ending("cancelled", f"cancelled by {actor}"))
            return int(row["id"])

        turn_id = await self._store.write(write)
        self._heard.pop(turn_id, None)
        return turn_id

    async def close_lost_turns(self, agent: AgentName, fences: Sequence[str] = ()) -> Found:
        """What a harness finds that says hello: its own turn by one of its `fences`; any other is closed as lost."""

        def write(tx: Transaction) -> Found:
            rows = tx.execute("SELECT id, fence FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchall()
            lost = [int(row["id"]) for row in rows if row["fence"] not in fences]
            for turn_id in lost:
                self.end_turn(tx, agent, turn_id, _Ending("lost", "its harness went away"))
            return Found(next((int(row["id"]) for row in rows if row["fence"] in fences), None), lost)

        found = await self._store.write(write)
        for turn_id in found.lost:
            self._heard.pop(turn_id, None)
        if found.alive is not None:
            self._heard[found.alive] = (agent, trio.current_time())
        return found

    def put_back(self, tx: Transaction, agent: AgentName) -> None:
        """Close the running turn of an agent that was ended on purpose: its messages wait, and no try is counted."""
        row = tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone()
        if row is not None:
            self.end_turn(tx, agent, row["id"], _Ending("waiting", "its agent was ended on purpose", on_purpose=True))

    def renew(self, agent: AgentName, turn_id: int) -> bool:
        """Note that the harness of a turn lives. False when no such turn of `agent` runs any more."""
        if self._heard.get(turn_id, ("", 0.0))[0] != agent:
            return False
        self._heard[turn_id] = (agent, trio.current_time())
        return True

    async def serve_leases(self) -> None:
        """Take turns away from harnesses that are silent for too long, until cancelled.

        A turn that nobody was heard of yet gets the same time from its first sight on: one of the daemon before, or
        one that was begun for a harness that had just left.
        """
        while True:
            for row in await self._store.rows("SELECT id, agent FROM turns WHERE state = 'running'"):
                self._heard.setdefault(row["id"], (row["agent"], trio.current_time()))
            now, silence_s = trio.current_time(), self.limits.lease_silence_s
            silent = [(turn, agent) for turn, (agent, heard) in self._heard.items() if now - heard >= silence_s]
            for turn_id, agent in silent:
                # Forgotten behind the commit: a harness that is told so while the turn still runs would ack it.
                await self._lose(turn_id, agent)
                self._heard.pop(turn_id, None)
            await trio.sleep(silence_s / 4)

    async def _lose(self, turn_id: int, agent: AgentName) -> None:
        silence_s = self.limits.lease_silence_s

        def write(tx: Transaction) -> bool:
            if tx.execute("SELECT 1 FROM turns WHERE id = ? AND state = 'running'", (turn_id,)).fetchone() is None:
                return False
            self.end_turn(tx, agent, turn_id, _Ending("lost", f"its harness was silent for {silence_s:.0f} s"))
            return True

        if await self._store.insist(write):
            log.warning("turn %d of %s was taken away: its harness is silent", turn_id, agent, extra={"agent": agent})

    def _note(self, agent: AgentName, lease: Lease) -> Lease:
        self._heard[lease.turn.id] = (agent, trio.current_time())
        return lease

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: _Ending) -> None:
        """Close a running turn and settle every message it leased, by one rule for all ways to end."""
        usage = json.dumps(ending.usage) if ending.usage is not None else None
        tx.execute(
            "UPDATE turns SET state = ?, ended_at_ms = ?, error = ?, usage = ? WHERE id = ?",
            (ending.outcome, tx.now_ms, ending.error, usage, turn_id),
        )
        rest_s = _provider_rest_s(self.limits, self._chance.random())
        rests_until = tx.now_ms + int(rest_s * 1000) if ending.outcome == "waiting" and not ending.on_purpose else None
        tx.execute(
            "UPDATE agents SET session = coalesce(?, session), rests_until_ms = ? WHERE name = ?",
            (ending.session or None, rests_until, agent),
        )
        dead = []
        for row in tx.execute(_LEASED, (turn_id,)).fetchall():
            end = settle(ending.outcome, row["failures"], self.limits, self._chance.random())
            settled_at = None if end.state == "queued" else tx.now_ms
            due_at = tx.now_ms + int(end.rest_s * 1000) if end.rest_s else AT_ONCE
            note = {"cancelled": "cancelled", "done": None}.get(ending.outcome, ending.error)
            tx.execute(
                "UPDATE deliveries SET state = ?, failures = ?, available_at_ms = ?, settled_at_ms = ?, note = ?"
                " WHERE message_id = ? AND recipient = ?",
                (end.state, end.failures, due_at, settled_at, note, row["message_id"], agent),
            )
            if end.rest_s > 0:
                tx.wake(RESTING)
            if end.state == "dead":
                dead.append((row["message_id"], end.failures))
        forget_depth(tx, agent)
        tx.emit("turn_ended", agent, agent, turn=turn_id, state=ending.outcome, error=ending.error)
        for message_id, failures in dead:
            tx.emit("message_dead", SYSTEM, agent, about=message_id, message=message_id, attempts=failures)
            self._tell_sender(tx, agent, message_id, failures, ending.error)
        tx.wake(mail(agent))

    def _tell_sender(self, tx: Transaction, agent: str, message_id: int, failures: int, error: str | None) -> None:
        """Whoever sent a message that is dead now reads so; the hive itself needs no letter."""
        sql = "SELECT sender, chain_id, hops FROM messages WHERE id = ?"
        row = tx.execute(sql, (message_id,)).fetchone()
        if row["sender"] != SYSTEM:
            turns = counted(failures, "failed turn")
            text = f"message_dead: your message {message_id} to {agent} was given up after {turns}."
            cause = Cause("system", None, row["chain_id"], row["hops"] + 1)
            body = MessageBody(f"{text} The last one ended with {quoted(error)}" if error else text)
            put_message(tx, SYSTEM, row["sender"], body, message_id, cause, self.limits)

    # -- what the operator does to messages ---------------------------------------------------------------------------

    async def aside(self, state: str, limit: int = 50) -> list[dict[str, Any]]:
        """The oldest messages that are `dead` or `held`, each with its recipient and why."""
        # The state stands in the text: an index of held or dead ones alone is taken for no other query.
        assert state in ("dead", "held")
        sql = f"""
            SELECT m.id, d.sender, d.recipient, m.body, m.body_bytes, m.sent_at_ms, d.attempts, d.failures, d.held,
                   d.note, d.settled_at_ms, m.chain_id, m.hops
            FROM deliveries d INDEXED BY deliveries_{state} JOIN messages m ON m.id = d.message_id
            WHERE d.state = '{state}'
            ORDER BY d.message_id LIMIT ?
        """
        return [dict(row) for row in await self._store.rows(sql, (limit,))]

    async def requeue(self, message_id: int, actor: AgentName) -> list[str]:
        """Give a dead message all its tries again. Returns its recipients; Refusal when it is dead for nobody."""
        return await self._move(message_id, actor, ("dead",), "requeue")

    async def release(self, message_id: int, actor: AgentName) -> list[str]:
        """Let a held message go; the chain begins anew with it. Returns its recipients; Refusal when none holds it."""
        return await self._move(message_id, actor, ("held",), "release")

    async def drop(self, message_id: int, actor: AgentName) -> list[str]:
        """Put a dead or held message away. Returns whom it will not reach; Refusal when there is none."""
        return await self._move(message_id, actor, ("dead", "held"), "drop")

    async def _move(self, message_id: int, actor: AgentName, states: tuple[str, ...], verb: str) -> list[str]:
        state, event = {
            "requeue": ("queued", "message_requeued"),
            "release": ("queued", "message_released"),
            "drop": ("dropped", "message_dropped"),
        }[verb]

        def write(tx: Transaction) -> list[str]:
            sql = "SELECT recipient FROM deliveries WHERE message_id = ? AND state IN (SELECT value FROM json_each(?))"
            names = [row[0] for row in tx.execute(sql, (message_id, json.dumps(states))).fetchall()]
            if not names:
                raise Refusal("not_found", f"cannot {verb} message {message_id}: it is not {' or '.join(states)}")
            tx.executemany(
                "UPDATE deliveries SET state = ?, failures = 0, available_at_ms = ?, settled_at_ms = ?"
                " WHERE message_id = ? AND recipient = ?",
                [(state, AT_ONCE, tx.now_ms if state == "dropped" else None, message_id, name) for name in names],
            )
            chain: dict[str, int] = {}  # that it was of so far: `explain` tells it
            if verb == "release":
                sql = "SELECT chain_id AS chain, hops FROM messages WHERE id = ?"
                chain = dict(tx.execute(sql, (message_id,)).fetchone())
                tx.execute("UPDATE messages SET chain_id = id, hops = 0 WHERE id = ?", (message_id,))
            for name in names:
                tx.emit(event, actor, name, about=message_id, message=message_id, **chain)
                forget_depth(tx, name)
                tx.wake(mail(name))
            if verb == "drop":
                question_ends.drop_message(tx, message_id, self.limits)
            return names

        return await self._store.write(write)

    # -- reading ------------------------------------------------------------------------------------------------------

    async def messages(
        self, agent: str | None = None, limit: int = 50, before: int | None = None
    ) -> list[dict[str, Any]]:
        """The newest messages (to or from `agent`), newest last, one for each recipient with its state."""
        given: dict[str, Any] = {"agent": agent, "before": before or 2**62, "limit": limit}
        newest = "SELECT id FROM messages WHERE id < :before ORDER BY id DESC LIMIT :limit"
        if agent is not None:
            given["numbers"] = json.dumps(await newest_of_agent(self._store, agent, given["before"], limit))
            newest = "SELECT value FROM json_each(:numbers)"
        sql = f"""
            SELECT * FROM (
              SELECT m.id, m.sender, d.recipient, m.body, m.body_bytes, m.in_reply_to, m.cause, m.cause_id,
                     m.sent_at_ms, d.state, d.attempts, d.held, d.note, d.turn_id
              FROM messages m JOIN deliveries d ON d.message_id = m.id
              WHERE m.id IN ({newest}) AND (:agent IS NULL OR m.sender = :agent OR d.recipient = :agent)
              ORDER BY m.id DESC, d.recipient DESC LIMIT :limit
            ) ORDER BY id, recipient
        """
        rows = await self._store.rows(sql, given)
        return [dict(row) for row in rows]

    async def read_body(self, message_id: int, offset: int = 0, reader: AgentName | None = None) -> dict[str, Any]:
        """Some of a body from byte `offset`: {"body", "next_offset", "bytes"}; next_offset None at its end.

        `reader` may have sent it, or have been handed it; None is the operator, who reads all. Raises Refusal.
        """
        sql = """
            SELECT body, body_bytes, body_sha256 FROM messages m WHERE id = :id AND (
                :reader IS NULL OR sender = :reader OR EXISTS (
                    SELECT 1 FROM deliveries WHERE message_id = m.id AND recipient = :reader AND attempts > 0))
        """
        row = await self._store.row(sql, {"id": message_id, "reader": reader})
        if row is None:
            why = "there is no such message" if reader is None else "you neither sent nor received it"
            raise Refusal("not_found", f"cannot read message {message_id}: {why}")
        body = row["body"]
        if row["body_sha256"]:
            assert self._bodies is not None, "a database with large bodies was opened without them"
            body = await self._bodies.whole(row["body_sha256"])
        some = piece(body.encode(), offset)
        return {"body": some.body, "next_offset": some.next_offset, "bytes": row["body_bytes"]}

    async def message(self, message_id: int) -> dict[str, Any] | None:
        """One message, with the delivery of its first recipient."""
        found = await self.messages(before=min(message_id, 2**62) + 1, limit=1)
        return found[0] if found and found[0]["id"] == message_id else None

    async def inbox(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest messages to the operator, each `unread` until this has returned it once."""
        sql = """
            SELECT m.id, m.sender, m.body, m.body_bytes, m.in_reply_to, m.sent_at_ms, d.state
            FROM deliveries d INDEXED BY deliveries_to_operator JOIN messages m ON m.id = d.message_id
            WHERE d.recipient = 'operator' AND d.state IN ('queued', 'acked') ORDER BY d.message_id DESC LIMIT ?
        """
        rows = [dict(row) for row in reversed(await self._store.rows(sql, (limit,)))]
        unread = [row["id"] for row in rows if row["state"] == "queued"]
        if unread:
            read = (
                "UPDATE deliveries SET state = 'acked', settled_at_ms = ? WHERE recipient = 'operator'"
                " AND state = 'queued' AND message_id = ?"
            )

            def write(tx: Transaction) -> None:
                tx.executemany(read, [(tx.now_ms, message_id) for message_id in unread])
                tx.emit("inbox_read", OPERATOR, messages=unread)

            await self._store.write(write)
        return [{**row, "unread": row.pop("state") == "queued"} for row in rows]

    async def unread(self) -> int:
        """How many messages to the operator `inbox` has not returned yet."""
        row = await self._store.row(
            "SELECT count(*) AS n FROM deliveries INDEXED BY deliveries_queued"
            " WHERE recipient = 'operator' AND state = 'queued'"
        )
        return int(row["n"]) if row else 0

    async def sweep_bodies(self) -> None:
        """Remove the files of large bodies that no message refers to any more."""
        if self._bodies is not None:
            await self._bodies.sweep()

    async def forget_old_tool_calls(self) -> None:
        sql = """
            DELETE FROM tool_calls WHERE (agent, key) IN (
                SELECT agent, key FROM tool_calls WHERE at_ms < ? LIMIT 500
            )
        """
        while await self._store.insist(lambda tx: tx.execute(sql, (tx.now_ms - TOOL_CALL_KEPT_S * 1000,)).rowcount):
            pass  # in small transactions, between which others write


class Settled(NamedTuple):
    state: str
    failures: int
    rest_s: float


def settle(turn_state: str, failures: int, limits: Limits, chance: float) -> Settled:
    """What becomes of a delivery when its turn ends. `chance`, 0 to 1, spreads the rests by half of each."""
    match turn_state:
        case "done" | "cancelled":
            return Settled("acked", failures, 0.0)
        case "waiting":
            return Settled("queued", failures, _provider_rest_s(limits, chance))
        case _ if failures + 1 >= limits.tries:
            return Settled("dead", failures + 1, 0.0)
        case "lost" if failures == 0:
            return Settled("queued", 1, 0.0)
        case _:
            rest_s = min(limits.backoff_s * 2 ** min(failures, 30), max(limits.backoff_s, REST_MOST_S))
            return Settled("queued", failures + 1, rest_s * (0.5 + chance))


def _provider_rest_s(limits: Limits, chance: float) -> float:
    return limits.provider_rest_s * (0.5 + chance)


_LEASED = """
    SELECT d.message_id, d.failures FROM leases l JOIN turns t ON t.id = l.turn_id
    JOIN deliveries d ON d.message_id = l.message_id AND d.recipient = t.agent
    WHERE l.turn_id = ? AND d.state = 'leased'
"""
_SEAT = """
    SELECT wanted, settings, session, refused, rests_until_ms, t.id AS turn_id, t.fence, t.message_id
    FROM agents LEFT JOIN turns t ON t.agent = name AND t.state = 'running' WHERE name = ?
"""


def _lease(tx: Transaction, agent: AgentName, fence: str, limits: Limits) -> Lease | None:
    """Begin a turn with the first message that is due, or find the one that this fence began already."""
    seat = tx.execute(_SEAT, (agent,)).fetchone()
    if seat is None:
        return None
    if seat["turn_id"] is not None:
        if seat["fence"] != fence:
            raise Refusal("conflict", f"cannot lease: turn {seat['turn_id']} of {agent} still runs; ack it first")
        (message,) = tx.execute(_ONE_MAIL, (agent, seat["message_id"])).fetchall()
        return _as_lease(tx, agent, seat, Turn(seat["turn_id"], fence), message, message["attempts"])
    due = _first_due(tx, agent, seat["rests_until_ms"], limits) if seat["wanted"] == "up" else []
    if not due:
        return None
    (first,) = due
    cursor = tx.execute(
        "INSERT INTO turns (agent, fence, state, message_id, chain_id, hops, started_at_ms)"
        " VALUES (?, ?, 'running', ?, ?, ?, ?)",
        (agent, fence, first["id"], first["chain_id"], first["hops"], tx.now_ms),
    )
    assert cursor.lastrowid is not None
    turn = Turn(cursor.lastrowid, fence)
    _mark_leased(tx, agent, turn.id, due)
    tx.emit("turn_started", agent, agent, turn=turn.id, message=first["id"])
    return _as_lease(tx, agent, seat, turn, first, first["attempts"] + 1)


def _as_lease(tx: Transaction, agent: str, seat: sqlite3.Row, turn: Turn, message: sqlite3.Row, attempt: int) -> Lease:
    settings = json.loads(seat["settings"]) if seat["settings"] else None
    shown = _for_agent(message, attempt)
    return Lease(turn, shown, _waiting(tx, agent), seat["refused"], settings, seat["session"])


@dataclass(slots=True)
class _Take:
    """One `recv` as the transactions that wake it see it: it belongs to the turn it was first asked in."""

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
        known = first_answer(tx, self.agent, self.key, "recv")
        due = [] if known else _within(_due(tx, self.agent, self.limit, self.limits), RECV_BYTES)
        if known or not (due or last):
            return known
        return once(tx, self.agent, self.key, "recv", lambda: self._lease_more(tx, turn, due))

    def undo(self, tx: Transaction) -> None:
        """Let what was taken wait again, as though it had never been handed out."""
        taken = first_answer(tx, self.agent, self.key, "recv")
        given = [(message["id"], self.agent, self.turn) for message in taken["messages"]] if taken else []
        for message_id, agent, turn in given:
            back = tx.execute(
                "UPDATE deliveries SET state = 'queued', attempts = attempts - 1, turn_id = NULL"
                " WHERE message_id = ? AND recipient = ? AND turn_id = ? AND state = 'leased'",
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
        return {"messages": shown, "waiting": _waiting(tx, self.agent)}


_MAIL = """
    SELECT m.id, m.sender, m.body, m.body_bytes, m.body_sha256, m.in_reply_to, m.cause, m.cause_id, m.chain_id, m.hops,
           m.sent_at_ms, d.attempts
    FROM deliveries d{index} JOIN messages m ON m.id = d.message_id
"""


_ONE_MAIL = f"{_MAIL.format(index='')} WHERE d.recipient = ? AND d.message_id = ?"
_IS_DUE = """
    d.recipient = :agent AND d.state = 'queued'
    AND (d.attempts = 0 OR d.available_at_ms <= :now OR d.available_at_ms > :now + :far)
"""
_DUE_MAIL = f"""
    {_MAIL.format(index=" INDEXED BY deliveries_queued")} WHERE {_IS_DUE} ORDER BY d.message_id LIMIT :limit
"""
_LEAST_HANDED_OUT = f"""
    SELECT d.message_id FROM deliveries d INDEXED BY deliveries_queued WHERE {_IS_DUE}
    ORDER BY d.attempts, d.message_id LIMIT 1
"""


def _far_ms(limits: Limits) -> float:
    """No rest of a message is longer: what is due later was put back before the clock was set back, and is due now."""
    return max(limits.provider_rest_s, limits.backoff_s, REST_MOST_S) * 1500


def _agent_far_ms(limits: Limits) -> float:
    return limits.provider_rest_s * 1500


def _due(tx: Transaction, agent: str, limit: int, limits: Limits) -> list[sqlite3.Row]:
    given = {"agent": agent, "now": tx.now_ms, "far": _far_ms(limits), "limit": limit}
    return tx.execute(_DUE_MAIL, given).fetchall()


def _first_due(tx: Transaction, agent: str, rests_until_ms: int | None, limits: Limits) -> list[sqlite3.Row]:
    """The message for the agent's next turn, where there is one and the agent does not rest.

    After a rest it is the one that was handed out least often: the message whose turn had to wait has rested too, and
    were it always the next, a turn that has to wait for the message's own sake would keep all others back.
    """
    if rests_until_ms is None:
        return _due(tx, agent, 1, limits)
    if tx.now_ms < rests_until_ms <= tx.now_ms + _agent_far_ms(limits):
        return []
    given = {"agent": agent, "now": tx.now_ms, "far": _far_ms(limits)}
    least = tx.execute(_LEAST_HANDED_OUT, given).fetchone()
    return tx.execute(_ONE_MAIL, (agent, least["message_id"])).fetchall() if least else []


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
    return {**{key: row[key] for key in keys}, "attempt": attempt, **more}


class Rests:
    """What rests, for the hive's clock: an agent is woken when it has rested, or one of its messages has."""

    topic = RESTING

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()

    def next_after(self, tx: Transaction) -> int | None:
        sql = """
            SELECT min(at_ms) FROM (
                SELECT min(available_at_ms) AS at_ms FROM deliveries
                WHERE state = 'queued' AND attempts > 0 AND available_at_ms > :now
                UNION ALL SELECT min(rests_until_ms) FROM agents WHERE rests_until_ms > :now
            )
        """
        at: int | None = tx.execute(sql, {"now": tx.now_ms}).fetchone()[0]
        return at

    def fire(self, tx: Transaction) -> None:
        sql = """
            SELECT recipient FROM deliveries INDEXED BY deliveries_resting
            WHERE state = 'queued' AND attempts > 0 AND (available_at_ms <= :now OR available_at_ms > :now + :far)
            UNION SELECT name FROM agents WHERE rests_until_ms <= :now OR rests_until_ms > :now + :agent_far
        """
        given = {"now": tx.now_ms, "far": _far_ms(self._limits), "agent_far": _agent_far_ms(self._limits)}
        for row in tx.execute(sql, given).fetchall():
            tx.wake(mail(row["recipient"]))
