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
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import outcome
import trio

from hive_core.limits import Limits
from hive_core.prices import load_prices
from hive_core.protocol.harness import OUTCOMES, REASONS
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import EVERYONE, FORGE, SYSTEM, AgentName, MessageBody
from hive_core.services.access import Access
from hive_core.services.attachments import Upload
from hive_core.services.bodies import Bodies, is_large
from hive_core.services.file_delivery import FileDelivery
from hive_core.services.leases import Lease, Take, Turn, begin_turn
from hive_core.services.ledger import Ledger
from hive_core.services.messages import Messages
from hive_core.services.notices import notice
from hive_core.services.post import AT_ONCE, Cause, Letter, forget_depth, post, put_message
from hive_core.services.rests import OWN_TRIES, own_rest_s, provider_rest_s, settle
from hive_core.services.turn_ends import Told, TurnEnd, end_seat, too_full
from hive_core.store.bus import RESTING, TURN_ENDS, mail
from hive_core.store.door import Store
from hive_core.store.errors import StoreError
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)

RECV_LIMIT = 32
RECV_WAIT_LIMIT_S = 180.0
UNDO_WAIT_S = 30.0  # the end of a daemon waits as long
ENDED_KEPT = 1_000  # turns: whoever was answered in the same commit has heard of it long before


@dataclass(frozen=True, slots=True)
class Acked:
    """What an ack did. counted False: the turn was not running any more, and nothing has changed."""

    counted: bool
    lease: Lease | None = None  # the next turn, where one was asked for and a message was due


class Found(NamedTuple):
    """The turns of an agent whose harness says hello."""

    alive: int | None  # the turn that it holds
    lost: list[int]


