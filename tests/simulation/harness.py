"""A simulated agent: a harness that keeps its turns as the real one does, around a program that is chance alone.

It goes silent, dies in the middle of a turn and comes back, acks what was taken away from it; its program sends,
receives, answers too much or fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from hive_core.protocol.harness import PROTOCOL_VERSION, RENEW_EVERY_S
from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, OPERATOR, AgentName, MessageBody
from hive_core.services.broker import RECV_LIMIT
from hive_core.services.reminders import When
from tests.simulation.host import Host
from tests.simulation.weather import Chance

RETRY_LAST_S = 2.0
LONGEST_REBOOT_S = 600.0
NEXT_CONTAINER_S = 10.0
LATEST_REMINDER_S = 7200.0
RENEWALS_A_DAY = 100  # of an agent, about
TURNS_A_DAY = 35
WINDOW_TOKENS = 200_000
LONGEST_TURN_TOKENS = 40_000  # of what a turn leaves behind in its session
COMPACTED_TOKENS = 20_000
CALL_AGAIN_S = 5.0
CALLS_IN_A_ROW = 3  # of one that is turned away


class _Hangup(Exception):
    pass


class Link:
    """One client of the harness desk: asks until it is answered, and names its fences after each reconnect."""

    def __init__(self, host: Host, name: AgentName, instance: str, chance: Chance) -> None:
        self._host, self._name, self._instance, self._chance = host, name, instance, chance
        self._asked: dict[str, Any] | None = None
        self._wake = trio.Event()
        self._answered = trio.Event()
        self._answer: dict[str, Any] = {}
        self._last_id = 0
        self.fences: list[str] = []

    async def request(self, form: dict[str, Any]) -> dict[str, Any]:
        self._last_id += 1
        self._asked, self._answered = {"id": self._last_id, **form}, trio.Event()
        self._wake.set()
        await self._answered.wait()
        self._asked = None
        if not self._answer["ok"]:
            raise Refusal.from_wire(self._answer["error"])
        return self._answer

    async def run(self) -> None:
        """Keep a connection, until cancelled."""
        while True:
            try:
                async with self._host.connect(self._name) as stream:
                    await self._converse(stream)
            except (_Hangup, trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            await trio.sleep(self._chance.random() * RETRY_LAST_S)

    async def _converse(self, stream: trio.abc.Stream) -> None:
        splitter = LineSplitter()
        hello = {"id": 0, "op": "hello", "version": PROTOCOL_VERSION, "instance": self._instance, "fences": self.fences}
        if not (await _ask(stream, splitter, hello))["ok"]:
            raise _Hangup
        while True:
            if (asked := self._asked) is None:
                # Whoever does not listen would not see that the daemon has died; the next request sees it.
                self._wake = trio.Event()
                await self._wake.wait()
                continue
            if asked["op"] == "lease":
                self._host.witness.free_since_ms[self._name] = self._host.now_ms()
            self._answer = await _ask(stream, splitter, asked)
            self._host.witness.heard_ms[self._name] = self._host.now_ms()
            if self._asked is asked:
                self._asked = None
                self._answered.set()


async def _ask(stream: trio.abc.Stream, splitter: LineSplitter, form: dict[str, Any]) -> dict[str, Any]:
    await stream.send_all(encode(form))
    while True:
        if not (data := await stream.receive_some(64 * 1024)):
            raise _Hangup
        for line in list(splitter.feed(bytes(data))):
            assert isinstance(line, bytes)
            return decode(line)


class Agent:
    def __init__(self, host: Host, name: AgentName, seed: int) -> None:
        self._host, self.name = host, name
        self._peers = [other for other in host.names if other != name]
        self._chance = Chance(seed, name)
        self._weather = host.weather
        self._numbers = 0
        self._instances = 0
        self._context_tokens = 0
        self._said: dict[str, Any] = {}  # what the next ack tells besides its outcome
        self.wanted = trio.Event()  # set when it is wanted up again

    def _new(self, what: str) -> str:
        self._numbers += 1
        return f"{self.name}-{what}-{self._numbers}"

    async def live(self) -> None:
        """One harness after another, until cancelled."""
        while True:
            while self.name in self._host.wanted_down:
                await self.wanted.wait()
            with trio.move_on_after(self._chance.rest_s(self._weather.crashes_a_day)) as life:
                self._host.containers[self.name] = life
                async with self._linked() as link:
                    await self._take_turns(link)
            del self._host.containers[self.name]
            if self._host.witness.hung_since_ms.pop(self.name, None) is not None:
                await trio.sleep(self._chance.random() * NEXT_CONTAINER_S)
            elif life.cancelled_caught:
                self._host.witness.counts["crashes"] += 1
                await trio.sleep(self._chance.random() * LONGEST_REBOOT_S)
            else:
                await trio.sleep(1)

    @asynccontextmanager
    async def _linked(self) -> AsyncIterator[Link]:
        self._instances += 1
        link = Link(self._host, self.name, f"{self.name}-{self._instances}", self._chance)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            yield link
            nursery.cancel_scope.cancel()

    async def _take_turns(self, link: Link) -> None:
        lease: dict[str, Any] | None = None
        while True:
            if lease is None and (lease := await self._lease(link)) is None:
                return
            lease = await self._take_turn(link, lease)

    async def _lease(self, link: Link) -> dict[str, Any] | None:
        fence = self._new("fence")
        link.fences = [fence]
        while True:
            try:
                answer = await link.request({"op": "lease", "fence": fence})
            except Refusal:
                self._host.witness.free_since_ms.pop(self.name, None)
                await trio.sleep(2)
            else:
                return None if answer.get("stop") else self._begin(answer, fence)

    def _begin(self, lease: dict[str, Any], fence: str) -> dict[str, Any]:
        witness = self._host.witness
        if lease["fence"] != fence:
            raise witness.broken(f"{self.name} asked for a turn with {fence} and got {lease['fence']}")
        messages = [] if lease["errand"] else [lease["message"]]
        witness.began(self.name, lease["turn"], None if lease["errand"] else lease["message"]["id"])
        witness.leased(self.name, lease["turn"], fence, messages)
        return lease

    async def _take_turn(self, link: Link, lease: dict[str, Any]) -> dict[str, Any] | None:
        """Run the program, and ack. Returns the next lease, where the host began it with the same commit."""
        turn, fence = lease["turn"], lease["fence"]
        outcome, self._said = "cancelled", {}
        if self._host.troubled and self._chance.happens(self._weather.hangs_a_day / TURNS_A_DAY):
            await self._hang()
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as program:
                nursery.start_soon(self._renew, link, turn, program)
                outcome = await self._think(lease)
            nursery.cancel_scope.cancel()
        next_fence = self._new("fence")
        link.fences = [fence, next_fence]
        ack = {"turn": turn, "fence": fence, "outcome": outcome, "session": f"session of {self.name}", "error": None}
        ack |= {"usage": None, "context": {"tokens": self._context_tokens, "window": WINDOW_TOKENS}, **self._said}
        if outcome != "done":
            ack["error"] = "the program said no"
        if self._chance.happens(0.01):
            await self._forge(link, ack)
        try:
            answer = await link.request({"op": "ack", **ack, "next": next_fence})
        except Refusal:
            return None
        self._host.witness.acked(self.name, turn, outcome, answer["counted"])
        if "lease" not in answer:
            link.fences = []
            return None
        link.fences = [next_fence]
        return self._begin(answer["lease"], next_fence)

    async def _hang(self) -> None:
        """The harness and its program stand still, until somebody ends the container."""
        witness = self._host.witness
        witness.counts["hangs"] += 1
        witness.hung_since_ms[self.name] = self._host.now_ms()
        await trio.sleep_forever()

    async def _forge(self, link: Link, ack: dict[str, Any]) -> None:
        """An ack with the fence of another turn must not count, whatever it says."""
        forged = {**ack, "op": "ack", "fence": self._new("forged"), "outcome": "done", "next": None}
        if (await link.request(forged))["counted"]:
            raise self._host.witness.broken(f"an ack of turn {ack['turn']} with another fence counted")

    async def _renew(self, link: Link, turn: int, program: trio.CancelScope) -> None:
        """Say that the program lives; end it when the turn was taken away. Sometimes the machine stands still."""
        silent_share = self._weather.silences_a_day / RENEWALS_A_DAY
        while True:
            await trio.sleep(RENEW_EVERY_S)
            if self._chance.happens(silent_share):
                await trio.sleep(self._chance.uniform(1, 4) * self._weather.limits.lease_silence_s)
            answer = await link.request({"op": "lines", "turn": turn, "first": 0, "lines": []})
            if answer["running"] is False:
                program.cancel()

    # -- the program ------------------------------------------------------------------------------------------------

    async def _think(self, lease: dict[str, Any]) -> str:
        """What a turn does; returns how it ends."""
        chance, message = self._chance, lease["message"]
        if lease["errand"]:
            return await self._run_errand(lease)
        kind = message["body"].split()[0]
        if kind == "loop":  # two that thank each other
            await trio.sleep(chance.uniform(1, 5))
            await self._send(AgentName(message["sender"]), "loop", message["id"])
            return "done"
        await trio.sleep(chance.work_s(self._weather.median_work_s))
        self._context_tokens = min(self._context_tokens + chance.randint(1, LONGEST_TURN_TOKENS), WINDOW_TOKENS)
        if (ending := await self._call_model(lease)) is not None:
            return ending
        if kind == "poison":
            return "failed"
        if kind == "flood":
            await self._flood()
        if chance.happens(0.3):
            await self._recv(lease)
        if self._host.troubled:
            await self._write_to_others(message)
            await trio.sleep(chance.work_s(self._weather.median_work_s / 4))
            ending = chance.choices(("done", "failed", "waiting"), (90, 6, 4))[0]
            return ending if ending != "done" else await self._call_model(lease, 0.1) or "done"
        return "done"

    async def _run_errand(self, lease: dict[str, Any]) -> str:
        """Save notes, and let the session be compacted; what frees nothing now and then is no error."""
        chance = self._chance
        if lease["errand"] == "save_and_compact" and chance.happens(0.2):
            await self._recv(lease)
        for _ in range(1 + (lease["errand"] == "save_and_compact")):
            if (ending := await self._call_model(lease)) is not None:
                return ending
        if chance.happens(0.9):
            self._context_tokens = COMPACTED_TOKENS
        return chance.choices(("done", "failed", "waiting"), (80, 10, 10))[0] if self._host.troubled else "done"

    async def _call_model(self, lease: dict[str, Any], share: float = 1.0) -> str | None:
        """Call the model, and again when that is turned away; how the turn ends where it has to."""
        if not self._chance.happens(share):
            return None
        for _ in range(CALLS_IN_A_ROW):
            self._host.witness.counts["calls"] += 1
            answer = await self._host.call_model(self.name, lease["turn"], self._chance)
            if answer.why is None:
                told = self._said.setdefault("usage", {"input_tokens": 0, "output_tokens": 0})
                for kind, tokens in zip(told, answer.tokens, strict=True):
                    told[kind] += tokens
                return None
            await trio.sleep(self._chance.random() * CALL_AGAIN_S)
        self._said |= {"reason": answer.why, "limited_until_ms": answer.until_ms}
        return "waiting"

    async def _write_to_others(self, message: dict[str, Any]) -> None:
        chance = self._chance
        if message["sender"] in self._peers and chance.happens(0.35):
            await self._send(AgentName(message["sender"]), "work", message["id"])
        if chance.happens(0.25):
            await self._send(chance.choice(self._peers), "work")
        if chance.happens(0.01):
            await self._send(self.name, "loop")
        if chance.happens(0.02):
            await self._send(OPERATOR, "news")
        if chance.happens(0.05):
            await self._remind()

    async def _flood(self) -> None:
        """More than the pair's rate, as fast as it goes."""
        victim = self._chance.choice(self._peers)
        for _ in range(self._weather.limits.pair_rate_per_hour + 10):
            await self._send(victim, "work")

    async def _remind(self) -> None:
        key, when = self._new("remind"), When(after_s=self._chance.uniform(1, LATEST_REMINDER_S))
        try:
            await self._host.call(lambda d: d.reminders.remind(self.name, when, f"work {key}", key), self._chance)
        except Refusal:
            self._host.witness.counts["refusals"] += 1

    async def _recv(self, lease: dict[str, Any]) -> None:
        key, wait_s = self._new("recv"), self._chance.choice((0.0, 0.0, 5.0, 40.0))
        limit = self._chance.randint(1, RECV_LIMIT)
        try:
            taken = await self._host.call(lambda d: d.broker.recv(self.name, limit, wait_s, key), self._chance)
        except Refusal:
            return  # the turn was taken away meanwhile
        if taken["messages"]:
            self._host.witness.leased(self.name, lease["turn"], lease["fence"], taken["messages"])

    async def _send(self, to: AgentName, kind: str, in_reply_to: int | None = None) -> None:
        key = self._new("send")
        body = f"{kind} {key}"
        recipients = tuple(n for n in self._host.names if n != self.name) if to == EVERYONE else (to,)
        send = partial(_send, sender=self.name, to=to, body=body, in_reply_to=in_reply_to, key=key)
        try:
            answer = await self._host.call(send, self._chance)
        except Refusal:
            self._host.witness.refused(self.name, body)
        else:
            self._host.witness.sent(self.name, recipients, body, key, answer)


async def _send(
    daemon: Any, sender: AgentName, to: AgentName, body: str, in_reply_to: int | None, key: str
) -> dict[str, Any]:
    answer: dict[str, Any] = await daemon.broker.send(sender, to, MessageBody(body), in_reply_to, key)
    return answer
