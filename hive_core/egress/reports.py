"""What the daemon is told of each connection, and asked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import trio

from hive_core.destinations import Allowed
from hive_core.egress.channel import Channel
from hive_core.egress.heads import Asked

ANSWER_S = 5.0  # who hears nothing in it is told to ask, though it may be asked already: a busy host takes its time
ASK = "ask the operator for it, or hm1nd to propose it"  # where the daemon has no better word in time


@dataclass(eq=False, slots=True)
class Passage:
    """One connection, or one plain request, as the daemon is told of it."""

    id: int
    asked: Asked
    began: float  # of trio's clock, as ends_at
    ends_at: float
    idle_s: float
    scope: trio.CancelScope
    allowed: Allowed | None = None
    address: str | None = None
    sent: int = 0
    received: int = 0
    verdict: str = "cut"
    reason: str | None = None

    def end(self, verdict: str, reason: str | None = None) -> None:
        """The first word stands."""
        if self.verdict == "cut" and self.reason is None:
            self.verdict, self.reason = verdict, reason

    def cut(self, reason: str) -> None:
        self.end("cut", reason)
        self.scope.cancel()

    def touch(self) -> None:
        """Something was carried: the time without anything begins anew."""
        self.scope.deadline = min(trio.current_time() + self.idle_s, self.ends_at)


class Reports:
    """The proxy's words on the channel. Each method but `answered` raises ChannelBroken."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._ids = itertools.count(1)
        self._asked: dict[int, trio.Event] = {}
        self._answers: dict[int, str] = {}

    def next_id(self) -> int:
        return next(self._ids)

    async def begun(self, agent: str, passage: Passage) -> None:
        await self._channel.send({"op": "begun", **_named(agent, passage)})

    async def ask(self, agent: str, passage: Passage) -> str:
        """What an agent is to be told whose destination is not in its rules."""
        answered = self._asked[passage.id] = trio.Event()
        try:
            await self._channel.send({"op": "ask", **_named(agent, passage)})
            with trio.move_on_after(ANSWER_S):
                await answered.wait()
        finally:
            del self._asked[passage.id]
        return self._answers.pop(passage.id, ASK)

    def answered(self, passage_id: int, sentence: str) -> None:
        """The daemon's answer; one that comes too late is nobody's."""
        if passage_id in self._asked:
            self._answers[passage_id] = sentence
            self._asked[passage_id].set()

    async def ended(self, passage: Passage) -> None:
        await self._channel.send(
            {
                "op": "ended",
                "id": passage.id,
                "address": passage.address,
                "sent": passage.sent,
                "received": passage.received,
                "took_ms": round((trio.current_time() - passage.began) * 1000),
                "verdict": passage.verdict,
                "reason": passage.reason,
            }
        )


def _named(agent: str, passage: Passage) -> dict[str, object]:
    asked = passage.asked
    return {"id": passage.id, "agent": agent, "host": asked.host, "port": asked.port, "how": asked.how}
