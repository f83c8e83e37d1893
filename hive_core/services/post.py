"""How a message is taken in: who may write to whom, how often, how much, and what it was caused by.

One statement asks for each kind of fact, one inserts each kind of row, however many letters a commit holds. Between
the two `_judge` decides from plain values. Sender, cause and time are the host's word, never the letter's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from outcome import Error, Outcome, Value, capture

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import EVERYONE, FORGE, OPERATOR, SYSTEM, AgentName, MessageBody
from hive_core.services.attachments import FILES, Attached, check_quota, files_of, rows_of
from hive_core.services.attachments import ROW as ATTACHMENT
from hive_core.services.rates import count_sent, sent_lately, taken_back_lately
from hive_core.store.bus import mail
from hive_core.store.writer import Transaction

AT_ONCE = 0  # a message that need not rest is due by any clock, also one that was set back since
_NEXT_ID = "next message"
# fmt: off
_MESSAGE = ("id", "sender", "body", "body_bytes", "body_sha256", "in_reply_to", "thread_id",
            "cause", "cause_id", "chain_id", "hops", "client_id", "to_everyone", "sent_at_ms")
_DELIVERY = ("message_id", "recipient", "sender", "state", "held", "sent_at_ms", "available_at_ms")
# fmt: on


@dataclass(frozen=True, slots=True)
class Cause:
    """What set a message off. chain_id None: this message begins the chain."""

    kind: str  # operator, turn, reminder, schedule or system
    id: int | None = None
    chain_id: int | None = None
    hops: int = 0


@dataclass(frozen=True, slots=True)
class Letter:
    """A message that wants to be sent."""

    sender: AgentName
    recipients: tuple[AgentName, ...]  # (EVERYONE,): every agent the sender may write to, but itself
    body: MessageBody  # whole, or the beginning of what `file` keeps
    in_reply_to: int | None = None
    client_id: str | None = None  # the same again is the same message
    cause: Cause | None = None  # None: the operator, the hive, or the sender's turn
    file: tuple[str, int] | None = None  # (sha256, bytes) of a body that is too large to stand inline
    attached: tuple[Attached, ...] = ()


@dataclass(slots=True)
class _Agent:
    allowed: frozenset[str] | None  # None: everybody
    rate: int
    waiting: int
    held: int
    refused: int
    kept_bytes: int
    turn: Cause


@dataclass(frozen=True, slots=True)
class _First:
    """The message that has a client's own key already."""

    answer: dict[str, Any]
    said: tuple[Any, ...]  # its body, or the beginning and the digest; what it answers; its files
    recipients: frozenset[str]  # `*` for everyone, whomever that reached

    def answer_to(self, letter: Letter) -> dict[str, Any]:
        """The first answer. Raises Refusal when the letter is another one."""
        if self.said != _said(letter) or self.recipients != frozenset(letter.recipients):
            why = f"message {self.answer['message']} has it, and is another one; give each message a key of its own"
            raise Refusal("usage", f"cannot use this key for this message: {why}")
        return dict(self.answer)


def _said(letter: Letter) -> tuple[Any, ...]:
    files = [(file.name, file.sha256) for file in letter.attached]
    return letter.body, letter.file[0] if letter.file else None, letter.in_reply_to, files


@dataclass(slots=True)
class _Facts:
    agents: dict[str, _Agent] = field(default_factory=dict)
    replied: dict[int, tuple[int, set[str]]] = field(default_factory=dict)  # id → its thread, who sent or got it
    firsts: dict[tuple[str, str], _First] = field(default_factory=dict)  # by sender and client id
    destroyed: set[str] = field(default_factory=set)  # of those that are no agents


