"""The life of one message, told from its rows: `hive explain`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted, quoted
from hive_core.services.attachments import FILES, files_of
from hive_core.store.door import Store

Row = Mapping[str, Any]

HELD = {
    "hops": "too many turns lay between it and what its chain began with (hops)",
    "rate": "its sender had written to {recipient} too often within an hour (pair_rate_per_hour)",
}
ENDS = {
    "done": "acked: turn {turn} ended well",
    "cancelled": "acked as cancelled: turn {turn} was {error}",
    "failed": "turn {turn} failed: {error}",
    "lost": "turn {turn} was lost: {error}",
    "waiting": "turn {turn} could not run, which is no try: {error}",
}
TOLD = {
    "message_released": ("released", "released by {actor}{chain}"),
    "message_requeued": ("requeued", "put back by {actor}, with all its tries"),
    "message_dropped": ("dropped", "dropped by {actor}"),
    "message_dead": ("dead", "dead after {attempts}; it waits for `hive requeue` or `hive drop`"),
}


@dataclass(frozen=True, slots=True)
class Moment:
    """One line of a life."""

    at_ms: int
    what: str  # sent, held, released, queued, leased, acked, cancelled, failed, lost, waiting, dead, requeued, dropped
    text: str
    turn: int | None = None


async def life_of(store: Store, message_id: int) -> dict[str, Any]:
    """`{"message", "sent", "deliveries": [{"recipient", "state", "attempts", "failures", "missing", "life"}]}`.

    missing  of its files those that did not reach the recipient, and why. Raises Refusal("not_found").
    """
    row = await store.row(_MESSAGE, (message_id,))
    if row is None:
        raise Refusal(
            "not_found",
            f"cannot explain message {message_id}: there was none, or it is gone; what is acked is kept for a while "
            "(kept_s)",
        )
    message = {**dict(row), "files": files_of(row["files"])}
    of_message = "SELECT * FROM deliveries WHERE message_id = ? ORDER BY recipient"
    deliveries = [dict(row) for row in await store.rows(of_message, (message_id,))]
    leases = [dict(row) for row in await store.rows(_LEASES, (message_id,))]
    about = "SELECT * FROM events WHERE message_id = ? ORDER BY seq"
    events = [dict(row) for row in await store.rows(about, (message_id,))]
    return {
        "message": message,
        "sent": asdict(tell_sending(message)),
        "deliveries": [
            {
                **{key: delivery[key] for key in ("recipient", "state", "attempts", "failures")},
                "missing": missing_files(delivery["recipient"], events),
                "life": [asdict(moment) for moment in tell_life(message, delivery, leases, events)],
            }
            for delivery in deliveries
        ],
    }


_MESSAGE = f"""
    SELECT m.id, m.sender, m.in_reply_to, coalesce(m.thread_id, m.id) AS thread, m.cause, m.cause_id, m.chain_id,
           m.hops, m.client_id, m.body_bytes, m.sent_at_ms, t.agent AS turn_of, t.message_id AS turn_message,
           n.repository AS forge_repository, n.kind AS forge_kind, n.number AS forge_number, n.lane AS forge_lane,
           {FILES}
    FROM messages m LEFT JOIN turns t ON m.cause = 'turn' AND t.id = m.cause_id
    LEFT JOIN forge_notices n ON m.sender = 'forge' AND n.id = m.cause_id WHERE m.id = ?
"""
_LEASES = """
    SELECT l.turn_id, l.attempt, l.at_ms, t.agent, t.state, t.ended_at_ms, t.error
    FROM leases l JOIN turns t ON t.id = l.turn_id WHERE l.message_id = ? ORDER BY l.turn_id
"""


def tell_sending(message: Row) -> Moment:
    """Who sent it, in which turn, and what that was caused by."""
    number = message["cause_id"]
    why = {
        "operator": "",
        "turn": f" in turn {number}" if number else " outside any turn",
        "reminder": f", reminder {number}",
        "schedule": f", schedule {number}",
        "system": _of_forge(message),
    }[message["cause"]]
    if message["cause"] == "turn" and message["turn_message"]:
        why += f", which message {message['turn_message']} began"
    parts = [f"sent by {message['sender']}{why}"]
    if message["in_reply_to"]:
        parts.append(f"an answer to message {message['in_reply_to']}")
    if message["hops"]:
        turns = counted(message["hops"], "turn")
        parts.append(f"{turns} after message {message['chain_id']}, with which its chain began")
    if files := message.get("files"):
        parts.append("with " + ", ".join(f"{quoted(file['name'])} ({file['bytes']:,} bytes)" for file in files))
    return Moment(message["sent_at_ms"], "sent", "; ".join(parts), number if message["cause"] == "turn" else None)


def missing_files(recipient: str, events: Iterable[Row]) -> dict[str, str]:
    """Of a message's files those that the last delivery did not bring to a recipient: name → why."""
    told = [event for event in events if event["agent"] == recipient and event["kind"] == "files_missing"]
    return dict(json.loads(told[-1]["data"])["missing"]) if told else {}