class Broker:
    """Without `bodies` all stand inline, and no files come with them; `delivery` lays those before the agents.

    chance  for the jitter of rests; given by a test that wants the same again
    silent  hears of an agent whose turn was taken away because its harness said nothing, and for how many seconds
    """

    def __init__(
        self,
        store: Store,
        limits: Limits | None = None,
        chance: random.Random | None = None,
        bodies: Bodies | None = None,
        access: Access | None = None,
        ledger: Ledger | None = None,
        silent: Callable[[AgentName, float], None] = lambda *_: None,
        delivery: FileDelivery | None = None,
    ) -> None:
        self._store = store
        access = access or Access(store.bus)
        self._closed, self._no_turn = access.closed, access.no_turn
        self.bodies = bodies
        self._delivery = delivery
        self.limits = limits or Limits()
        self.messages = Messages(store, self.limits, bodies)
        self.ledger = ledger or Ledger(store, access, load_prices(), self.limits)
        self._chance = chance or random.Random()
        self._silent = silent
        self._heard: dict[int, tuple[AgentName, float]] = {}  # running turn → its agent, when its harness last spoke
        self._ended: dict[int, None] = {}  # turns that ended lately, the oldest first
        self._post_all = self._post  # one object, so that the sends of a batch find each other

    # -- sending ------------------------------------------------------------------------------------------------------

    async def send(
        self,
        sender: AgentName,
        recipients: AgentName | Sequence[AgentName],
        body: MessageBody,
        in_reply_to: int | None = None,
        key: str | None = None,
        files: Sequence[Upload] = (),
    ) -> dict[str, Any]:
        """Send one message; `{"message": id}` once it is on disk, with `held` for whom it waits for the operator.

        Its files are on disk then too, and told as `files`: what they are called now.

        A repeated `key` gets the first answer, if it is the same message. Raises Refusal, and then nobody got it.
        """
        to = (recipients,) if isinstance(recipients, str) else tuple(recipients)
        letter = Letter(sender, to, body, in_reply_to, key)
        if self.bodies is None or not (files or is_large(body)):
            return await self._store.write_together(self._post_all, letter, self._weight(to))
        async with AsyncExitStack() as kept:
            if files:
                attached = await kept.enter_async_context(self.bodies.kept_files(files, self.limits))
                letter = replace(letter, attached=attached)
            if is_large(body):
                large = await kept.enter_async_context(self.bodies.kept(body))
                letter = replace(letter, body=large.beginning, file=large.file)
            sent = await self._store.write_together(self._post_all, letter, self._weight(to))
        return {**sent, "files": [file.name for file in letter.attached]} if files else sent

    def _weight(self, recipients: Sequence[AgentName]) -> int:
        return self.limits.fan_out if EVERYONE in recipients else len(recipients)

    def _post(self, tx: Transaction, letters: list[Letter]) -> list[outcome.Outcome[dict[str, Any]]]:
        return post(tx, letters, self.limits)

    # -- turns --------------------------------------------------------------------------------------------------------

    async def lease(self, agent: AgentName, fence: str | None = None) -> Lease:
        """Wait for a message of `agent` and begin a turn with it; asked again with its `fence`, the same turn.

        Cancelling it may leave a begun turn behind; the harness's next hello closes that as lost.
        Raises Refusal("conflict") while another turn of the agent runs.
        """
        asked = fence or secrets.token_hex(8)
        begin = partial(self._begin_turn, agent=agent, fence=asked)
        return await self._laid(agent, self._note(agent, await self._store.write_when(mail(agent), begin)))

    async def _laid(self, agent: AgentName, lease: Lease) -> Lease:
        """The lease with the files of its message in place."""
        if self._delivery is None or lease.message is None:
            return lease
        return lease._replace(message=await self._delivery.lay(agent, lease.message))

    async def ack(
        self,
        agent: AgentName,
        turn: Turn,
        outcome: str,
        error: str | None = None,
        usage: object = None,
        session: str | None = None,
        next_fence: str | None = None,
        told: Told = Told(),  # noqa: B008 - it is immutable
    ) -> Acked:
        """End a turn: `done` and `cancelled` ack what it leased, `failed` puts it back, `waiting` without a try.

        What made one turn wait would make the next one wait, so the agent rests too, as long as a message does.
        With `next_fence` the same transaction begins the next turn, if a message is due. The same ack again gets the
        same answer; the ack of a turn that was taken away counts for nothing.
        """
        if outcome not in OUTCOMES:
            raise Refusal("usage", f"cannot end the turn: its outcome must be one of {', '.join(sorted(OUTCOMES))}")
        # What a closed way has cut short rests until it opens, and no longer.
        closed = self._closed(agent) if outcome == "waiting" else None
        if closed is not None and told.reason == "overloaded" and closed.state not in REASONS:
            told = told._replace(reason=closed.state)  # the program took the relay's refusal for the provider's
        ending = TurnEnd(outcome, error, usage, session, closed is not None, closed, told)
        acked = await self._store.write(lambda tx: self._ack(tx, agent, turn, ending, next_fence))
        if acked.counted:
            self._forget(turn.id)
        if acked.lease is not None:
            acked = replace(acked, lease=await self._laid(agent, self._note(agent, acked.lease)))
        return acked

    def _begin_turn(self, tx: Transaction, agent: AgentName, fence: str) -> Lease | None:
        return begin_turn(tx, agent, fence, self.limits, self._no_turn, self.ledger.to_reserve)

    def _ack(self, tx: Transaction, agent: AgentName, turn: Turn, ending: TurnEnd, next_fence: str | None) -> Acked:
        row = tx.execute(_ENDING, (turn.id, agent, turn.fence)).fetchone()
        if row is None or row["state"] not in ("running", ending.outcome):
            return Acked(False)
        if row["state"] == "running":
            may_be = not (row["turn_errand"] or row["errand"] or row["errand_rest"])
            full = may_be and too_full(ending.told, row["compact_at_percent"])
            self.end_turn(tx, agent, turn.id, ending._replace(too_full=full))
        try:
            lease = self._begin_turn(tx, agent, next_fence) if next_fence else None
        except Refusal:
            lease = None  # an old ack, sent again: another turn runs by now
        return Acked(True, lease)

    async def recv(
        self,
        agent: AgentName,
        limit: int,
        wait_s: float,
        key: str | None = None,
        taken_back: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Lease up to `limit` more messages under the turn that runs; wait up to `wait_s` for the first.

        Returns {"messages": [...], "waiting": n}; with the same `key` in the same turn, the same again. Raises
        Refusal("refused") outside a turn, and when the turn ends while this waits: what comes then belongs to the
        next turn.

        What nobody will see waits again, also when the turn has ended meanwhile: when the caller has `taken_back` the
        call, and when this is cancelled without a `key`. Cancelled with one, the answer is kept for the same call
        sent again.
        """
        take = Take(agent, limit, key or f"recv-{secrets.token_hex(8)}", self.limits)
        try:
            taken = await self._taken(take, wait_s)
        except trio.Cancelled:
            if key is None or taken_back():
                await self._undo(take)
            raise
        if taken_back():
            await self._undo(take)
            raise Refusal("refused", "cannot receive: the call was cancelled; its messages wait again")
        if self._delivery is None:
            return taken
        return {**taken, "messages": [await self._delivery.lay(agent, message) for message in taken["messages"]]}

    async def _taken(self, take: Take, wait_s: float) -> dict[str, Any]:
        # The wait may end just when a commit has taken some: asked again with the key, they are the same.
        with trio.move_on_after(wait_s):
            if wait_s > 0:
                return await self._store.write_when(mail(take.agent), take)
        taken = await self._store.write(partial(take, last=True))
        assert taken is not None
        return taken

    async def _undo(self, take: Take) -> None:
        """Undo a take, whoever cancels. It is tried again while the disk takes nothing, but not for ever."""
        with trio.move_on_after(UNDO_WAIT_S, shield=True) as patience, suppress(StoreError):
            await self._store.insist(take.undo)
        if patience.cancelled_caught:
            log.error("what a cancelled recv of %s took stays with its turn: the disk took no write", take.agent)

    async def cancel_turn(self, agent: AgentName, actor: AgentName) -> int:
        """End the running turn for good: its messages are acked as cancelled. Its number; Refusal when none runs.

        The harness learns of it with its next word and ends the program; what it says of the turn counts no more.
        """

        def write(tx: Transaction) -> int:
            row = tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone()
            if row is None:
                raise Refusal("not_found", f"cannot cancel: no turn of {agent} runs")
            self.end_turn(tx, agent, row["id"], TurnEnd("cancelled", f"cancelled by {actor}"))
            return int(row["id"])

        turn_id = await self._store.write(write)
        self._forget(turn_id)
        return turn_id

    async def close_lost_turns(self, agent: AgentName, fences: Sequence[str] = ()) -> Found:
        """What a harness finds that says hello: its own turn by one of its `fences`; any other is closed as lost."""

        def write(tx: Transaction) -> Found:
            rows = tx.execute("SELECT id, fence FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchall()
            lost = [int(row["id"]) for row in rows if row["fence"] not in fences]
            for turn_id in lost:
                self.end_turn(tx, agent, turn_id, TurnEnd("lost", "its harness went away"))
            return Found(next((int(row["id"]) for row in rows if row["fence"] in fences), None), lost)

        found = await self._store.write(write)
        for turn_id in found.lost:
            self._forget(turn_id)
        if found.alive is not None:
            self._runs(agent, found.alive)
        return found

    def put_back(self, tx: Transaction, agent: AgentName) -> None:
        """Close the running turn of an agent that was ended on purpose: its messages wait, and no try is counted."""
        row = tx.execute("SELECT id FROM turns WHERE agent = ? AND state = 'running'", (agent,)).fetchone()
        if row is not None:
            self.end_turn(tx, agent, row["id"], TurnEnd("waiting", "its agent was ended on purpose", on_purpose=True))

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
                if row["id"] not in self._ended:  # while this was read
                    self._heard.setdefault(row["id"], (row["agent"], trio.current_time()))
            now, silence_s = trio.current_time(), self.limits.lease_silence_s
            silent = [(turn, *heard) for turn, heard in self._heard.items() if now - heard[1] >= silence_s]
            if silent:
                # A harness whose request the disk keeps waiting cannot speak meanwhile: it is answered before this is.
                await self._store.insist(lambda tx: None)
                await trio.lowlevel.checkpoint()
            for turn_id, agent, heard in silent:
                # Forgotten behind the commit: a harness that is told so while the turn still runs would ack it.
                if await self._lose(turn_id, agent, heard):
                    self._forget(turn_id)
            await trio.sleep(silence_s / 4)

    async def _lose(self, turn_id: int, agent: AgentName, heard: float) -> bool:
        """Take a turn away, unless its harness was heard again. Whether it runs no more."""
        silence_s = self.limits.lease_silence_s

        def write(tx: Transaction) -> str:
            if self._heard.get(turn_id, (agent, heard))[1] != heard:
                return "heard"
            if tx.execute("SELECT 1 FROM turns WHERE id = ? AND state = 'running'", (turn_id,)).fetchone() is None:
                return "ended"
            self.end_turn(tx, agent, turn_id, TurnEnd("lost", f"its harness was silent for {silence_s:.0f} s"))
            return "lost"

        found = await self._store.insist(write)
        if found == "lost":
            self._silent(agent, silence_s)
            log.warning("turn %d of %s was taken away: its harness is silent", turn_id, agent, extra={"agent": agent})
        return found != "heard"

    def _note(self, agent: AgentName, lease: Lease) -> Lease:
        self._runs(agent, lease.turn.id)
        return lease

    def _runs(self, agent: AgentName, turn_id: int) -> None:
        """Behind the commit that has begun or found a turn. One that has ended it may have been answered before."""
        if turn_id not in self._ended:
            self._heard[turn_id] = (agent, trio.current_time())
            self.ledger.turn_began(agent, turn_id)

    def _forget(self, turn_id: int) -> None:
        """Behind the commit that has ended a turn."""
        self._heard.pop(turn_id, None)
        self._ended[turn_id] = None
        if len(self._ended) > ENDED_KEPT:
            del self._ended[next(iter(self._ended))]
        self.ledger.turn_ended(turn_id)

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: TurnEnd) -> None:
        """Close a running turn and settle every message it leased, by one rule for all ways to end."""
        usage = json.dumps(ending.usage) if ending.usage is not None else None
        tx.execute(
            "UPDATE turns SET state = ?, ended_at_ms = ?, error = ?, reason = ?, usage = ? WHERE id = ?",
            (ending.outcome, tx.now_ms, ending.error, ending.told.reason, usage, turn_id),
        )
        leased = tx.execute(_LEASED, (turn_id,)).fetchall()
        by_own_calls = ending.closed is not None and ending.closed.own > 0
        behind = by_own_calls and any(row["attempts"] > OWN_TRIES for row in leased)
        end_seat(tx, agent, turn_id, ending, provider_rest_s(self.limits, self._chance.random()), behind)
        dead, waits = [], False
        for row in leased:
            refused = ending.told.reason == "refusal"
            chance = self._chance.random()
            end = settle(ending.outcome, row["failures"], self.limits, chance, final=refused)
            settled_at = None if end.state == "queued" else tx.now_ms
            own_s = own_rest_s(ending.closed, row["attempts"], self.limits, chance, tx.now_ms)
            waits_s = own_s if ending.on_purpose else end.rest_s
            due_at = tx.now_ms + int(waits_s * 1000) if waits_s else AT_ONCE
            note = {"cancelled": "cancelled", "done": None}.get(ending.outcome, ending.error)
            tx.execute(
                "UPDATE deliveries SET state = ?, failures = ?, available_at_ms = ?, settled_at_ms = ?, note = ?"
                " WHERE message_id = ? AND recipient = ?",
                (end.state, end.failures, due_at, settled_at, note, row["message_id"], agent),
            )
            if waits_s > 0:
                tx.wake(RESTING)
            waits = waits or end.state == "queued"
            if end.state == "dead":
                dead.append((row["message_id"], end.failures))
        if waits:
            forget_depth(tx, agent)
        tx.wake(TURN_ENDS)
        claims = ending.told
        why = {"error": ending.error, "reason": claims.reason, "limited_until_ms": claims.limited_until_ms}
        tx.emit("turn_ended", agent, agent, None, turn=turn_id, state=ending.outcome, **why)
        if claims.session_lost:
            tx.emit("session_lost", SYSTEM, agent, turn=turn_id)
        if ending.too_full:
            tx.emit("errand_set", SYSTEM, agent, errand="save_and_compact", turn=turn_id)
        for message_id, failures in dead:
            told = {"message": message_id, "attempts": failures, "turn": turn_id}
            tx.emit("message_dead", SYSTEM, agent, about=message_id, **told)
            self._tell_sender(tx, agent, message_id, failures, ending.error)
        tx.wake(mail(agent))

    def _tell_sender(self, tx: Transaction, agent: str, message_id: int, failures: int, error: str | None) -> None:
        """Whoever sent a message that is dead now reads so; the hive itself, in whose name ever, needs no letter."""
        sql = "SELECT sender, chain_id, hops FROM messages WHERE id = ?"
        row = tx.execute(sql, (message_id,)).fetchone()
        if row["sender"] not in (SYSTEM, FORGE):
            turns = counted(failures, "failed turn")
            cause = Cause("system", None, row["chain_id"], row["hops"] + 1)
            text = f"your message {message_id} to {agent} was given up after {turns}"
            body = notice("message_dead", text, agent=agent, error=error)
            put_message(tx, SYSTEM, row["sender"], body, message_id, cause, self.limits)

    async def sweep_bodies(self) -> None:
        """Remove the files of large bodies, and attached ones, that no message refers to any more."""
        if self.bodies is not None:
            await self.bodies.sweep()
        if self._delivery is not None:
            await self._delivery.sweep()


_ENDING = """
    SELECT t.state, t.errand AS turn_errand, a.errand, a.errand_rest,
           a.settings ->> 'compact_at_percent' AS compact_at_percent
    FROM turns t JOIN agents a ON a.name = t.agent WHERE t.id = ? AND t.agent = ? AND t.fence = ?
"""
_LEASED = """
    SELECT d.message_id, d.failures, d.attempts FROM leases l JOIN turns t ON t.id = l.turn_id
    JOIN deliveries d ON d.message_id = l.message_id AND d.recipient = t.agent
    WHERE l.turn_id = ? AND d.state = 'leased'
"""