def post(tx: Transaction, letters: Sequence[Letter], limits: Limits) -> list[Outcome[dict[str, Any]]]:
    """Store what may be sent. For each letter `{"message": id}`, with `"held": {recipient: why}`, or its Refusal.

    A refused letter leaves nothing but a count with each recipient whose inbox was full.
    """
    facts, rows = _look_up(tx, letters, limits), _Rows(_next_id(tx))
    results: list[Outcome[dict[str, Any]]] = []
    for letter in letters:
        key = (letter.sender, letter.client_id or "")
        if letter.client_id is not None and key in facts.firsts:
            results.append(capture(facts.firsts[key].answer_to, letter))
            continue
        try:
            if tx.short and letter.sender != SYSTEM:
                raise no_room()
            recipients, cause = _judge(letter, facts, limits)
            check_quota(tx, letter.attached, limits)
            held = _held(tx, letter, recipients, cause, facts, limits)
        except Refusal as refusal:
            if isinstance(refusal, InboxFull):
                _count_refused(tx, letter.sender, refusal.full, facts)
            results.append(Error(refusal))
            continue
        thread_id = None if letter.in_reply_to is None else facts.replied[letter.in_reply_to][0]
        number = rows.add(letter, recipients, cause, held, thread_id, tx.now_ms)
        answer: dict[str, Any] = {"message": number, **({"held": held} if held else {})}
        for name in recipients:
            if name not in held:
                tx.wake(mail(name))
            _note_sent(tx, letter, name, name in held, facts)
        tx.emit("message_sent", letter.sender, recipients[0] if len(recipients) == 1 else None, **answer)
        facts.replied[number] = (thread_id or number, {letter.sender, *recipients})
        if letter.client_id is not None:
            facts.firsts[key] = _First(answer, _said(letter), frozenset(letter.recipients))
        if letter.file is not None and letter.sender in facts.agents:
            facts.agents[letter.sender].kept_bytes += letter.file[1]
        results.append(Value(answer))
    tx.insert("messages", _MESSAGE, rows.messages)
    tx.insert("deliveries", _DELIVERY, rows.deliveries)
    tx.insert("attachments", ATTACHMENT, rows.attachments)
    tx.memo.update({_depth(name): agent.waiting for name, agent in facts.agents.items()}, **{_NEXT_ID: rows.next_id})
    return results


@dataclass(slots=True)
class _Rows:
    """What a commit adds."""

    next_id: int
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    deliveries: list[tuple[Any, ...]] = field(default_factory=list)
    attachments: list[tuple[Any, ...]] = field(default_factory=list)

    def add(
        self,
        letter: Letter,
        recipients: Iterable[AgentName],
        cause: Cause,
        held: Mapping[str, str],
        thread_id: int | None,
        now_ms: int,
    ) -> int:
        """The number of the message that the letter becomes."""
        number, self.next_id = self.next_id, self.next_id + 1
        body_sha256, body_bytes = letter.file or (None, len(letter.body.encode()))
        body = (letter.body, body_bytes, body_sha256, letter.in_reply_to, thread_id)
        caused = (cause.kind, cause.id, cause.chain_id or number, cause.hops)
        known_by = (letter.client_id, EVERYONE in letter.recipients)
        self.attachments += rows_of(number, letter.attached)
        self.messages.append((number, letter.sender, *body, *caused, *known_by, now_ms))
        for name in recipients:
            state = "held" if name in held else "queued"
            self.deliveries.append((number, name, letter.sender, state, held.get(name), now_ms, AT_ONCE))
        return number


def _next_id(tx: Transaction) -> int:
    """The number of the next message. Only `post` inserts messages, so it can be remembered."""
    if (known := tx.memo.get(_NEXT_ID)) is not None:
        return int(known)
    sql = "SELECT coalesce(max(seq), 0) + 1 FROM sqlite_sequence WHERE name = 'messages'"
    return int(tx.execute(sql).fetchone()[0])


def forget_depth(tx: Transaction, name: str) -> None:
    """For whoever queues mail of `name` by any other way than `post`: how full that inbox is, nobody knows now."""
    tx.memo[_depth(name)] = None


def note_depth(tx: Transaction, name: str, waiting: int) -> None:
    """For whoever has just counted how many wait for `name`."""
    tx.memo[_depth(name)] = waiting


def _at_most(tx: Transaction, name: str, limits: Limits) -> int:
    remembered = tx.memo.get(_depth(name))
    return limits.inbox_depth if remembered is None else int(remembered)


def _depth(name: str) -> tuple[str, str]:
    """What the writer remembers: how many wait for an agent at most. It is counted again when that may be too many."""
    return "depth", name


