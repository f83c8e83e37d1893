"""harness.sock: hello, lease, lines and ack, for one agent. The forms are in protocol/harness.py."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from hive_core.protocol.harness import (
    FENCE_LIMIT,
    LINES_PER_REQUEST,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    REQUEST_LIMIT_BYTES,
    STREAM_LINE_LIMIT_BYTES,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_id
from hive_core.services.agents import Agents
from hive_core.services.background import Background, parse_work
from hive_core.services.broker import Broker
from hive_core.services.leases import Lease, Turn, begin_turn
from hive_core.services.turn_records import add_record
from hive_core.services.turns import Turns
from hive_core.sockets.claims import claimed_end, claimed_session, claimed_state, claimed_usage, printable
from hive_core.sockets.harness_checks import AskedCheck, Checked, Checks
from hive_core.sockets.silence import Silence
from hive_core.sockets.unix import Connection, Lines
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
Request = dict[str, Any] | Refusal
FENCES_LIMIT = 2  # the turn that runs, and one that is asked for
READ_AHEAD = 2  # requests that may lie behind a lease: a harness asks one at a time, and each may have 8 MiB
ERROR_LIMIT = 2000
VERBS = ("lease", "lines", "ack", "background", "unasked_turn", "checked", "projects")  # after hello
BESIDE = ("background", "unasked_turn")  # what a harness tells of while its lease waits


@dataclass(slots=True)
class HarnessDesk:
    """What the host keeps for one agent's harness: who is connected, and whether it is asked to stop."""

    name: AgentName
    role: str
    broker: Broker
    turns: Turns
    agents: Agents
    background: Background
    credential_kind: Callable[[], str]
    limited: Callable[[int], None] = lambda _: None  # hears until when its program says that it is limited
    projects: Callable[[], Awaitable[list[dict[str, Any]]]] | None = None  # has those of the agent fetched
    instance: str | None = None
    session: _Session | None = None
    stops: bool = False  # whatever harness there is has to end at its turn's edge
    given: dict[str, Any] | None = None  # the last turn, as its harness got it
    outdated: str | None = None  # the instance that has to, being of an older version
    said_hello: trio.Event = field(default_factory=trio.Event)
    at_edge: Callable[[], None] = lambda: None  # called between two turns
    checks: Checks = field(default_factory=Checks)
    silence: Silence = field(init=False)

    def __post_init__(self) -> None:
        self.silence = Silence(self.broker.limits.lease_silence_s)

    def lost_turn(self, silence_s: float) -> None:
        """Its harness said nothing for so long, and its turn was taken away."""
        self.silence.lost_turn()
        self.agents.observe_silence(self.name, silence_s)

    def call_at_edges(self, call: Callable[[], None]) -> None:
        """Call this whenever the harness is between two turns; it may ask it to stop."""
        self.at_edge = call

    async def hung(self) -> str:
        """Return why the harness of a container that runs counts as hung, once it does."""
        return await self.silence.lasts()

    def expect(self) -> None:
        """Its container is started: what is known of the harness before does not hold for the next one."""
        self.stops, self.outdated, self.said_hello = False, None, trio.Event()
        self.checks.can = False

    @property
    def asked_to_stop(self) -> bool:
        """Whether its harness is to end at its turn's edge, or was when it was connected."""
        return self.stops or self.outdated is not None

    def ask_to_stop(self) -> None:
        """Let no turn begin any more, and tell the harness so with its next answer."""
        self.stops = True
        if self.session is not None:
            self.session.end_wait()

    def hold(self, held: bool) -> None:
        """Let no turn begin while it is held, though its harness stays; what is asked of it meanwhile is a check."""
        self.checks.hold(held)
        if held and self.session is not None:
            self.session.end_wait()

    async def check(self, prompt: str | None = None) -> Checked | None:
        """Have its harness, which is held and has said hello, see whether its program comes up, and answers a prompt.

        None of a harness that cannot be asked.
        """
        return await self.checks.ask(prompt) if self.checks.can else None

    @property
    def begins_none(self) -> bool:
        """Whether the harness that is connected gets no new turn, and has to end."""
        return self.stops or (self.outdated is not None and self.outdated == self.instance)

    async def serve(self, stream: Connection) -> None:
        """Answer one connection until it hangs up."""
        session = _Session(self, Lines(stream, REQUEST_LIMIT_BYTES))
        try:
            await session.serve()
        finally:
            session.close()


