"""Who was told what, and when: the witness of a run, which speaks up as soon as a promise is broken.

What a database shows by itself stands with the other promises in tests/proof/promises.py; here is what only somebody
sees who was there.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from hive_core.procedures.clock import LOOK_AGAIN_S
from tests.proof.promises import WITH_A_TRUE_CLOCK, Acked, Leased, Promise, Sent, Told, broken_promises
from tests.simulation.books import NEVER, Books
from tests.simulation.weather import Weather

BEGAN_AT_S = 1_800_000_000.0  # some day; the wall clock of a run goes with trio's
# From when a message may be taken: once it was sent, or let go by the operator; one that a turn had, after its rest;
# none before its recipient has rested.
_DUE = """
    max(iif(attempts > {first}, available_at_ms, sent_at_ms), coalesce((
        SELECT max(at_ms) FROM events e WHERE e.message_id = deliveries.message_id AND e.message_id IS NOT NULL
    ), 0), coalesce((SELECT rests_until_ms FROM agents WHERE name = recipient), 0))
"""


def wall_clock() -> float:
    return BEGAN_AT_S + trio.current_time()


class PromiseBroken(AssertionError):
    """A promise does not hold; the sentence says which, and when it was seen."""


class Witness:
    """
    free_since_ms     the agents whose harness waits for a message, each since when
    heard_ms          when each harness last had an answer
    up_since_ms       since when the daemon runs, NEVER while it does not
    wanted_since_ms   since when an agent may take turns, where the operator had paused it; NEVER while that lasts
    closed            the agents that were told last that their way to the model is closed
    hung_since_ms     the agents that hang, each since when
    """

    def __init__(self, db: sqlite3.Connection, weather: Weather, wall: Callable[[], float]) -> None:
        self._db = db
        self.wall = wall  # its time, in whatever thread
        self._prompt_ms = weather.prompt_s * 1000
        self.now_ms = 0
        self.told = Told(bodies_differ=True, limits=weather.limits)
        # Where the wall's clock runs on while the machine stands still, nobody can say who was silent for too long.
        waits = weather.prompt_s == float("inf")
        self._silence_ms = NEVER if waits else int(weather.limits.lease_silence_s * 1500) + 2_000
        self._ended_within_ms = NEVER if waits else int((3 * weather.limits.lease_silence_s + 30) * 1000)
        self.free_since_ms: dict[str, int] = {}
        self.heard_ms: dict[str, int] = {}
        self.up_since_ms = NEVER
        self.wanted_since_ms: dict[str, int] = {}
        self.closed: set[str] = set()
        self._closed_ms: dict[str, int] = {}  # when each was closed last, or may have been opened
        self._all_closed_ms = 0
        self.hung_since_ms: dict[str, int] = {}
        self.books = Books(db, weather, self.clock, self.broken, exact=not waits)
        self._settled: set[tuple[str, int]] = set()
        self._audited_at_ms = 0
        self._answers: dict[tuple[str, str], dict[str, Any]] = {}
        self.counts = dict.fromkeys(
            (
                "sends",
                "refusals",
                "turns",
                "late acks",
                "errands",
                "calls",
                "hangs",
                "crashes",
                "restarts",
                "audits",
                "late at most ms",
            ),
            0,
        )

    def broken(self, sentence: str) -> PromiseBroken:
        return PromiseBroken(f"{sentence} (at {self.now_ms / 1000:.3f} s)")

    def clock(self) -> int:
        self.now_ms = int(self.wall() * 1000)
        return self.now_ms

    # -- the way to the model -----------------------------------------------------------------------------------------

    def asked_for_the_way(self, agent: str, is_open: bool) -> None:
        """Whether an agent may begin a turn, as whoever begins it was told."""
        if is_open:
            self.closed.discard(agent)
        else:
            self.closed.add(agent)
            self._closed_ms[agent] = self.clock()

    def way_changed(self, agents: Sequence[str]) -> None:
        """For these, or for all where none is named, the answer may be another from now on."""
        now_ms = self.clock()
        if not agents:
            self._all_closed_ms = now_ms
            self.closed.clear()
        for agent in agents:
            self._closed_ms[agent] = now_ms
            self.closed.discard(agent)

    def _may_since(self, agent: str) -> int:
        """Since when nothing keeps an agent from its next turn, as far as is known."""
        closed_ms = max(self._closed_ms.get(agent, 0), self._all_closed_ms)
        return max(closed_ms, self.wanted_since_ms.get(agent, 0))

    # -- what clients are told ----------------------------------------------------------------------------------------

    def sent(self, sender: str, recipients: tuple[str, ...], body: str, key: str, answer: dict[str, Any]) -> None:
        """A repeated send gets the first answer."""
        first = self._answers.setdefault((sender, key), answer)
        if first != answer:
            raise self.broken(f"the send {key} of {sender} was answered {first} and then {answer}")
        self.told.sends.append(Sent(answer["message"], sender, recipients, body, key))
        self.counts["sends"] += 1

    def refused(self, sender: str, body: str) -> None:
        self.told.refused.append((sender, body))
        self.counts["refusals"] += 1

    def leased(self, agent: str, turn: int, fence: str, messages: list[dict[str, Any]]) -> None:
        """Nothing is handed out once it is known to be settled."""
        self.told.leases.append(Leased(turn, agent, fence, *_columns(messages)))
        for message in messages:
            if (agent, message["id"]) in self._settled:
                raise self.broken(f"{agent} was handed message {message['id']} again though its ack was answered")

    def began(self, agent: str, turn: int, message: int | None) -> None:
        """A due message reaches an agent that is free, promptly. No message: it began with an errand."""
        self.counts["turns" if message is not None else "errands"] += 1
        free_since = self.free_since_ms.pop(agent, None)
        if message is None:
            self._judge_errand(agent, turn)
        elif free_since is not None:
            self._judge_lateness(agent, turn, message, max(free_since, self._may_since(agent)))

    def acked(self, agent: str, turn: int, outcome: str, counted: bool) -> None:
        """An ack that counted holds: what the turn had is settled for good when it ended well."""
        if not counted:
            self.counts["late acks"] += 1
            return
        self.told.acks.append(Acked(turn, agent, outcome))
        if outcome in ("done", "cancelled"):
            rows = self._db.execute("SELECT message_id FROM leases WHERE turn_id = ?", (turn,)).fetchall()
            self._settled.update((agent, row[0]) for row in rows)

    # -- looks at the database ----------------------------------------------------------------------------------------

    def _judge_lateness(self, agent: str, turn: int, message: int, free_since_ms: int) -> None:
        sql = f"""
            SELECT started_at_ms, {_DUE.format(first=1)} AS due_at_ms FROM turns
            JOIN deliveries ON recipient = agent AND deliveries.message_id = ? WHERE id = ? AND turn_id = id
        """
        row = self._db.execute(sql, (message, turn)).fetchone()
        if row is None:
            return  # the turn was taken away before its harness heard of it
        late_ms = row["started_at_ms"] - max(row["due_at_ms"], free_since_ms)
        self.counts["late at most ms"] = max(late_ms, self.counts["late at most ms"])
        if late_ms > self._prompt_ms:
            raise self.broken(f"message {message} was due, {agent} was free, and it came {late_ms} ms late")
        # Others may have waited for just as long, behind this one.
        sql = f"""
            SELECT message_id, {_DUE.format(first=0)} AS due_at_ms FROM deliveries INDEXED BY deliveries_queued
            WHERE recipient = ? AND state = 'queued'
        """
        for other in self._db.execute(sql, (agent,)).fetchall():
            if row["started_at_ms"] - max(other["due_at_ms"], free_since_ms) > self._prompt_ms:
                raise self.broken(f"message {other['message_id']} was due, {agent} was free, and got another later")

    def _judge_errand(self, agent: str, turn: int) -> None:
        """Behind an errand that had to wait mail goes first."""
        sql = "SELECT id, state, errand, ended_at_ms FROM turns WHERE agent = ? AND id < ? ORDER BY id DESC LIMIT 1"
        before = self._db.execute(sql, (agent, turn)).fetchone()
        if before is None or before["errand"] is None or before["state"] != "waiting":
            return
        if self.wanted_since_ms.get(agent, 0) >= before["ended_at_ms"]:
            return  # whoever starts an agent may have mended what it waited for
        sql = f"""
            SELECT message_id FROM deliveries INDEXED BY deliveries_queued WHERE recipient = ? AND state = 'queued'
            AND {_DUE.format(first=0)} < (SELECT started_at_ms FROM turns WHERE id = ?)
        """
        if row := self._db.execute(sql, (agent, turn)).fetchone():
            raise self.broken(
                f"message {row[0]} is due, and {agent} got the errand that had to wait before, turn {turn}"
            )

    def look_for_the_hung(self) -> None:
        """Whoever hangs in the middle of a turn is ended, and another takes its place."""
        for agent, since_ms in self.hung_since_ms.items():
            if self.now_ms - max(since_ms, self.up_since_ms) > self._ended_within_ms:
                raise self.broken(f"{agent} hangs, and its container is not ended")

    def look_for_waiting(self) -> None:
        """Nothing that is due waits while its recipient is free."""
        sql = f"""
            SELECT recipient, deliveries.message_id, {_DUE.format(first=0)} AS due_at_ms FROM deliveries
            INDEXED BY deliveries_queued WHERE state = 'queued'
        """
        for row in self._db.execute(sql).fetchall():
            free_since = self.free_since_ms.get(row["recipient"])
            if free_since is None or row["recipient"] in self.closed:
                continue
            since = max(row["due_at_ms"], free_since, self._may_since(row["recipient"]))
            if self.now_ms - since > self._prompt_ms:
                raise self.broken(f"message {row['message_id']} is due and {row['recipient']} is free, and it waits")

    def look_for_the_overdue(self) -> None:
        """What is due at an instant is done within the time in which the hive's clock looks again."""
        sql = """
            SELECT 'reminder', id, due_at_ms FROM reminders WHERE state = 'open' AND due_at_ms < :before
            UNION ALL SELECT 'schedule', id, next_at_ms FROM schedules WHERE state = 'on' AND next_at_ms < :before
        """
        before_ms = self.now_ms - int(LOOK_AGAIN_S * 1000 + min(self._prompt_ms, NEVER))
        if self.up_since_ms < before_ms:
            for kind, number, due_at_ms in self._db.execute(sql, {"before": before_ms}).fetchall():
                raise self.broken(f"{kind} {number} has not fired, {self.now_ms - due_at_ms} ms after it was due")

    def look_for_the_lost(self) -> None:
        """A turn does not outlive a harness that is gone."""
        sql = "SELECT id, agent, started_at_ms FROM turns WHERE state = 'running'"
        for row in self._db.execute(sql).fetchall():
            heard_ms = max(row["started_at_ms"], self.up_since_ms, self.heard_ms.get(row["agent"], 0))
            if self.now_ms - heard_ms > self._silence_ms:
                raise self.broken(f"turn {row['id']} runs on though {row['agent']} is silent for too long")

    def audit(self, promises: Sequence[Promise] = WITH_A_TRUE_CLOCK) -> None:
        """Hold the database against what was told since the last time."""
        self.counts["audits"] += 1
        print(f"audit {self.counts['audits']}: {dict(self.counts)}", file=sys.stderr, flush=True)
        self.told.kept_since_ms = self.now_ms - int(self.told.limits.kept_s * 1000)
        if self._audited_at_ms < self.told.kept_since_ms:
            self.told.unsettled = frozenset()  # what was unsettled then may have been settled and forgotten since
        if found := broken_promises(self._db, self.told, promises):
            raise self.broken("; ".join(found[:5]))
        sql = "SELECT message_id, recipient FROM deliveries WHERE state NOT IN ('acked', 'dropped')"
        unsettled = frozenset((row[0], row[1]) for row in self._db.execute(sql))
        self.told = replace(self.told, sends=[], leases=[], acks=[], refused=[], old=None, unsettled=unsettled)
        self._audited_at_ms = self.now_ms
        self._answers.clear()
        self._settled.clear()


def _columns(messages: list[dict[str, Any]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The number of each message, and which attempt it was said to be."""
    return tuple(message["id"] for message in messages), tuple(message["attempt"] for message in messages)
