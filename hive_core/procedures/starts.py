"""Mass starts: so many containers start at once, and the others wait; the manager first, then by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from hive_core.protocol.words import MANAGER, AgentName


@dataclass(slots=True)
class _Waiter:
    tell: Callable[[int], None]
    granted: trio.Event = field(default_factory=trio.Event)


class Starts:
    def __init__(self, most: int) -> None:
        self._most = most
        self._starting: set[AgentName] = set()
        self._waiting: dict[AgentName, _Waiter] = {}

    async def take(self, name: AgentName, tell: Callable[[int], None]) -> None:
        """Return when the agent may start; `tell` hears how many come before it. Cancelled, it waits no more."""
        waiter = self._waiting[name] = _Waiter(tell)
        self._grant()
        try:
            await waiter.granted.wait()
        except BaseException:
            self._waiting.pop(name, None)
            self.give_back(name)
            raise

    def give_back(self, name: AgentName) -> None:
        """The agent has started, or never will; nothing when it was so before."""
        self._starting.discard(name)
        self._grant()

    def _grant(self) -> None:
        queue = sorted(self._waiting, key=lambda name: (name != MANAGER, name))
        for name in queue[: max(0, self._most - len(self._starting))]:
            self._starting.add(name)
            self._waiting.pop(name).granted.set()
        for place, name in enumerate(name for name in queue if name in self._waiting):
            self._waiting[name].tell(len(self._starting) + place)
