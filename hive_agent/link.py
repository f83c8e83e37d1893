"""The link to the host: one client of harness.sock that outlives the daemon on the other side.

A request is asked until a host has answered it. What is told beside the turns has a lane of its own, so that it need
not wait while a lease waits for mail. Each new connection begins with a hello that names the turn in
flight, so that the next daemon adopts it instead of giving its message to another turn.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from typing import Any

import trio

from hive_core.protocol.harness import PROTOCOL_VERSION
from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

RETRY_FIRST_S = 0.1
RETRY_LAST_S = 1.0
HELLO_LIMIT_S = 15.0
TURN_GRACE_S = 600.0  # how much longer than an idle harness one waits whose program runs
GRACE_WHEN_STOPPING_S = 10.0
READ_BYTES = 64 * 1024

EXIT_DONE = 0
EXIT_CONFLICT = 3  # another harness serves this agent
EXIT_MISMATCH = 4  # host and harness do not fit together


class Unwelcome(Exception):
    """The host will not have this harness. It ends with `exit_code`; trying again would change nothing."""

    def __init__(self, exit_code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class _Hangup(Exception):
    """The connection is of no use any more."""


class _Request:
    def __init__(self, request_id: int, form: Mapping[str, Any]) -> None:
        self.id = request_id
        self.form = {"id": request_id, **form}
        self.answer: dict[str, Any] = {}
        self.answered = trio.Event()


class _Lane:
    """Requests that are asked one after the other."""

    def __init__(self) -> None:
        self.requests_in, self.requests_out = trio.open_memory_channel[_Request](0)
        self.asking = trio.Lock()
        self.current: _Request | None = None


class _Answers:
    """The objects that come over a connection. Raises _Hangup at its end, whatever ended it."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._splitter = LineSplitter()
        self._ready: deque[bytes | Refusal] = deque()

    async def next(self) -> dict[str, Any]:
        while not self._ready:
            try:
                data = await self._stream.receive_some(READ_BYTES)
            except trio.BrokenResourceError:
                raise _Hangup from None
            if not data:
                raise _Hangup
            self._ready.extend(self._splitter.feed(data))
        line = self._ready.popleft()
        try:
            if isinstance(line, Refusal):
                raise line
            return decode(line)
        except Refusal:
            raise _Hangup from None  # not this protocol: a new connection may find a host that speaks it