class _Session:
    """Requests are answered in their order. A lease may wait for long, so it has a task: a hang-up must be seen."""

    __slots__ = ("_behind", "_desk", "_lease_scope", "_leases", "_left", "_sending", "_wire")

    def __init__(self, desk: HarnessDesk, wire: Lines) -> None:
        self._desk = desk
        self._wire = wire
        self._left = False
        self._lease_scope: trio.CancelScope | None = None
        self._leases = False
        self._sending = trio.Lock()
        self._behind: deque[Request] = deque()  # what came while a lease waits

    async def serve(self) -> None:
        async with trio.open_nursery() as nursery:
            while (request := await self._wire.next()) is not None:
                if isinstance(request, dict) and request.get("op") in BESIDE:
                    await self._send(await self.answer(request))
                elif self._leases:
                    if len(self._behind) == READ_AHEAD:
                        break  # who fills that up behind a lease is let go
                    self._behind.append(request)
                elif isinstance(request, dict) and request.get("op") == "lease":
                    self._leases = True
                    nursery.start_soon(self._answer_lease, request)
                else:
                    await self._send(await self.answer(request))
            self.leave()

    async def _answer_lease(self, request: Request) -> None:
        await self._send(await self.answer(request))
        while self._behind:
            await self._send(await self.answer(self._behind.popleft()))
        self._leases = False

    async def _send(self, answer: dict[str, Any]) -> None:
        async with self._sending:
            await self._wire.send(answer)

    @property
    def _welcome(self) -> bool:
        return self._desk.session is self

    def leave(self) -> None:
        """Lease no more: the harness has hung up, or connected again."""
        self._left = True
        self.end_wait()

    def end_wait(self) -> None:
        """Cut a lease that waits."""
        if self._lease_scope is not None:
            self._lease_scope.cancel()

    def close(self) -> None:
        if self._welcome:
            self._desk.session = self._desk.instance = None
            self._desk.silence.not_connected()

    async def answer(self, request: Request) -> dict[str, Any]:
        number = None
        if self._welcome:
            self._desk.silence.ended()
        try:
            if isinstance(request, Refusal):
                raise request
            number = _number(request)
            return {"id": number, "ok": True, **await self._do(request)}
        except Refusal as refusal:
            return {"id": number, "ok": False, "error": refusal.to_wire()}

    async def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        match request.get("op"):
            case "hello":
                return await self._hello(request)
            case str(op) if op in VERBS and not self._welcome:
                raise Refusal("usage", "cannot do anything before hello")
            case "lease":
                return await self._lease(_fence(request.get("fence")))
            case "lines":
                return await self._lines(request)
            case "ack":
                return await self._ack(request)
            case "background":
                return await self._background(request)
            case "unasked_turn":
                key = _fence(request.get("key"))
                return {"counted": await self._desk.background.tell_unasked_turn(self._desk.name, key)}
            case "checked":
                return {"counted": self._desk.checks.answered(request, _error_of(request, 400))}
            case "projects":
                return {"projects": await self._desk.projects() if self._desk.projects is not None else []}
            case other:
                raise Refusal("usage", f"cannot do {ascii(other)[:40]}: the verbs are hello, {', '.join(VERBS)}")

    async def _hello(self, request: dict[str, Any]) -> dict[str, Any]:
        desk = self._desk
        version, instance = request.get("version"), request.get("instance")
        if type(version) is not int or not OLDEST_VERSION <= version <= PROTOCOL_VERSION:
            raise _no_common_version(version)
        if not isinstance(instance, str) or not 0 < len(instance) <= 64:
            raise Refusal("usage", "cannot say hello without an instance of 1 to 64 characters")
        if desk.instance not in (None, instance):
            log.warning("a second harness of %s was refused", desk.name, extra={"agent": desk.name})
            raise Refusal("conflict", f"cannot take a second harness for {desk.name}: {desk.instance} is connected")
        fences = request.get("fences")
        if not isinstance(fences, list) or len(fences) > FENCES_LIMIT:
            raise Refusal("usage", f"cannot say hello: `fences` must be a list of at most {FENCES_LIMIT}")
        if desk.session is not None and desk.session is not self:
            desk.session.leave()  # the same harness, whose hang-up was not seen yet
        desk.session, desk.instance = self, instance
        found = await desk.broker.close_lost_turns(desk.name, [_fence(fence) for fence in fences])
        for turn_id in found.lost:
            log.warning("turn %d of %s was lost with its harness", turn_id, desk.name, extra={"agent": desk.name})
        if version < PROTOCOL_VERSION and desk.outdated != instance:
            await desk.agents.tell_outdated(desk.name, version, PROTOCOL_VERSION, found.alive)
            desk.outdated = instance
        if found.alive is not None:
            desk.agents.observe(desk.name, "thinking")
            desk.silence.ended()
        else:
            desk.agents.observe_rest(desk.name)
            desk.silence.asks_nothing()
        desk.checks.can = request.get("checks") is True
        desk.said_hello.set()
        return {"version": version, "agent": desk.name, "role": desk.role}

    async def _lease(self, fence: str) -> dict[str, Any]:
        desk = self._desk
        lease: Lease | None = None
        desk.at_edge()
        while not desk.begins_none and not self._left and lease is None:
            changed = desk.checks.changed
            with trio.CancelScope() as self._lease_scope:
                if desk.checks.held:
                    if (asked := desk.checks.asked) is not None:
                        return {"check": await self._check(asked)}
                    await changed.wait()
                else:
                    lease = await desk.broker.lease(desk.name, fence)
        self._lease_scope = None
        if lease is None and self._left:
            raise Refusal("conflict", "cannot lease: this harness has hung up or connected again")
        if lease is None:
            desk.silence.asks_nothing()  # until it ends
            return {"stop": True}
        return self._as_form(lease)

    async def _check(self, asked: AskedCheck) -> dict[str, Any]:
        agent = await self._desk.agents.get(self._desk.name)
        chosen = {"model": agent.chosen_model, "effort": agent.chosen_effort}
        settings = {**(agent.settings or {}), **{key: value for key, value in chosen.items() if value}}
        prompt = {} if asked.prompt is None else {"prompt": asked.prompt}
        return {"check": asked.key, "settings": settings, "credential": self._desk.credential_kind(), **prompt}

    def _as_form(self, lease: Lease) -> dict[str, Any]:
        desk = self._desk
        desk.agents.observe(desk.name, "compacting" if lease.errand == "compact" else "thinking")
        desk.given = self._given(lease)
        return desk.given

    def _given(self, lease: Lease) -> dict[str, Any]:
        return {
            "turn": lease.turn.id,
            "fence": lease.turn.fence,
            "message": lease.message,
            "errand": lease.errand,
            "waiting": lease.waiting,
            "refused": lease.refused,
            "settings": lease.settings,
            "session": lease.session,
            "credential": self._desk.credential_kind(),
        }

    async def _lines(self, request: dict[str, Any]) -> dict[str, Any]:
        desk = self._desk
        turn_id, first, lines = parse_id(request.get("turn"), "a turn"), request.get("first"), request.get("lines")
        if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < 2**40:
            raise Refusal("usage", "cannot take the lines: `first` must be a whole number from 0")
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise Refusal("usage", "cannot take the lines: `lines` must be a list of strings")
        if len(lines) > LINES_PER_REQUEST:
            raise Refusal("usage", f"cannot take {len(lines)} lines at once: the limit is {LINES_PER_REQUEST}")
        if any(len(line.encode("utf-8", "replace")) > STREAM_LINE_LIMIT_BYTES for line in lines):
            raise Refusal("usage", f"cannot take a line over {STREAM_LINE_LIMIT_BYTES:,} bytes")
        clean = [line.encode("utf-8", "replace").decode() for line in lines]
        # Whoever speaks lives, also while the disk takes no lines; whether the turn runs is asked behind them.
        desk.broker.renew(desk.name, turn_id)
        record = partial(self._record, turn_id, request.get("prompt_sha256"))
        kept = await desk.turns.add_lines(desk.name, turn_id, first, clean, record) if clean else 0
        running = desk.broker.renew(desk.name, turn_id)
        if running and (seen := claimed_state(request.get("state"))):
            desk.agents.observe(desk.name, seen.state, seen.detail, until_ms=seen.until_ms)
        return {"kept": kept, "running": running}

    def _record(self, turn_id: int, prompt_sha256: object, tx: Transaction) -> None:
        desk, given = self._desk, self._desk.given
        if given is None or given["turn"] != turn_id:
            # The daemon that began the turn is gone. The same lease again says what is left of it.
            (fence,) = tx.execute("SELECT fence FROM turns WHERE id = ?", (turn_id,)).fetchone()
            lease = begin_turn(tx, desk.name, fence, desk.broker.limits)
            given = {**self._given(lease), "later": True} if lease is not None else None
        if given is not None:
            add_record(tx, desk.name, given, prompt_sha256)

    async def _background(self, request: dict[str, Any]) -> dict[str, Any]:
        desk = self._desk
        if request.get("state") == "none":
            return {"counted": await desk.background.none_runs(desk.name)}
        return {"counted": await desk.background.tell(desk.name, parse_work(request))}

    async def _ack(self, request: dict[str, Any]) -> dict[str, Any]:
        desk = self._desk
        turn_id, fence = parse_id(request.get("turn"), "a turn"), _fence(request.get("fence"))
        next_fence = None if request.get("next") is None else _fence(request["next"])
        desk.at_edge()
        # Whoever acks lives: while the disk takes no ack, the turn must not be lost for silence.
        runs, told = desk.broker.renew(desk.name, turn_id), claimed_end(request)
        if runs and told.limited_until_ms is not None:
            desk.limited(told.limited_until_ms)  # before the ack, which may begin the next turn
        acked = await desk.broker.ack(
            desk.name,
            Turn(turn_id, fence),
            str(request.get("outcome")),
            error=_error_of(request, ERROR_LIMIT) or None,
            usage=claimed_usage(request.get("usage")),
            session=claimed_session(request.get("session")),
            next_fence=None if desk.begins_none or desk.checks.held else next_fence,
            told=told,
        )
        answer = {"counted": acked.counted, "stop": desk.begins_none}
        if acked.lease is not None:
            return {**answer, "lease": self._as_form(acked.lease)}
        # What kept a turn from ending well stays in view until the next one begins.
        state = "waiting" if request.get("outcome") == "waiting" else "idle"
        detail = _error_of(request, 200)
        desk.agents.observe_rest(desk.name, state, detail)
        if self._welcome:
            desk.silence.asks_nothing()
        return answer


