"""What people trust the broker for, promise by promise.

Each function takes the database of a hive, opened anew, and what its clients were told, and yields a sentence for
everything that is broken. How the run was made, and what it went through, is not its business.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hive_core.limits import Limits
from hive_core.services.rests import OWN_TRIES, REST_MOST_S
from hive_core.services.turn_ends import ERRAND_EVERY

Broken = Iterator[str]


@dataclass(frozen=True, slots=True)
class Sent:
    """A send that was answered."""

    message: int
    sender: str
    recipients: tuple[str, ...]
    body: str
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class Leased:
    """A turn, or more messages of one, that its harness was given."""

    turn: int
    agent: str
    fence: str
    messages: tuple[int, ...]
    attempts: tuple[int, ...] | None = None  # what was said of each message; None where nobody noted it


@dataclass(frozen=True, slots=True)
class Acked:
    """The end of a turn that was answered as counted."""

    turn: int
    agent: str
    outcome: str  # done, failed, waiting or cancelled
    fence: str | None = None  # the one that it was acked with


@dataclass
class Told:
    """What the clients of a run were told, in the order they heard it.

    bodies_differ   every send of the run had a body of its own, so that one stored twice is seen whatever its key
    kept_since_ms   retention may have taken messages that were sent before
    old             those messages, once somebody asked
    unsettled       (message, recipient) that somebody saw unsettled, so lately that retention must not have them yet
    limits          those that the broker of the run had
    refused         (sender, body) of each send that was refused; the body is its own
    excused         turns that ended because their agent's way to the model was closed: nobody rests from them
    """

    sends: list[Sent] = field(default_factory=list)
    leases: list[Leased] = field(default_factory=list)
    acks: list[Acked] = field(default_factory=list)
    bodies_differ: bool = False
    kept_since_ms: int = 0
    old: set[int] | None = None
    unsettled: frozenset[tuple[int, str]] = frozenset()
    limits: Limits = field(default_factory=Limits)
    refused: list[tuple[str, str]] = field(default_factory=list)
    excused: set[int] = field(default_factory=set)
    bodies: Path | None = None  # the folder of large bodies, as hive_core.services.bodies keeps them


def broken_promises(db: sqlite3.Connection, told: Told, promises: Sequence[Promise] | None = None) -> list[str]:
    """Everything that is broken, a sentence each; empty when every promise holds."""
    db.row_factory = sqlite3.Row
    return [f"{promise.__name__}: {sentence}" for promise in promises or PROMISES for sentence in promise(db, told)]


def the_database_is_whole(db: sqlite3.Connection, told: Told) -> Broken:
    for (sentence,) in db.execute("PRAGMA integrity_check"):
        if sentence != "ok":
            yield sentence
    for row in db.execute("PRAGMA foreign_key_check"):
        yield f"row {row[1]} of {row[0]} refers to nothing in {row[2]}"


def every_answered_send_is_there_once_per_recipient(db: sqlite3.Connection, told: Told) -> Broken:
    for sent in told.sends:
        row = db.execute("SELECT sender, body, body_sha256 FROM messages WHERE id = ?", (sent.message,)).fetchone()
        if row is None:
            if not _may_be_gone(db, sent.message, told):
                yield f"message {sent.message} of {sent.sender} was answered and is not there"
            continue
        if row["sender"] != sent.sender or not _says(row, sent.body):
            yield f"message {sent.message} of {sent.sender} is there and says something else"
        reached = [r[0] for r in db.execute("SELECT recipient FROM deliveries WHERE message_id = ?", (sent.message,))]
        if sorted(reached) != sorted(sent.recipients):
            yield f"message {sent.message} was for {sorted(sent.recipients)} and is there for {sorted(reached)}"


def nothing_was_sent_twice(db: sqlite3.Connection, told: Told) -> Broken:
    numbers: dict[tuple[str, str], int] = {}
    for sent in told.sends:
        if (
            sent.client_id is not None
            and numbers.setdefault((sent.sender, sent.client_id), sent.message) != sent.message
        ):
            yield f"the same send of {sent.sender}, {sent.client_id}, was answered with two numbers"
    if told.bodies_differ:
        sql = """
            SELECT sender, body, count(*) FROM messages WHERE cause IN ('operator', 'turn')
            GROUP BY sender, body HAVING count(*) > 1
        """
        for sender, body, count in db.execute(sql):
            yield f"{sender} sent {body[:60]!r} once and it is there {count} times"


def nothing_refused_is_there(db: sqlite3.Connection, told: Told) -> Broken:
    """Whoever was told no may send it again, and it comes once."""
    for sender, body in told.refused:
        if row := db.execute("SELECT id FROM messages WHERE sender = ? AND body = ?", (sender, body)).fetchone():
            yield f"{body[:60]!r} of {sender} was refused and is there as message {row[0]}"


def every_answered_lease_is_there(db: sqlite3.Connection, told: Told) -> Broken:
    for leased in told.leases:
        row = db.execute("SELECT agent, fence FROM turns WHERE id = ?", (leased.turn,)).fetchone()
        if row is None:
            if not all(_may_be_gone(db, message, told) for message in leased.messages):
                yield f"turn {leased.turn} of {leased.agent} was handed out and is not there"
        elif (row["agent"], row["fence"]) != (leased.agent, leased.fence):
            yield f"turn {leased.turn} was handed to {leased.agent} and is {row['agent']}'s, or has another fence"
        else:
            sql = "SELECT attempt FROM leases WHERE turn_id = ? AND message_id = ?"
            said = leased.attempts or (None,) * len(leased.messages)
            for message, attempt in zip(leased.messages, said, strict=True):
                found = db.execute(sql, (leased.turn, message)).fetchone()
                if found is None:
                    if not _may_be_gone(db, message, told):
                        yield f"turn {leased.turn} was given message {message} and nothing tells of it"
                elif attempt not in (None, found["attempt"]):
                    yield f"turn {leased.turn} was told attempt {attempt} of message {message}, not {found['attempt']}"


def every_answered_ack_holds(db: sqlite3.Connection, told: Told) -> Broken:
    for ack in told.acks:
        row = db.execute("SELECT state, fence FROM turns WHERE id = ? AND agent = ?", (ack.turn, ack.agent)).fetchone()
        if row is None:
            if not told.kept_since_ms:
                yield f"turn {ack.turn} of {ack.agent} was acked and is not there"
        elif row["state"] != ack.outcome:
            yield f"turn {ack.turn} was acked as {ack.outcome} and is {row['state']}"
        elif ack.fence not in (None, row["fence"]):
            yield f"turn {ack.turn} of {ack.agent} was acked with the fence of another turn"
        if ack.outcome in ("done", "cancelled"):
            sql = """
                SELECT l.message_id, d.state FROM leases l
                JOIN deliveries d ON d.message_id = l.message_id AND d.recipient = ?
                WHERE l.turn_id = ? AND d.state NOT IN ('acked')
            """
            for message, state in db.execute(sql, (ack.agent, ack.turn)):
                yield f"message {message} was acked by turn {ack.turn} of {ack.agent} and is {state}"


def nothing_is_acked_that_no_turn_finished(db: sqlite3.Connection, told: Told) -> Broken:
    """What the operator has read is acked too; that is a deed of a person, not of a turn."""
    sql = """
        SELECT d.message_id, d.recipient FROM deliveries d
        LEFT JOIN turns t ON t.id = d.turn_id AND t.agent = d.recipient
        LEFT JOIN leases l ON l.turn_id = t.id AND l.message_id = d.message_id
        WHERE d.state = 'acked' AND d.recipient != 'operator'
          AND (t.id IS NULL OR l.turn_id IS NULL OR t.state NOT IN ('done', 'cancelled'))
    """
    for message, recipient in db.execute(sql):
        yield f"message {message} to {recipient} is acked and no turn that leased it ended well"


def no_lease_is_stuck(db: sqlite3.Connection, told: Told) -> Broken:
    sql = """
        SELECT d.message_id, d.recipient FROM deliveries d
        LEFT JOIN turns t ON t.id = d.turn_id AND t.agent = d.recipient AND t.state = 'running'
        LEFT JOIN leases l ON l.turn_id = t.id AND l.message_id = d.message_id
        WHERE d.state = 'leased' AND (t.id IS NULL OR l.turn_id IS NULL)
    """
    for message, recipient in db.execute(sql):
        yield f"message {message} is leased by {recipient}, and no turn of it that runs has it"


def an_agent_runs_one_turn_at_a_time(db: sqlite3.Connection, told: Told) -> Broken:
    sql = "SELECT agent, count(*) FROM turns WHERE state = 'running' GROUP BY agent HAVING count(*) > 1"
    for agent, count in db.execute(sql):
        yield f"{agent} runs {count} turns"
    sql = """
        SELECT t.id, t.agent FROM turns t WHERE t.state = 'running' AND t.errand IS NULL AND NOT EXISTS (
            SELECT 1 FROM deliveries d WHERE d.message_id = t.message_id AND d.recipient = t.agent AND d.turn_id = t.id
              AND d.state = 'leased')
    """
    for turn, agent in db.execute(sql):
        yield f"turn {turn} of {agent} runs without the message that it began with"


def every_attempt_is_counted(db: sqlite3.Connection, told: Told) -> Broken:
    sql = """
        SELECT d.message_id, d.recipient, d.attempts, count(t.id) AS had FROM deliveries d
        LEFT JOIN leases l ON l.message_id = d.message_id
        LEFT JOIN turns t ON t.id = l.turn_id AND t.agent = d.recipient
        GROUP BY d.message_id, d.recipient HAVING d.attempts != had
    """
    for message, recipient, attempts, had in db.execute(sql):
        yield f"message {message} to {recipient} counts {attempts} attempts, and {had} turns had it"
    sql = """
        SELECT * FROM (
            SELECT l.message_id, t.agent, l.attempt,
                   row_number() OVER (PARTITION BY t.agent, l.message_id ORDER BY l.turn_id) AS nth
            FROM leases l JOIN turns t ON t.id = l.turn_id
        ) WHERE attempt != nth
    """
    for message, agent, attempt, nth in db.execute(sql):
        yield f"lease {nth} of message {message} to {agent} is written down as attempt {attempt}"


def nothing_is_dropped_but_by_a_person_or_its_sender(db: sqlite3.Connection, told: Told) -> Broken:
    """The operator puts away what is held or dead, and a sender withdraws; an event says who did."""
    sql = """
        SELECT d.message_id, d.recipient FROM deliveries d WHERE d.state = 'dropped' AND NOT EXISTS (
            SELECT 1 FROM events e WHERE e.message_id = d.message_id AND e.message_id IS NOT NULL
              AND e.kind = 'message_dropped' AND e.agent = d.recipient AND e.actor IN ('operator', d.sender)
        )
    """
    for message, recipient in db.execute(sql):
        yield f"message {message} to {recipient} is dropped and no event says by whom"


def nothing_unsettled_is_forgotten(db: sqlite3.Connection, told: Told) -> Broken:
    there = "SELECT 1 FROM deliveries WHERE message_id = ? AND recipient = ?"
    for message, recipient in sorted(told.unsettled):
        if db.execute(there, (message, recipient)).fetchone() is None:
            yield f"message {message} to {recipient} was not settled and is gone"


def the_events_tell_of_every_message(db: sqlite3.Connection, told: Told) -> Broken:
    """And of every turn: of those since the oldest event that is kept."""
    (since,) = db.execute("SELECT min(at_ms) FROM events, events_mark WHERE gone > 0 AND seq > gone").fetchone()
    given = {"since": since or 0}
    sql = """
        SELECT id FROM messages WHERE sent_at_ms >= :since
        EXCEPT SELECT data ->> 'message' FROM events WHERE kind = 'message_sent'
    """
    for (message,) in db.execute(sql, given):
        yield f"message {message} is there and no event tells of it"
    sql = """
        SELECT id, 'turn_started' FROM turns WHERE started_at_ms >= :since
        EXCEPT SELECT data ->> 'turn', kind FROM events WHERE kind = 'turn_started'
        UNION ALL
        SELECT * FROM (SELECT id, 'turn_ended' FROM turns WHERE state != 'running' AND ended_at_ms >= :since
                       EXCEPT SELECT data ->> 'turn', kind FROM events WHERE kind = 'turn_ended')
    """
    for turn, kind in db.execute(sql, given):
        yield f"no {kind} tells of turn {turn}"


def every_large_body_and_attached_file_is_whole(db: sqlite3.Connection, told: Told) -> Broken:
    if told.bodies is None:
        return
    sql = """
        SELECT body_sha256, body_bytes, 'large body' FROM messages WHERE body_sha256 IS NOT NULL
        UNION SELECT sha256, bytes, 'attached file' FROM attachments
    """
    for digest, size, what in db.execute(sql):
        path = told.bodies / digest[:2] / digest
        contents = path.read_bytes() if path.is_file() else None
        if contents is None:
            yield f"what is kept of a {what} ({digest}) is not there"
        elif len(contents) != size or hashlib.sha256(contents).hexdigest() != digest:
            yield f"what is kept of a {what} ({digest}) is something else"


def first_deliveries_keep_the_order_of_sender_and_recipient(db: sqlite3.Connection, told: Told) -> Broken:
    """But for what was held: that comes when the operator lets it go."""
    sql = """
        SELECT * FROM (
            SELECT l.message_id, d.sender, d.recipient, l.turn_id, max(l.message_id) OVER (
                PARTITION BY d.sender, d.recipient ORDER BY l.turn_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
            ) AS newest
            FROM leases l JOIN turns t ON t.id = l.turn_id
            JOIN deliveries d ON d.message_id = l.message_id AND d.recipient = t.agent
            WHERE l.attempt = 1 AND d.held IS NULL
        ) AS later JOIN leases earlier ON earlier.message_id = newest AND earlier.attempt = 1
        JOIN turns e ON e.id = earlier.turn_id AND e.agent = recipient
        WHERE later.message_id < newest AND earlier.turn_id < later.turn_id
    """
    for row in db.execute(sql):
        yield f"{row['recipient']} got message {row['newest']} of {row['sender']} before {row[0]}, which is older"


def nothing_is_handed_out_after_it_was_acked(db: sqlite3.Connection, told: Told) -> Broken:
    """Nor while another turn has it."""
    sql = """
        SELECT l.message_id, t.agent, t.id, t.state, u.id AS later FROM leases l JOIN turns t ON t.id = l.turn_id
        JOIN leases m ON m.message_id = l.message_id AND m.turn_id > l.turn_id
        JOIN turns u ON u.id = m.turn_id AND u.agent = t.agent
        WHERE t.state IN ('done', 'cancelled', 'running')
    """
    for message, agent, turn, state, later in db.execute(sql):
        yield f"message {message} is {state} in turn {turn} of {agent} and was handed to turn {later}"


def failures_are_counted_and_nothing_else_is(db: sqlite3.Connection, told: Told) -> Broken:
    """A message has as many failures as turns with it failed or were lost, and is dead when it has had its tries."""
    sql = """
        SELECT d.message_id, d.recipient, d.failures, d.state, sum(coalesce(t.state IN ('failed', 'lost'), 0)) AS had
        FROM deliveries d LEFT JOIN leases l ON l.message_id = d.message_id
        LEFT JOIN turns t ON t.id = l.turn_id AND t.agent = d.recipient
        WHERE NOT EXISTS (SELECT 1 FROM events e WHERE e.message_id = d.message_id AND e.kind = 'message_requeued')
        GROUP BY d.message_id, d.recipient
    """
    for message, recipient, failures, state, had in db.execute(sql):
        if failures != had and state != "dropped":
            yield f"message {message} to {recipient} counts {failures} failures, and {had} turns with it failed"
        if state not in ("dead", "dropped") and had >= told.limits.tries:
            yield f"message {message} to {recipient} is {state} after {had} failures"
        if state == "dead" and had < told.limits.tries:
            yield f"message {message} to {recipient} is dead after {had} failures"


def a_dead_letter_tells_its_sender(db: sqlite3.Connection, told: Told) -> Broken:
    sql = """
        SELECT d.message_id, d.sender FROM deliveries d
        WHERE d.state = 'dead' AND d.sender != 'system' AND d.settled_at_ms >= ? AND NOT EXISTS (
            SELECT 1 FROM deliveries n JOIN messages m ON m.id = n.message_id
            WHERE n.recipient = d.sender AND n.sender = 'system' AND m.in_reply_to = d.message_id
        )
    """
    for message, sender in db.execute(sql, (told.kept_since_ms,)):
        yield f"message {message} is dead and {sender} was not told"


def a_runaway_chain_or_pair_is_held(db: sqlite3.Connection, told: Told) -> Broken:
    """Unless the settings of its sender say another rate, or its operator let it go."""
    sql = "SELECT id, hops FROM messages JOIN deliveries ON message_id = id WHERE held IS NULL AND hops > ?"
    for message, hops in db.execute(sql, (told.limits.hops,)):
        yield f"message {message} is {hops} turns away from its cause and was not held"
    sql = """
        SELECT sender, recipient, max(within) FROM (
            SELECT sender, recipient, count(*) OVER (PARTITION BY sender, recipient ORDER BY sent_at_ms
                                                     RANGE BETWEEN 3599999 PRECEDING AND CURRENT ROW) AS within
            FROM deliveries WHERE held IS NULL AND sender IN (SELECT name FROM agents WHERE policy = '{}')
        ) WHERE within > ? GROUP BY sender, recipient
    """
    for sender, recipient, count in db.execute(sql, (told.limits.pair_rate_per_hour,)):
        yield f"{sender} sent {count} messages to {recipient} within an hour and none of them was held"


def a_rest_is_kept(db: sqlite3.Connection, told: Told) -> Broken:
    """What failed comes back after its rest, and what met a provider that was away after that one's.

    What closed the way by calls of its own again and again rests from its opening on, longer each time.
    """
    sql = """
        SELECT * FROM (
            SELECT message_id, agent, at_ms - lag(ended_at_ms) OVER same AS rest_ms, lag(state) OVER same AS was,
                   lag(turn_id) OVER same AS before
            FROM (SELECT l.*, t.agent, t.state, t.ended_at_ms FROM leases l JOIN turns t ON t.id = l.turn_id)
            WINDOW same AS (PARTITION BY agent, message_id ORDER BY turn_id)
        ) WHERE was IN ('failed', 'waiting') AND rest_ms < iif(was = 'failed', :failed_ms, :waiting_ms)
          AND message_id NOT IN (SELECT message_id FROM events WHERE kind = 'message_requeued')
    """
    least = {"failed_ms": told.limits.backoff_s * 500, "waiting_ms": told.limits.provider_rest_s * 500}
    for message, agent, rest_ms, was, before in db.execute(sql, least):
        if before in told.excused:
            continue
        yield f"message {message} came back to {agent} {rest_ms} ms after a turn with it was {was}"
    sql = """
        SELECT d.message_id, recipient, failures, available_at_ms - ended_at_ms, d.attempts,
               (SELECT max(data ->> 'until_ms') FROM events e
                WHERE e.agent = recipient AND kind LIKE 'credential%') - ended_at_ms
        FROM deliveries d
        JOIN turns t ON t.id = d.turn_id WHERE d.state = 'queued' AND available_at_ms > ended_at_ms
    """
    for message, agent, failures, rest_ms, attempts, opens_ms in db.execute(sql):
        most_s = max(told.limits.provider_rest_s, told.limits.backoff_s * 2 ** max(failures - 1, 0)) * 1.5
        if attempts > OWN_TRIES and opens_ms is not None:
            own_s = min(told.limits.provider_rest_s * 2 ** (attempts - OWN_TRIES - 1), REST_MOST_S) * 1.5
            most_s = max(most_s, own_s + max(0, opens_ms) / 1000)
        if rest_ms > most_s * 1000:
            yield f"message {message} to {agent} rests for {rest_ms} ms after {failures} failures"


def an_agent_rests_after_a_turn_that_had_to_wait(db: sqlite3.Connection, told: Told) -> Broken:
    """As long as a message does, and no longer: unless somebody starts or resumes it, or has ended it on purpose."""
    sql = """
        SELECT * FROM (
            SELECT id, agent, started_at_ms, lag(state) OVER same AS was, lag(ended_at_ms) OVER same AS ended_at_ms,
                   lag(id) OVER same AS before
            FROM turns WINDOW same AS (PARTITION BY agent ORDER BY id)
        ) AS t WHERE was = 'waiting' AND started_at_ms - ended_at_ms < :least_ms AND ended_at_ms >= :since
          AND NOT EXISTS (
            SELECT 1 FROM events e WHERE e.kind = 'agent_wanted' AND e.agent = t.agent
              AND e.at_ms BETWEEN t.ended_at_ms AND t.started_at_ms
        )
    """
    bounds = {"least_ms": told.limits.provider_rest_s * 500, "since": told.kept_since_ms}
    for turn, agent, started_at_ms, _, ended_at_ms, before in db.execute(sql, bounds):
        if before in told.excused:
            continue
        yield f"turn {turn} of {agent} began {started_at_ms - ended_at_ms} ms after one that had to wait"
    sql = """
        SELECT name, rests_until_ms - max(ended_at_ms) AS rest_ms FROM agents JOIN turns ON agent = name
        WHERE state = 'waiting' AND rests_until_ms >= :since + :most_ms GROUP BY name HAVING rest_ms > :most_ms
    """
    bounds = {"most_ms": told.limits.provider_rest_s * 1500, "since": told.kept_since_ms}
    for name, rest_ms in db.execute(sql, bounds):
        yield f"{name} rests for {rest_ms} ms"


def housekeeping_ends(db: sqlite3.Connection, told: Told) -> Broken:
    """Behind an errand that has ended the hive sets no other before some turns with messages."""
    sql = """
        SELECT * FROM (
            SELECT t.*, max(iif(errand IS NOT NULL AND state != 'waiting', nth, NULL)) OVER before AS done
            FROM (SELECT *, row_number() OVER (PARTITION BY agent ORDER BY id) AS nth FROM turns
                  WHERE started_at_ms >= :since) AS t
            WINDOW before AS (PARTITION BY agent ORDER BY id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
        ) WHERE errand_by = 'system' AND nth - done <= :every
    """
    for row in db.execute(sql, {"since": told.kept_since_ms, "every": ERRAND_EVERY}):
        yield f"turn {row['id']} of {row['agent']} is an errand, {row['nth'] - row['done']} turns after another"


def every_errand_is_done_or_waits(db: sqlite3.Connection, told: Told) -> Broken:
    """Where nobody began another session meanwhile."""
    sql = """
        SELECT e.agent, max(e.at_ms) AS set_at_ms FROM events e JOIN agents ON name = e.agent
        WHERE e.kind = 'errand_set' AND e.at_ms >= :since AND errand IS NULL GROUP BY e.agent
        HAVING NOT EXISTS (SELECT 1 FROM turns t WHERE t.agent = e.agent AND t.errand IS NOT NULL
                           AND t.started_at_ms >= set_at_ms)
           AND NOT EXISTS (SELECT 1 FROM events n WHERE n.kind = 'new_session' AND n.agent = e.agent
                           AND n.at_ms >= set_at_ms)
    """
    for agent, set_at_ms in db.execute(sql, {"since": told.kept_since_ms}):
        yield f"the errand that was set for {agent} at {set_at_ms} was never begun"


def what_calls_cost_adds_up(db: sqlite3.Connection, told: Told) -> Broken:
    """By turn, and by day; the days stay when their calls are forgotten."""
    sql = """
        SELECT t.id, t.agent, coalesce(t.cost_micro_usd, 0) AS told, sum(c.cost_micro_usd) AS cost
        FROM charges c JOIN turns t ON t.id = c.turn_id WHERE t.started_at_ms >= :since
        GROUP BY t.id HAVING told != cost
    """
    for turn, agent, told_cost, cost in db.execute(sql, {"since": told.kept_since_ms}):
        yield f"the calls of turn {turn} of {agent} cost {cost} micro-USD, and it says {told_cost}"
    sql = """
        SELECT day, agent, s.cost, s.calls, c.cost, c.calls
        FROM (SELECT day, agent, sum(cost_micro_usd) AS cost, sum(calls) AS calls FROM spend_days GROUP BY day, agent) s
        LEFT JOIN (SELECT at_ms / 86400000 AS day, agent, sum(cost_micro_usd) AS cost, count(*) AS calls FROM charges
                   GROUP BY 1, 2) c USING (day, agent)
        WHERE day > :since / 86400000 AND (s.cost IS NOT c.cost OR s.calls IS NOT c.calls)
    """
    for day, agent, told_cost, calls, cost, made in db.execute(sql, {"since": told.kept_since_ms}):
        yield f"day {day} of {agent} says {calls} calls and {told_cost} micro-USD, and there are {made} for {cost}"


def each_firing_is_one_message(db: sqlite3.Connection, told: Told) -> Broken:
    """Where nobody ran a schedule by hand."""
    sql = """
        SELECT cause, cause_id, m.id FROM messages m WHERE cause = 'schedule' AND 1 != (
            SELECT count(*) FROM schedule_firings f WHERE f.message_id = m.id AND f.schedule_id = cause_id
        )
        UNION ALL
        SELECT cause, cause_id, max(m.id) FROM messages m WHERE cause = 'reminder'
        GROUP BY cause_id HAVING count(*) > 1
    """
    for cause, number, message in db.execute(sql):
        yield f"message {message} is not the one firing of {cause} {number}"


def no_reminder_fires_early(db: sqlite3.Connection, told: Told) -> Broken:
    sql = """
        SELECT r.id, r.due_at_ms, min(r.settled_at_ms, coalesce(m.sent_at_ms, r.settled_at_ms)) AS fired_at_ms
        FROM reminders r LEFT JOIN messages m ON m.id = r.message_id
        WHERE r.state = 'fired' AND fired_at_ms < r.due_at_ms
    """
    for number, due_at_ms, fired_at_ms in db.execute(sql):
        yield f"reminder {number} fired {due_at_ms - fired_at_ms} ms before it was due"


def no_firing_is_left_out(db: sqlite3.Connection, told: Told) -> Broken:
    """Of a schedule that runs at intervals, while the daemon was never away for long and nobody paused it."""
    sql = """
        SELECT * FROM (
            SELECT schedule_id, due_at_ms, every_ms, due_at_ms - lag(due_at_ms) OVER same AS after_ms
            FROM schedule_firings JOIN schedules ON schedules.id = schedule_id
            WHERE every_ms IS NOT NULL WINDOW same AS (PARTITION BY schedule_id ORDER BY due_at_ms)
        ) WHERE after_ms != every_ms
    """
    for number, due_at_ms, every_ms, after_ms in db.execute(sql):
        yield f"schedule {number} fired for {due_at_ms}, {after_ms} ms after the one before and not {every_ms}"


def nothing_is_left_unsettled(db: sqlite3.Connection, told: Told) -> Broken:
    """At the end of a run, when nobody is in trouble any more: every message came to an end, or its agent is down."""
    sql = """
        SELECT message_id, recipient, state FROM deliveries JOIN agents ON name = recipient
        WHERE wanted = 'up' AND state IN ('queued', 'leased')
    """
    for message, recipient, state in db.execute(sql):
        yield f"message {message} to {recipient} is still {state}"


def no_errand_is_left(db: sqlite3.Connection, told: Told) -> Broken:
    for name, errand in db.execute("SELECT name, errand FROM agents WHERE wanted = 'up' AND errand IS NOT NULL"):
        yield f"the errand of {name}, {errand}, still waits"


Promise = Callable[[sqlite3.Connection, Told], Broken]
PROMISES: tuple[Promise, ...] = (
    the_database_is_whole,
    every_answered_send_is_there_once_per_recipient,
    nothing_was_sent_twice,
    nothing_refused_is_there,
    every_answered_lease_is_there,
    every_answered_ack_holds,
    nothing_is_acked_that_no_turn_finished,
    no_lease_is_stuck,
    an_agent_runs_one_turn_at_a_time,
    every_attempt_is_counted,
    nothing_is_dropped_but_by_a_person_or_its_sender,
    nothing_unsettled_is_forgotten,
    the_events_tell_of_every_message,
    every_large_body_and_attached_file_is_whole,
    first_deliveries_keep_the_order_of_sender_and_recipient,
    nothing_is_handed_out_after_it_was_acked,
    failures_are_counted_and_nothing_else_is,
    a_dead_letter_tells_its_sender,
    a_runaway_chain_or_pair_is_held,
    each_firing_is_one_message,
    no_reminder_fires_early,
    housekeeping_ends,
    every_errand_is_done_or_waits,
    what_calls_cost_adds_up,
)
# What is seen only where the clock was never set back, and where everything came to rest.
WITH_A_TRUE_CLOCK = (
    *PROMISES,
    a_rest_is_kept,
    an_agent_rests_after_a_turn_that_had_to_wait,
    no_firing_is_left_out,
)
AT_REST = (*WITH_A_TRUE_CLOCK, nothing_is_left_unsettled, no_errand_is_left)


def _says(row: sqlite3.Row, body: str) -> bool:
    """A large body stands in the row with its beginning alone."""
    stored = str(row["body"])
    return body.startswith(stored) if row["body_sha256"] else stored == body


def _may_be_gone(db: sqlite3.Connection, message: int, told: Told) -> bool:
    """Whether the event of a message that is not there says that it was old enough for retention."""
    if told.old is None:
        sql = "SELECT data ->> 'message' FROM events WHERE kind = 'message_sent' AND at_ms < ?"
        told.old = {row[0] for row in db.execute(sql, (told.kept_since_ms,))}
    return message in told.old
