"""403s that one agent alone gets: its own requests are what the provider refuses, and not the credential.

One of them rests the agent that got it. It counts against the credential when another agent has got one before, and no
call of anybody else's has worked since. In memory alone, as what an agent claims is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from hive_core.protocol.words import AgentName
from hive_core.provider_limits import FAR_MS
from hive_core.services.rests import REST_MOST_S

KEPT_MS = int(REST_MOST_S * 1000)  # behind a rest: what is older says nothing of the credential


@dataclass(slots=True)
class _Refused:
    credential: str
    until_ms: int
    failures: int
    rests: bool = True
    alone: bool = False  # a call of another agent's has worked since

    def counts(self, now_ms: int) -> bool:
        """Whether it is neither forgotten by now, nor of a time that a clock was set back from."""
        return now_ms - KEPT_MS < self.until_ms <= now_ms + FAR_MS


class OwnRefusals:
    """rest_ms: how long the first, second, … rest in a row is."""

    def __init__(self, rest_ms: Callable[[int], int]) -> None:
        self._rest_ms = rest_ms
        self._of: dict[AgentName, _Refused] = {}

    def until_ms(self, agent: AgentName, credential: str, now_ms: int) -> int | None:
        """Until when an agent rests with a credential, None when it does not."""
        own = self._of.get(agent)
        rests = own is not None and own.credential == credential and own.counts(now_ms) and now_ms < own.until_ms
        return own.until_ms if own is not None and rests else None

    def failures(self, agent: AgentName) -> int:
        """How many rests in a row an agent has had, or is in."""
        own = self._of.get(agent)
        return own.failures if own is not None else 0

    def refused(self, agent: AgentName, credential: str, users: Collection[AgentName], now_ms: int) -> int | None:
        """Take in a 403: until when its agent rests. None: it is the credential that is refused."""
        others = [
            own
            for name, own in self._of.items()
            if name != agent and own.credential == credential and own.counts(now_ms)
        ]
        if not set(users) - {agent} or any(not own.alone for own in others):
            return None
        before = self._of.get(agent)
        known = before is not None and before.credential == credential and before.counts(now_ms)
        if before is not None and known and now_ms < before.until_ms:
            return before.until_ms  # of a call that was under way with that one: it is the same event
        failures = before.failures + 1 if before is not None and known else 1
        until_ms = now_ms + self._rest_ms(failures)
        self._of[agent] = _Refused(credential, until_ms, failures)
        return until_ms

    def worked(self, agent: AgentName, credential: str) -> None:
        """A call of an agent's worked: its own is over when it has rested, and it is not the credential for others."""
        for name, own in list(self._of.items()):
            if name == agent and not own.rests:
                del self._of[name]
            elif name != agent and own.credential == credential:
                own.alone = True

    def forget(self, agents: Iterable[AgentName]) -> list[AgentName]:
        """Let agents go on at once. Who of them rested."""
        known = [(name, own) for name in agents if (own := self._of.pop(name, None)) is not None]
        return [name for name, own in known if own.rests]

    def end_rests(self, now_ms: int) -> list[AgentName]:
        """Those whose rest is over, once each; what is older is forgotten."""
        over = [
            name for name, own in self._of.items() if own.rests and not (own.counts(now_ms) and now_ms < own.until_ms)
        ]
        for name in over:
            self._of[name].rests = False
        self._of = {name: own for name, own in self._of.items() if own.counts(now_ms)}
        return over

    def instants(self) -> Iterator[int]:
        """When to look again."""
        yield from (own.until_ms for own in self._of.values() if own.rests)
