"""How a credential that rested comes back: one agent tries it, and when that works the others follow, one by one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from hive_core.limits import Limits
from hive_core.protocol.words import AgentName
from hive_core.provider_limits import FAR_MS
from hive_core.services.credential_states import CredentialState


@dataclass(slots=True)
class Trial:
    """A credential whose rest is over. agent: who tries it alone; None: whoever calls first does."""

    agent: AgentName | None
    since_ms: int
    tried: set[AgentName] = field(default_factory=set)


class Reopening:
    """In memory alone: a daemon that starts again begins a rested credential's trial anew."""

    def __init__(self, limits: Limits, chance: random.Random) -> None:
        self._spread_ms = int(limits.resume_spread_s * 1000)
        self._patience_ms = int(limits.probe_s * 1000)
        self._chance = chance
        self._trials: dict[str, Trial] = {}
        self._failed: dict[str, set[AgentName]] = {}  # whose try failed, since the credential was closed first
        self._follow: dict[AgentName, int] = {}  # who goes on at which instant

    def trial(self, name: str) -> Trial | None:
        return self._trials.get(name)

    def follows_at(self, agent: AgentName, now_ms: int) -> int | None:
        """The instant at which an agent may go on, when that is still to come."""
        at_ms = self._follow.get(agent, 0)
        return at_ms if now_ms < at_ms <= now_ms + FAR_MS else None

    def called(self, name: str, agent: AgentName, now_ms: int) -> None:
        """An agent calls: where nobody tries the credential, it does."""
        trial = self._trials.get(name)
        if trial is not None and trial.agent is None:
            trial.agent, trial.since_ms = agent, now_ms

    def failed(self, name: str, agent: AgentName, users: Iterable[AgentName]) -> None:
        """The credential was closed, or closed again by the agent that tried it: the next time another one tries.

        Else an agent whose own requests are what the provider refuses would keep all others waiting.
        """
        trial = self._trials.get(name)
        self.forget(name, users)
        if trial is not None:
            self._failed[name] = {*trial.tried, agent}

    def passes(self, name: str, agent: AgentName, now_ms: int) -> None:
        """Whoever tries the credential cannot: another one shall, at once."""
        trial = self._trials.get(name)
        if trial is not None and trial.agent == agent:
            trial.since_ms = now_ms - self._patience_ms

    def forget(self, name: str, users: Iterable[AgentName]) -> None:
        """Nothing of the credential comes back: it was closed, or is another."""
        self._trials.pop(name, None)
        self._failed.pop(name, None)
        for agent in users:
            self._follow.pop(agent, None)

    def worked(self, name: str, others: list[AgentName], now_ms: int) -> None:
        """The trial is over, and the others follow."""
        del self._trials[name]
        self._failed.pop(name, None)
        self._chance.shuffle(others)
        for place, agent in enumerate(others):
            part = (place + self._chance.random()) / len(others)
            self._follow[agent] = now_ms + int(self._spread_ms * part)

    def hand_on(
        self,
        state: CredentialState,
        users: list[AgentName],
        waits: Callable[[AgentName], bool],
        now_ms: int,
    ) -> list[AgentName]:
        """Give a rested credential to an agent that `waits` for nothing but it, the one that found it out first; to
        another when that one failed, or did nothing with it. Whom to wake."""
        trial = self._trials.get(state.name)
        begins = trial is None
        if trial is None:
            trial = self._trials[state.name] = Trial(None, now_ms, self._failed.pop(state.name, set()))
        before = trial.agent
        if before is not None:
            if 0 <= now_ms - trial.since_ms < self._patience_ms:
                return []
            trial.tried.add(before)
        trial.since_ms = now_ms
        for trial.agent in sorted(users, key=lambda agent: (agent != state.agent, agent)):
            if trial.agent not in trial.tried and waits(trial.agent):
                return [trial.agent]
        # Nobody has anything to do with it, or all have had their try: whoever calls first has it.
        trial.agent = None
        trial.tried.clear()
        return users if begins or before is not None else []

    def let_follow(self, now_ms: int) -> list[AgentName]:
        """Those whose instant has come."""
        due = [agent for agent in self._follow if self.follows_at(agent, now_ms) is None]
        for agent in due:
            del self._follow[agent]
        return due

    def instants(self) -> Iterator[int]:
        """When to look again."""
        yield from self._follow.values()
        yield from (trial.since_ms + self._patience_ms for trial in self._trials.values() if trial.agent is not None)