def _of_forge(message: Row) -> str:
    """Of what it tells, where it comes from a forge and that is still known."""
    if not message.get("forge_repository"):
        return ""
    what = f"{message['forge_kind'].replace('_', ' ')} {message['forge_number']}"
    return f" by lane {message['forge_lane']}: {what} of {message['forge_repository']}"


def tell_life(message: Row, delivery: Row, leases: Iterable[Row], events: Iterable[Row]) -> list[Moment]:
    """What became of a message for one recipient, as it came: leases by their turns, events by their numbers.

    Those of others are passed over.
    """
    name = delivery["recipient"]
    begun = Moment(message["sent_at_ms"], "queued", f"queued for {name}")
    if delivery["held"]:
        why = HELD[delivery["held"]].format(recipient=name, hops=message["hops"])
        begun = Moment(message["sent_at_ms"], "held", f"held for the operator: {why}")
    mine = [lease for lease in leases if lease["agent"] == name]
    moments = _in_order(mine, [event for event in events if event["agent"] == name and event["kind"] in TOLD])
    return [begun, *moments, *_now(delivery, moments)]


def _in_order(leases: list[Row], events: list[Row]) -> list[Moment]:
    """No time is asked: a clock may have been set back meanwhile.

    A message is released before any turn has it, and requeued or dropped without a turn between that and what came
    before it. So only a death stands between turns, and it names the one that brought it. (One that a version before
    this noted does not.)
    """
    moments: list[Moment] = []
    for event in events:
        if event["kind"] == "message_dead":
            killed_by = json.loads(event["data"]).get("turn", leases[-1]["turn_id"] if leases else 0)
            while leases and leases[0]["turn_id"] <= killed_by:
                moments += _turn(leases.pop(0))
        moments.append(_event(event))
    return moments + [moment for lease in leases for moment in _turn(lease)]


def _turn(lease: Row) -> list[Moment]:
    turn, again = lease["turn_id"], "" if lease["attempt"] == 1 else f", for the {_ordinal(lease['attempt'])} time"
    taken = Moment(lease["at_ms"], "leased", f"leased by turn {turn} of {lease['agent']}{again}", turn)
    if lease["ended_at_ms"] is None:
        return [taken]
    what: str = "acked" if lease["state"] == "done" else lease["state"]
    text = ENDS[lease["state"]].format(turn=turn, error=lease["error"] or "it gave no reason")
    return [taken, Moment(lease["ended_at_ms"], what, text, turn)]


def _event(event: Row) -> Moment:
    what, text = TOLD[event["kind"]]
    data = json.loads(event["data"])
    attempts = counted(data["attempts"], "failed turn") if "attempts" in data else "its failed turns"
    return Moment(event["at_ms"], what, text.format(actor=event["actor"], attempts=attempts, chain=_old_chain(data)))


def _old_chain(released: Mapping[str, int]) -> str:
    """The chain that a message was of until it was released; its row knows only the one that begins with it."""
    if "chain" not in released:
        return "; the chain begins anew with it"
    if not (hops := released["hops"]):
        return ""
    length = f"{counted(hops, 'turn')} long"
    return f"; its chain, which had begun with message {released['chain']}, was {length}, and begins anew"


def _now(delivery: Row, moments: Sequence[Moment]) -> list[Moment]:
    """Where it stands, as far as neither a turn nor an event has told it."""
    told, state = {moment.what for moment in moments}, delivery["state"]
    due, settled = delivery["available_at_ms"], delivery["settled_at_ms"]
    if state == "queued":
        return [Moment(due, "queued", "put back; due again")] if moments and due > moments[-1].at_ms else []
    if settled is None or state in told or "cancelled" in told:
        return []
    if state == "acked" and delivery["recipient"] == "operator":
        return [Moment(settled, "acked", "read by the operator")]
    return [Moment(settled, state, state + (f": {delivery['note']}" if delivery["note"] else ""))]


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
