"""The model provider of a simulated swarm, and a call to it, which feeds the breaker and the ledger as the relay does.

Most of the time it is well. It limits the credential, and says until when or does not; it is overloaded; it refuses
the credential.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from hive_core.credentials import Credential, Credentials
from hive_core.protocol.words import AgentName
from hive_core.services.access import ACCESS, Access
from hive_core.usage import Call
from tests.simulation.weather import Chance, Weather

if TYPE_CHECKING:
    from tests.simulation.host import Daemon

MODEL = "claude-sonnet-4-5"
INPUT_MICRO_USD, OUTPUT_MICRO_USD = 3, 15  # for a token
LONGEST_LIMIT_S = 2 * 3600.0
LONGEST_OVERLOAD_S = 600.0
LONGEST_REFUSAL_S = 1800.0
OVERLOADED_SHARE = 0.7  # of the calls to a provider that has too many
STREAMED_SHARE = 0.3  # of the answers
SAY_UNTIL = 0.6  # of the limits


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program sees of its call. why: one of protocol.harness.REASONS, None when it went well."""

    why: str | None
    tokens: tuple[int, int] = (0, 0)  # of input, of output
    until_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Mood:
    status: int = 200
    until_s: float = 0.0  # by trio's clock
    says_until: bool = False


class OneKey(Credentials):
    """A credential that stands in no file, so that nobody has to look whether that has changed."""

    def __init__(self) -> None:
        super().__init__(Path("/dev/null"))
        self._key = Credential("api_key", "the simulation", "sk-ant-simulated")

    def find(self, name: str) -> Credential | None:
        return self._key

    def missing(self, name: str) -> str:
        return ""


class Provider:
    def __init__(self, weather: Weather, seed: int) -> None:
        self._seed = seed
        self._weather = weather
        self._mood = Mood()
        self._calm = False

    async def serve(self) -> None:
        """Fall into a mood from time to time, until cancelled."""
        weather = self._weather
        moods = {
            "limit": (weather.limits_in_all, 429, LONGEST_LIMIT_S),
            "overload": (weather.overloads_in_all, 529, LONGEST_OVERLOAD_S),
            "refusal": (weather.refusals_in_all, 401, LONGEST_REFUSAL_S),
        }
        async with trio.open_nursery() as nursery:
            for name, (per_day, status, longest_s) in moods.items():
                chance = Chance(self._seed, "provider", name)
                nursery.start_soon(partial(self._often, per_day, status, longest_s, chance))

    async def _often(self, per_day: float, status: int, longest_s: float, chance: Chance) -> None:
        while True:
            await trio.sleep(chance.rest_s(per_day))
            until_s = trio.current_time() + chance.uniform(1, longest_s)
            self._mood = Mood(status, until_s, status == 429 and chance.happens(SAY_UNTIL))

    def be_well(self) -> None:
        """From now on."""
        self._calm = True

    def answer(self, chance: Chance) -> tuple[int, dict[str, str]]:
        """The status and the headers of an answer to a call now."""
        mood, left_s = Mood() if self._calm else self._mood, self._mood.until_s - trio.current_time()
        if left_s <= 0 or (mood.status == 529 and not chance.happens(OVERLOADED_SHARE)):
            return 200, {}
        return mood.status, {"retry-after": f"{left_s:.3f}"} if mood.says_until else {}


async def relay(
    daemon: Daemon, provider: Provider, name: AgentName, turn: int, median_s: float, chance: Chance
) -> Answer:
    """A call of an agent's program on its way through the hive, as sockets/model.py passes it."""
    books, ledger = daemon.books, daemon.ledger
    if Access.closed(daemon.access, name) is not None:  # unseen: what is asked for a turn to begin is another thing
        return Answer("overloaded")  # so a program takes a 503
    if (running := ledger.running(name)) is None:
        return Answer("authentication")
    call = Call(name, "/v1/messages", chance.randint(1_000, 200_000))
    if ledger.call_begins(call) is not None:
        return Answer("rate_limited")
    books.call_begins(call, turn, running)
    try:
        return await _until_cut(daemon, name, partial(_exchange, daemon, provider, call, median_s, chance))
    finally:
        call.reader.end()
        ledger.call_ended(call)
        books.call_ended(call, daemon.lives)


async def _until_cut(daemon: Daemon, name: AgentName, exchange: Callable[[], Any]) -> Answer:
    """The answer, unless the agent's way to the model closes for calls under way, too."""
    answers: list[Answer] = []
    async with trio.open_nursery() as nursery:

        async def wait_closed() -> None:
            with daemon.store.bus.listen(ACCESS) as listener:
                while daemon.access.cut(name) is None:
                    await listener.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait_closed)
        answers.append(await exchange())
        nursery.cancel_scope.cancel()
    return answers[0] if answers else Answer("overloaded")


async def _exchange(daemon: Daemon, provider: Provider, call: Call, median_s: float, chance: Chance) -> Answer:
    credential = daemon.breaker.credential_for(call.agent)
    assert credential is not None
    call.credential, call.reached = credential.name, True
    await trio.sleep(chance.work_s(median_s / 10))
    status, headers = provider.answer(chance)
    before = daemon.breaker.row(credential.name) if status != 200 else {}
    daemon.breaker.answered(call.agent, credential, status, headers)
    daemon.books.provider_said(before, status, headers)
    call.status = status
    if status != 200:
        call.complete = True
        why = {429: "rate_limited", 529: "overloaded", 401: "authentication"}[status]
        until = headers.get("retry-after")
        return Answer(why, until_ms=daemon.ledger.now_ms + int(float(until) * 1000) if until else None)
    tokens = chance.randint(1_000, 60_000), chance.randint(1, 3_000)
    counts = {"input_tokens": tokens[0], "output_tokens": 1}
    if streamed := chance.happens(STREAMED_SHARE):
        _tell(daemon, call, {"message": {"model": MODEL, "usage": counts}})
    await trio.sleep(chance.work_s(median_s / 4))
    counts["output_tokens"] = tokens[1]
    _tell(daemon, call, {"usage": counts} if streamed else {"model": MODEL, "usage": counts})
    call.complete = True
    return Answer(None, tokens)


def _tell(daemon: Daemon, call: Call, event: dict[str, Any]) -> None:
    if call.reader.feed(b"data: " + json.dumps(event).encode() + b"\n"):
        daemon.ledger.call_moved(call)
