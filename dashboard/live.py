"""The live streams: what changed since a page was made, as the rows to swap in, over server-sent events.

A position is a timeline and the number of the last event of it that a page has seen; an agent's page adds the last
line of its stream ("<timeline>-12-345"). A hive that was restored has another timeline: its numbers mean other events.
Each frame carries the position up to which everything was told, so a browser that comes back with it misses nothing
and is told nothing twice. Agents' states are not a log: they are told anew on each connection and whenever they change.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import trio
from markupsafe import Markup
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Message, Receive, Scope, Send

from dashboard.configured import configured_rows
from dashboard.credentials import credential_rows, lacks_credential
from dashboard.deploys import deploys_now
from dashboard.reach import reach_now
from dashboard.rows import Rows
from dashboard.snapshots import snapshots_now
from dashboard.spend import spend_now
from dashboard.tombstones import tombstone_rows
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.agents import LIVE
from hive_core.services.events import events_after, first_kept, timeline
from hive_core.services.flow import messages_of_turns, these_messages
from hive_core.services.ledger import SPENT
from hive_core.services.question_words import Question
from hive_core.store.bus import CREDENTIALS, EVENTS, Listener, stream

REPLAY_LIMIT = 1_000  # events or lines; a page further behind loads itself again
FLOW_LIMIT = 200  # messages a page holds
PING_S = 15
REST_S = 0.05  # between two looks, so that a flood of events costs a bounded number of renderings
RETRY_MS = 1_000
BEGINNINGS = {("message", "message_sent"), ("turn", "turn_started")}
MOVED = frozenset({"message_released", "message_requeued", "message_dropped"})
MESSAGES_OF_EVENT = MOVED | {
    "message_sent",
    "message_dead",
    "messages_given_up",
    "turn_started",
    "messages_taken",
    "inbox_read",
}


@dataclass(frozen=True, slots=True)
class Position:
    timeline: str
    seq: int
    line: int | None = None  # None on the dashboard, which shows no lines

    def __str__(self) -> str:
        return f"{self.timeline}-{self.seq}" + ("" if self.line is None else f"-{self.line}")

    @classmethod
    def parse(cls, text: str, lines: bool) -> Position | None:
        """None when it is not a position of this kind of page: the page has to load itself again."""
        match = re.fullmatch(r"([0-9a-f]{16})-(\d{1,18})(?:-(\d{1,18}))?", text, re.ASCII)
        if match is None or (match[3] is not None) != lines:
            return None
        return cls(match[1], int(match[2]), int(match[3]) if lines else None)


class Fragment(NamedTuple):
    """One row to swap in: replaces `target`; if that is not there, goes into `list` (or nowhere). No html: removed.

    once  leave `target` alone when it is there: it holds more by now than this row does
    """

    target: str
    html: str
    list: str | None = None
    place: str = "append"
    once: bool = False

    def frame(self, position: Position | None) -> ServerSentEvent:
        return ServerSentEvent(json.dumps(self._asdict()), id=None if position is None else str(position))


class Touched(NamedTuple):
    """A thing that events were about: what to render, and the number of the first of those events."""

    kind: str  # message, aside (its card), turn, settled (what its end did to its messages), approval, agent
    id: Any
    seq: int
    new: bool  # made by one of those events


def touched_by(events: Iterable[dict[str, Any]]) -> list[Touched]:
    """Each thing once, in the order in which they were first touched."""
    found: dict[tuple[str, Any], Touched] = {}
    for event in events:
        for kind, id_ in _things(event):
            thing = found.get((kind, id_)) or Touched(kind, id_, event["seq"], False)
            found[kind, id_] = thing._replace(new=thing.new or (kind, event["kind"]) in BEGINNINGS)
    return list(found.values())


def _things(event: dict[str, Any]) -> list[tuple[str, Any]]:
    data, things = event["data"], []
    if event["kind"] in ("agent_created", "agent_reviving"):
        things.append(("agent", event["agent"]))
    if event["kind"] in ("agent_configured", "agent_created", "agent_destroyed"):
        things.append(("configured", event["agent"]))
    if event["kind"] in ("turn_started", "turn_ended", "turn_settled"):
        things.append(("turn", data.get("turn")))
    if event["kind"] == "turn_ended":
        things.append(("settled", data.get("turn")))
    if event["kind"] in MESSAGES_OF_EVENT and "errand" not in data:
        things += [("message", id_) for id_ in (data.get("messages") or [data["message"]])]
    if event["kind"] in MOVED | {"message_dead"} or (event["kind"] == "message_sent" and data.get("held")):
        things.append(("aside", data["message"]))
    if event["kind"] == "agent_destroyed":
        things.append(("agent_gone", event["agent"]))
    if event["kind"] in ("agent_revived", "agent_purged"):
        things.append(("tombstone_gone", data["number"]))
    if event["kind"] == "messages_given_up":
        things += [("aside", id_) for id_ in data["messages"]]
    if event["kind"] in ("swarm_frozen", "swarm_thawed"):
        things.append(("freeze", None))
    if event["kind"].startswith("question_"):
        things.append(("question", data["question"]))
    if event["kind"] in MOVED:
        things.append(("question_of", data["message"]))
    if event["kind"].startswith("approval_"):
        things.append(("approval", data.get("approval")))
    return things


@dataclass(slots=True)
class _Seen:
    """What the rows of one batch are made from."""

    messages: dict[int, dict[str, Any]] = field(default_factory=dict)
    flow: set[int] = field(default_factory=set)  # those of them that a page may still hold
    leased: dict[int, list[int]] = field(default_factory=dict)  # turn → its messages
    turns: dict[int, dict[str, Any]] = field(default_factory=dict)


class Feed:
    """What one page is told. `agent` None is the dashboard."""

    def __init__(self, hive: Hive, agent: str | None, cookie: str) -> None:
        self._hive = hive
        self._agent = agent
        self._cookie = cookie
        self._rows = Rows(hive)
        self._shown: dict[str, str] = {}  # target → a row of an agent, as this page has it
        self._credentials: dict[str, str] = {}  # target → the row of a credential, as well
        self._tombs: dict[str, Markup] = {}  # target → the row of a tombstone
        self._lacks = False  # whether the page says that a credential is missing
        self._moves_shown = -1  # of the ledger
        self._snapshots_shown = -1  # how often an agent's had changed
        self._reach_shown = (-1, -1)  # the same of its connections, and of what is deployed of it

    async def frames(self, after: str) -> AsyncIterator[ServerSentEvent]:
        """Frames after a position, until the hive stops or the browser signs out; `reset` when too far behind."""
        at = Position.parse(after, lines=self._agent is not None)
        if at is not None and at.timeline != await timeline(self._hive.store):
            at = None
        topics = [EVENTS, CREDENTIALS, SPENT, LIVE if self._agent is None else stream(self._agent)]
        with self._hive.store.bus.listen(*topics) as listener:
            yield ServerSentEvent(comment="live", retry=RETRY_MS)
            while not self._hive.stopping.is_set() and await self._hive.sign_ins.valid(self._cookie):
                batch = await self._batch(at) if at is not None else None
                if batch is None:
                    yield ServerSentEvent("", event="reset")
                    return
                at, frames = batch
                for frame in frames:
                    yield frame
                await _wait(listener, self._hive.stopping)

    async def _batch(self, at: Position) -> tuple[Position, list[ServerSentEvent]] | None:
        """Everything that happened after `at`, and the position behind it. None when that is too much."""
        # Lines before events: a line's turn began before it, so its section is told in the same batch or earlier.
        lines = await self._lines(at)
        events = await events_after(self._hive.store, at.seq, REPLAY_LIMIT + 1)
        last = await self._hive.store.last_seq()
        if len(events) > REPLAY_LIMIT or len(lines) > REPLAY_LIMIT or at.seq > last or await self._has_gap(at):
            return None
        try:
            agents = await self._agent_rows()
        except Refusal:
            return None  # it was destroyed: the page that is loaded then says so
        states = [*agents, *self._credential_rows(), *await self._tombstones(), *await self._spend()]
        states += [*await self._snapshots(), *await self._reach()]
        frames = [fragment.frame(None) for fragment in states]
        told = touched_by(events)
        fragments = await self._render(told)
        end = replace(at, seq=events[-1]["seq"] if events else at.seq)
        # Up to the event before the next thing's first, everything has been told.
        behind = [replace(at, seq=thing.seq - 1) for thing in told[1:]] + [end]
        for position, group in zip(behind, fragments, strict=False):
            frames += [fragment.frame(position if fragment is group[-1] else None) for fragment in group]
        for line in lines:
            end = replace(end, line=line["id"])
            frames.append(
                Fragment(f"line-{line['id']}", self._rows.line(line), f"turn-{line['turn']}-lines").frame(end)
            )
        return end, frames

    async def _has_gap(self, at: Position) -> bool:
        """Whether some of what came after a position is not kept any more. Asked after that was read."""
        if at.seq + 1 < await first_kept(self._hive.store):
            return True
        return (
            at.line is not None and self._agent is not None and at.line < await self._hive.turns.lines_gone(self._agent)
        )

    async def _lines(self, at: Position) -> list[dict[str, Any]]:
        if self._agent is None or at.line is None:
            return []
        return await self._hive.turns.lines_after(self._agent, at.line, REPLAY_LIMIT + 1)

    async def _agent_rows(self) -> list[Fragment]:
        """The rows of agents that differ from what this page has."""
        alone = self._agent is not None
        fragments: list[Fragment] = []
        for agent in [await self._hive.agents.get(self._agent)] if self._agent else await self._hive.agents.all():
            rows = [Fragment(f"agent-{agent.name}", self._rows.agent(agent, alone), "agents")]
            if alone:
                rows += [Fragment(f"choice-{what}", self._rows.choice(agent, what)) for what in ("model", "effort")]
            fragments += [row for row in rows if self._shown.get(row.target) != row.html]
            self._shown.update({row.target: row.html for row in rows})
        return fragments

    async def _tombstones(self) -> list[Fragment]:
        """The rows of tombstones that differ from what this page has."""
        if self._agent is not None:
            return []
        before, self._tombs = self._tombs, await tombstone_rows(self._hive)
        changed = [(target, html) for target, html in self._tombs.items() if before.get(target) != html]
        return [Fragment(target, html, "tombstones", "prepend") for target, html in reversed(changed)]

    def _credential_rows(self) -> list[Fragment]:
        """The rows of credentials that differ from what this page has, those that are gone as well."""
        banner, self._lacks = self._banner()
        if self._agent is not None:
            return banner
        rows = credential_rows(self._hive)
        htmls = {f"credential-{name}": str(self._rows.credential(row)) for name, row in rows.items()}
        gone = [target for target in self._credentials if target not in htmls]
        changed = [target for target, html in htmls.items() if self._credentials.get(target) != html]
        self._credentials = htmls
        return [
            *banner,
            *(Fragment(target, "") for target in gone),
            *(Fragment(target, htmls[target], "credentials") for target in changed),
        ]

    def _banner(self) -> tuple[list[Fragment], bool]:
        """The page's word that a credential is missing goes when it has come; whether it is missing."""
        lacks = bool(lacks_credential(self._hive, self._agent))
        return ([Fragment("no-credential", "")] if self._lacks and not lacks else []), lacks

    async def _spend(self) -> list[Fragment]:
        """What is spent, where that is another sum than this page has."""
        moves = self._hive.ledger.moves
        if moves == self._moves_shown:
            return []
        html = await spend_now(self._hive, AgentName(self._agent) if self._agent else None)
        self._moves_shown = moves
        return [Fragment("spend-now", html)]

    async def _snapshots(self) -> list[Fragment]:
        """The snapshots of an agent, where they are others than this page has."""
        if (
            self._agent is None
            or (moves := self._hive.snapshots.moves(AgentName(self._agent))) == self._snapshots_shown
        ):
            return []
        html = await snapshots_now(self._hive, AgentName(self._agent))
        self._snapshots_shown = moves
        return [Fragment("snapshots-now", html)]

    async def _reach(self) -> list[Fragment]:
        """What an agent reached, where that is something else than this page has."""
        if self._agent is None:
            return []
        moves = self._hive.connections.moves(AgentName(self._agent)), self._hive.egress.moves
        if moves == self._reach_shown:
            return []
        html = await reach_now(self._hive, AgentName(self._agent))
        self._reach_shown = moves
        return [Fragment("reach-now", html)]

    async def _render(self, told: list[Touched]) -> list[list[Fragment]]:
        """The fragments of each thing, in the same order."""
        kinds = {thing.kind for thing in told}
        seen = _Seen()
        if "settled" in kinds:
            seen.leased = await messages_of_turns(self._hive.store, (it.id for it in told if it.kind == "settled"))
        numbers = {it.id for it in told if it.kind == "message"}.union(*seen.leased.values())
        seen.flow = set(sorted(numbers)[-FLOW_LIMIT:])
        if numbers := seen.flow | {it.id for it in told if it.kind == "aside"}:
            seen.messages = await these_messages(self._hive.store, numbers, self._agent)
        if self._agent is not None and "turn" in kinds:
            seen.turns = {turn["id"]: turn for turn in await self._hive.turns.recent(self._agent)}
        return [await self._fragments(thing, seen) for thing in told]

    async def _fragments(self, thing: Touched, seen: _Seen) -> list[Fragment]:
        match thing.kind:
            case "message" if thing.id in seen.flow and thing.id in seen.messages:
                return [self._message(seen.messages[thing.id], thing.new)]
            case "settled":
                numbers = [number for number in seen.leased.get(thing.id, []) if number in seen.flow]
                return [self._message(seen.messages[number], False) for number in numbers if number in seen.messages]
            case "aside" if self._agent is None:
                message = seen.messages.get(thing.id)
                return [Fragment(f"aside-{thing.id}", self._rows.aside(message) if message else "", "aside")]
            case "turn" if thing.id in seen.turns:
                return self._turn(seen.turns[thing.id], thing.new)
            case "freeze":
                return [Fragment("freeze", self._rows.freeze())]
            case "approval" if self._agent is None:
                return await self._approval(thing.id)
            case "approval":
                return await self._deploys(thing.id)
            case "question" if self._agent is None:
                return await self._question(await self._hive.questions.find(thing.id))
            case "question_of" if self._agent is None:
                return await self._question(await self._hive.questions.put_with(thing.id))
            case "agent_gone" if self._agent is None and not await self._is_there(thing.id):
                self._shown.pop(f"agent-{thing.id}", None)
                return [Fragment(f"{what}-{thing.id}", "") for what in ("agent", "to", "budget-of")]
            case "tombstone_gone" if self._agent is None:
                return [Fragment(f"tombstone-{thing.id}", "")]
            case "configured" if self._agent is None:
                target = f"configured-{thing.id}"
                return [Fragment(target, (await configured_rows(self._hive)).get(target, ""), "configured")]
            case "agent" if self._agent is None:
                return [
                    Fragment(f"to-{thing.id}", self._rows.recipient(thing.id), "recipients"),
                    Fragment(f"budget-of-{thing.id}", self._rows.recipient(thing.id, "budget-of"), "budget-scope"),
                ]
        return []

    async def _is_there(self, name: str) -> bool:
        return any(agent.name == name for agent in await self._hive.agents.all())

    def _message(self, message: dict[str, Any], new: bool) -> Fragment:
        return Fragment(f"message-{message['id']}", self._rows.message(message), "flow" if new else None)

    def _turn(self, turn: dict[str, Any], new: bool) -> list[Fragment]:
        head = Fragment(f"turn-{turn['id']}-head", self._rows.turn_head(turn))
        return [Fragment(f"turn-{turn['id']}", self._rows.turn(turn, []), "turns", once=True), head] if new else [head]

    async def _question(self, question: Question | None) -> list[Fragment]:
        """A card while the operator may answer it."""
        if question is None or question.answerer != OPERATOR:
            return []
        waits = await self._hive.questions.reaches(question)
        return [Fragment(f"question-{question.id}", self._rows.question(question) if waits else "", "pending")]

    async def _approval(self, approval_id: int) -> list[Fragment]:
        try:
            approval = await self._hive.approvals.get(approval_id)
        except Refusal:
            return []
        if approval.state == "pending":
            return [Fragment(f"approval-{approval.id}", self._rows.approval(approval), "pending")]
        decision = Fragment(f"decision-{approval.id}", self._rows.decision(approval), "decided", "prepend")
        return [Fragment(f"approval-{approval.id}", ""), decision]

    async def _deploys(self, approval_id: int) -> list[Fragment]:
        """An agent's deployments, when one of them came a step further, or to its end."""
        try:
            approval = await self._hive.approvals.get(approval_id)
        except Refusal:
            return []
        if approval.agent != self._agent or approval.state not in ("approved", "done", "failed"):
            return []
        return [Fragment("deploys-now", await deploys_now(self._hive, approval.agent))]


