"""One lock an agent, for what two parts of the daemon do to its container and must not do at the same time."""

from __future__ import annotations

import weakref

import trio

from hive_core.protocol.words import AgentName


class AgentLocks:
    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[AgentName, trio.Lock] = weakref.WeakValueDictionary()

    def of(self, name: AgentName) -> trio.Lock:
        """The agent's, the same for everybody for as long as somebody holds it or waits for it."""
        return self._locks.setdefault(name, trio.Lock())