def no_room(deed: str = "send") -> Refusal:
    """For what would only fill a disk further on which a transaction is `short`."""
    return Refusal(
        "unavailable",
        f"cannot {deed}: no space is left on the disk of the hive's state_dir; make room there, and it goes on by "
        "itself. What was sent before can still be read, acked and dropped",
    )


class InboxFull(Refusal):
    def __init__(self, full: Sequence[str], depth: int) -> None:
        super().__init__(
            "refused",
            f"cannot send to {', '.join(full)}: {counted(depth, 'message waits', 'messages wait')} there already, "
            "which is the limit (inbox_depth); send again when some are read",
        )
        self.full = full


def _judge(letter: Letter, facts: _Facts, limits: Limits) -> tuple[tuple[AgentName, ...], Cause]:
    """To whom a letter goes, and its cause. Raises Refusal, which names all the recipients that stand in the way."""
    sender, replied = facts.agents.get(letter.sender), facts.replied.get(letter.in_reply_to or 0)
    free = letter.sender in (OPERATOR, SYSTEM, FORGE)
    if letter.in_reply_to is not None and (replied is None or not (free or letter.sender in replied[1])):
        raise Refusal("not_found", f"cannot reply to message {letter.in_reply_to}: you neither sent nor received it")
    allowed = None if sender is None else sender.allowed
    recipients = tuple(dict.fromkeys(letter.recipients))
    if recipients == (EVERYONE,):
        every = (AgentName(name) for name in facts.agents if name != letter.sender)
        recipients = tuple(name for name in every if allowed is None or name in allowed)
        if not recipients:
            raise Refusal("not_found", "cannot send to everyone: there is nobody else you may write to")
    if len(recipients) > limits.fan_out:
        raise Refusal(
            "usage", f"cannot send to {len(recipients)} recipients at once: the limit is {limits.fan_out} (fan_out)"
        )
    if unknown := [name for name in recipients if name not in facts.agents and name != OPERATOR]:
        raise _not_there(unknown, facts.destroyed, "send to {}")
    if barred := [name for name in recipients if allowed is not None and name not in allowed]:
        raise Refusal(
            "refused",
            f"cannot send to {', '.join(barred)}: the settings of {letter.sender} allow only "
            f"{', '.join(sorted(allowed or ())) or 'nobody'} (recipients in agent.toml); ask hm1nd for a change",
        )
    if letter.sender != SYSTEM:
        full = [n for n in recipients if n in facts.agents and facts.agents[n].waiting >= limits.inbox_depth]
        if full:
            raise InboxFull(full, limits.inbox_depth)
    if letter.file is not None and sender is not None and sender.kept_bytes + letter.file[1] > limits.body_quota_bytes:
        raise Refusal(
            "refused",
            f"cannot send {letter.file[1]:,} bytes: large messages of {letter.sender} take {sender.kept_bytes:,} bytes "
            f"already and the limit is {limits.body_quota_bytes:,} (body_quota_bytes); send less, or wait until old "
            "messages are gone",
        )
    return recipients, letter.cause or _cause_of(letter.sender, sender)


def _not_there(unknown: Sequence[str], destroyed: set[str], deed: str) -> Refusal:
    if gone := [name for name in unknown if name in destroyed]:
        why = "it was destroyed" if len(gone) == 1 else "they were destroyed"
        way_out = f"`hive revive {gone[0]}` brings it back"
        return Refusal("not_found", f"cannot {deed.format(', '.join(gone))}: {why}; {way_out}")
    why = "no agent has that name; `list_agents` or `hive list` shows them"
    return Refusal("not_found", f"cannot {deed.format(', '.join(unknown))}: {why}")


def check_there(tx: Transaction, names: Sequence[str], deed: str) -> None:
    """Raise Refusal("not_found") when one of these is neither an agent nor the operator. deed: with {} for the names"""
    found = {row[0] for row in tx.execute(_THERE, (json.dumps(names),)).fetchall()} | {OPERATOR}
    if unknown := [name for name in names if name not in found]:
        raise _not_there(unknown, _destroyed(tx, unknown), deed)


def _destroyed(tx: Transaction, names: Iterable[str]) -> set[str]:
    return {row["name"] for row in tx.execute(_DESTROYED, (json.dumps(sorted(names)),)).fetchall()}