class HostLink:
    """`run` keeps the connection; `request` asks, one request at a time, and `tell` does beside it.

    agent, role   who this is, said by the host's hello; "" before it
    """

    def __init__(self, path: str, *, role: str = "", orphan_grace_s: float = 600.0) -> None:
        self._path = path
        self._expected_role = role
        self._grace_s = orphan_grace_s
        self._instance = secrets.token_hex(16)
        self._turns, self._beside = self._lanes = _Lane(), _Lane()
        self._sending = trio.Lock()
        self._last_id = 0
        self._fences: tuple[str, ...] = ()
        self._busy = False
        self._lost_at = trio.current_time()
        self.agent = ""
        self.role = ""
        self.welcomed = trio.Event()

    def hold(self, *fences: str) -> None:
        """Every hello names these from now on: the fence of the turn that runs, and of one that is asked for."""
        self._fences = fences

    def begin_turn(self) -> None:
        """The link does not give up while the program of a turn runs."""
        self._busy = True

    def program_ended(self) -> None:
        self._busy = False

    def hurry(self) -> None:
        """Stopping: wait for a host that is away only a little."""
        self._grace_s = min(self._grace_s, GRACE_WHEN_STOPPING_S)

    async def request(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """Ask the host, again after every reconnect, until it has answered. Raises Refusal when it says no.

        When cancelled the request may have been heard, or may still be sent.
        """
        return await self._ask(self._turns, form)

    async def tell(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """As `request`, also while one is not answered yet."""
        return await self._ask(self._beside, form)

    async def _ask(self, lane: _Lane, form: Mapping[str, Any]) -> dict[str, Any]:
        async with lane.asking:
            self._last_id += 1
            request = _Request(self._last_id, form)
            await lane.requests_in.send(request)
            await request.answered.wait()
        if request.answer.get("ok") is not True:
            raise Refusal.from_wire(request.answer.get("error"))
        return request.answer

    async def run(self) -> None:
        """Keep a connection to the host; return when none answered for the grace, or 600 s more while a turn runs.

        Raises Unwelcome.
        """
        retry_s = RETRY_FIRST_S
        while (away_s := trio.current_time() - self._lost_at) < self._grace_s or (
            # A turn is finished first; one that waits for the host itself would wait for ever.
            self._busy and away_s < self._grace_s + TURN_GRACE_S
        ):
            if await self._converse():
                retry_s = RETRY_FIRST_S
                self._lost_at = trio.current_time()
            await trio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_LAST_S)

    async def _converse(self) -> bool:
        """Use one connection to its end. Returns whether a host welcomed us on it."""
        welcome = False
        try:
            async with await trio.open_unix_socket(self._path) as stream:
                answers = _Answers(stream)
                await self._hello(stream, answers)
                welcome = True
                self.welcomed.set()
                async with trio.open_nursery() as nursery:
                    for lane in self._lanes:
                        nursery.start_soon(self._write_requests, stream, lane)
                    await self._read_answers(answers)
                    nursery.cancel_scope.cancel()
        except (OSError, trio.BrokenResourceError, _Hangup):
            pass  # the next connection may do better
        return welcome

    async def _hello(self, stream: trio.SocketStream, answers: _Answers) -> None:
        form = {"op": "hello", "version": PROTOCOL_VERSION, "instance": self._instance, "fences": self._fences}
        form["checks"] = True
        with trio.move_on_after(HELLO_LIMIT_S) as limit:
            await stream.send_all(encode({"id": 0, **form}))
            answer = await answers.next()
        if limit.cancelled_caught:
            raise _Hangup
        self._check_welcome(answer)

    def _check_welcome(self, answer: dict[str, Any]) -> None:
        if answer.get("ok") is not True:
            refusal = Refusal.from_wire(answer.get("error"))
            if refusal.code == "unavailable":
                raise _Hangup
            code = EXIT_CONFLICT if refusal.code == "conflict" else EXIT_MISMATCH
            raise Unwelcome(code, f"cannot serve this agent: {refusal.message}")
        if answer.get("version") != PROTOCOL_VERSION:
            raise Unwelcome(
                EXIT_MISMATCH,
                f"cannot serve this agent: the host speaks version {answer.get('version')!r} of the protocol "
                f"and this harness version {PROTOCOL_VERSION}; start both from the same release",
            )
        self.agent, self.role = str(answer.get("agent", "")), str(answer.get("role", ""))
        if self._expected_role and self.role != self._expected_role:
            raise Unwelcome(
                EXIT_MISMATCH,
                f"cannot serve {self.agent} as {self._expected_role}: the host says its role is {self.role}",
            )

    async def _write_requests(self, stream: trio.SocketStream, lane: _Lane) -> None:
        """Send what was left without an answer, then what is asked, each after the answer to the one before."""
        try:
            while True:
                if lane.current is None:
                    lane.current = await lane.requests_out.receive()
                async with self._sending:
                    await stream.send_all(encode(lane.current.form))
                await lane.current.answered.wait()
                lane.current = None
        except trio.BrokenResourceError:
            return  # the reader sees the end too

    async def _read_answers(self, answers: _Answers) -> None:
        try:
            while True:
                answer = await answers.next()
                asked = [lane.current for lane in self._lanes if lane.current is not None]
                request = next((one for one in asked if one.id == answer.get("id")), None)
                if request is None:
                    return  # an answer to nothing that was asked here
                request.answer = answer
                request.answered.set()
        except _Hangup:
            return