def _error_of(request: dict[str, Any], limit: int) -> str:
    """What a harness says went wrong, as it may be shown; an empty text where it says nothing."""
    error = request.get("error")
    return printable(error, limit) if isinstance(error, str) and error else ""


def _fence(raw: object) -> str:
    """What a harness chose to know its turn by."""
    if not isinstance(raw, str) or not raw.isascii() or not raw.isprintable() or not 0 < len(raw) <= FENCE_LIMIT:
        raise Refusal("usage", f"cannot use the fence: give 1 to {FENCE_LIMIT} visible ASCII characters")
    return raw


def _no_common_version(version: object) -> Refusal:
    """What is said to a harness that no turn can be finished with."""
    newer = type(version) is int and version > PROTOCOL_VERSION
    way_out = (
        "it is of a newer release: start the hive with that release, or restart the agent"
        if newer
        else "restart the agent so that both are of one release"
    )
    return Refusal(
        "refused",
        f"cannot talk to this harness: it speaks version {ascii(version)[:20]} of the protocol and this host "
        f"{OLDEST_VERSION} to {PROTOCOL_VERSION}; {way_out}",
    )


def _number(request: dict[str, Any]) -> int | None:
    """The request's own number, which its answer carries."""
    number = request.get("id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
        raise Refusal("usage", "cannot answer: `id` must be a whole number")
    return number