def _cause_of(name: AgentName, sender: _Agent | None) -> Cause:
    """An agent's cause is its turn, or its last one: what runs on behind a turn belongs to the same chain."""
    if sender is None:
        return Cause("operator" if name == OPERATOR else "system")
    return sender.turn


def _held(
    tx: Transaction, letter: Letter, recipients: Iterable[str], cause: Cause, facts: _Facts, limits: Limits
) -> dict[str, str]:
    """For whom the operator has to release it, and why. Raises Refusal when too much of the sender is held already."""
    sender = facts.agents.get(letter.sender)
    held: dict[str, str]
    if cause.hops > limits.hops + (cause.kind == "system"):
        # A notice about a message that was let through is one hop further; about one that was held it would wake its
        # sender to send the next.
        held = dict.fromkeys(recipients, "hops")
    elif cause.kind == "system":
        held = {}  # the hive's own notice ends a wait; what it sets off is braked in its turn
    elif sender is not None:
        held = {name: "rate" for name in recipients if sent_lately(tx, letter.sender, name) >= sender.rate}
    else:
        held = {}
    if held and sender is not None:
        back = taken_back_lately(tx, letter.sender)
        if sender.held + back + len(held) > limits.held_depth:
            known, way_out = "", "released or dropped"
            if back:
                known = f", {back} that it took back within the last hour count too,"
                way_out = "released, dropped or an hour old"
            raise Refusal(
                "refused",
                f"cannot send to {', '.join(held)}: {counted(sender.held, 'message')} of {letter.sender} "
                f"{'is' if sender.held == 1 else 'are'} held for the operator already{known} and the limit is "
                f"{limits.held_depth} (held_depth); wait until some are {way_out}",
            )
    return held


def _note_sent(tx: Transaction, letter: Letter, recipient: str, held: bool, facts: _Facts) -> None:
    """What the next letter of the same commit has to know."""
    if held and letter.sender in facts.agents:
        facts.agents[letter.sender].held += 1
    if letter.sender in facts.agents:
        count_sent(tx, letter.sender, recipient)
    if not held and recipient in facts.agents:
        facts.agents[recipient].waiting += 1


def _count_refused(tx: Transaction, sender: str, full: Iterable[str], facts: _Facts) -> None:
    """Each counts, but a flood leaves few events: with the first, the tenth, the hundredth …"""
    for name in full:
        facts.agents[name].refused += 1
        refused = facts.agents[name].refused
        tx.execute("UPDATE agents SET refused = ? WHERE name = ?", (refused, name))
        if str(refused).strip("0") == "1":
            tx.emit("inbox_full", sender, name, refused=refused)


def _look_up(tx: Transaction, letters: Sequence[Letter], limits: Limits) -> _Facts:
    facts = _Facts()
    names = {letter.sender for letter in letters} | {name for letter in letters for name in letter.recipients}
    if EVERYONE in names:
        found = tx.execute(_AGENTS)
    else:
        found = tx.execute(f"{_AGENTS} WHERE name IN (SELECT value FROM json_each(?))", (json.dumps(sorted(names)),))
    for row in found.fetchall():
        allowed, rate = _policy(row["policy"])
        hops = row["hops"] + 1 if row["turn_id"] else 0
        facts.agents[row["name"]] = _Agent(
            allowed=allowed,
            rate=rate or limits.pair_rate_per_hour,
            waiting=_at_most(tx, row["name"], limits),
            held=row["held"],
            refused=row["refused"],
            kept_bytes=0,
            turn=Cause("turn", row["turn_id"], row["chain_id"], hops),
        )
    if strange := names - facts.agents.keys() - {OPERATOR, SYSTEM, FORGE, EVERYONE}:
        facts.destroyed = _destroyed(tx, strange)
    if doubtful := [name for name, agent in facts.agents.items() if agent.waiting >= limits.inbox_depth]:
        for row in tx.execute(_WAITING, (json.dumps(doubtful),)).fetchall():
            facts.agents[row["name"]].waiting = row["waiting"]
    if replies := {letter.in_reply_to for letter in letters if letter.in_reply_to is not None}:
        for row in tx.execute(_REPLIED, (json.dumps(sorted(replies)),)).fetchall():
            people = {row["sender"], *json.loads(row["recipients"])}
            facts.replied[row["id"]] = (row["thread_id"] or row["id"], people)
    if keys := [(letter.sender, letter.client_id) for letter in letters if letter.client_id is not None]:
        for row in tx.execute(_FIRST, (json.dumps(keys),)).fetchall():
            held = json.loads(row["held"])
            answer = {"message": row["id"], **({"held": held} if held else {})}
            files = [(file["name"], file["sha256"]) for file in files_of(row["files"])]
            said = (row["body"], row["body_sha256"], row["in_reply_to"], files)
            to = frozenset([EVERYONE] if row["to_everyone"] else json.loads(row["recipients"]))
            facts.firsts[row["sender"], row["client_id"]] = _First(answer, said, to)
    for sender in {letter.sender for letter in letters if letter.file is not None} & facts.agents.keys():
        facts.agents[sender].kept_bytes = tx.execute(_KEPT, (sender,)).fetchone()[0]
    return facts