async def _wait(listener: Listener, stopping: trio.Event) -> None:
    """Until something was published, and a little longer; or at once when the hive stops."""

    async def until_stopping(scope: trio.CancelScope) -> None:
        await stopping.wait()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_stopping, nursery.cancel_scope)
        await listener.wait()
        await trio.sleep(REST_S)
        nursery.cancel_scope.cancel()


class LiveResponse(EventSourceResponse):
    """sse-starlette's response, made to end well under hypercorn on trio.

    hypercorn tells the application of the end of its own answer as a disconnect, from inside the last `send`; the
    response then cancels the group in which that `send` still runs, the connection is never given back, and a stop
    waits the whole graceful timeout (3.0 s of 3 measured; 0.002 s with this shield). A reader that does not read
    cannot be ended from here, `send_timeout` included, because hypercorn shields its writes: that is for the listening
    socket (TCP_USER_TIMEOUT).
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_to_the_end(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body")
            with trio.CancelScope(shield=last):
                await send(message)

        await super().__call__(scope, receive, send_to_the_end)


def live_response(hive: Hive, agent: str | None, after: str, cookie: str) -> LiveResponse:
    frames = Feed(hive, agent, cookie).frames(after)
    return LiveResponse(frames, ping=PING_S, ping_message_factory=lambda: ServerSentEvent(comment="ping"))