@lru_cache(maxsize=1024)
def _policy(raw: str) -> tuple[frozenset[str] | None, int | None]:
    """Whom an agent may write to, and how often an hour; None where its settings do not say."""
    policy = json.loads(raw)
    recipients = policy.get("recipients")
    return None if recipients is None else frozenset(recipients), policy.get("pair_rate_per_hour")


# The newest turn is the one that runs, if any does.
_AGENTS = """
    SELECT name, policy, t.id AS turn_id, t.chain_id, coalesce(t.hops, 0) AS hops,
           (SELECT count(*) FROM deliveries INDEXED BY deliveries_held
            WHERE sender = name AND state = 'held') AS held, refused
    FROM agents LEFT JOIN turns t ON t.id = (SELECT id FROM turns WHERE agent = name ORDER BY id DESC LIMIT 1)
"""
_WAITING = """
    SELECT value AS name, (
        SELECT count(*) FROM deliveries INDEXED BY deliveries_queued WHERE recipient = value AND state = 'queued'
    ) AS waiting FROM json_each(?)
"""
_REPLIED = """
    SELECT id, thread_id, sender,
           (SELECT json_group_array(recipient) FROM deliveries WHERE message_id = id AND state != 'held') AS recipients
    FROM messages WHERE id IN (SELECT value FROM json_each(?))
"""
_FIRST = f"""
    SELECT m.sender, m.client_id, m.id, m.body, m.body_sha256, m.in_reply_to, m.to_everyone, {FILES}, (
        SELECT json_group_array(recipient) FROM deliveries WHERE message_id = m.id
    ) AS recipients, (
        SELECT json_group_object(recipient, held) FROM deliveries WHERE message_id = m.id AND held IS NOT NULL
    ) AS held
    FROM json_each(?) k JOIN messages m ON m.sender = k.value ->> 0 AND m.client_id = k.value ->> 1
"""
_THERE = "SELECT name FROM agents WHERE name IN (SELECT value FROM json_each(?))"
_DESTROYED = "SELECT DISTINCT name FROM tombstones WHERE name IN (SELECT value FROM json_each(?))"
_KEPT = "SELECT coalesce(sum(body_bytes), 0) FROM messages WHERE body_sha256 IS NOT NULL AND sender = ?"


def put_message(
    tx: Transaction,
    sender: AgentName,
    recipient: AgentName,
    body: MessageBody,
    in_reply_to: int | None = None,
    cause: Cause | None = None,
    limits: Limits | None = None,
) -> int:
    """Store one message as a part of another change. Returns its number; raises the Refusal of `post`."""
    letter = Letter(sender, (recipient,), body, in_reply_to, cause=cause)
    answer = post(tx, [letter], limits or Limits())[0].unwrap()
    return int(answer["message"])


def post_counted(tx: Transaction, letter: Letter, limits: Limits) -> dict[str, Any] | Refusal:
    """Send as a part of a change. A refusal is a value here: what `post` counted of it has to stay."""
    try:
        sent: dict[str, Any] = post(tx, [letter], limits)[0].unwrap()
    except Refusal as refusal:
        return refusal
    return sent


def unless_refused(result: dict[str, Any] | Refusal) -> dict[str, Any]:
    """What `post_counted` gave, once the change is stored. Raises the Refusal that it was."""
    if isinstance(result, Refusal):
        raise result
    return result
