"""The in-process broadcast that follows a commit.

It carries no data, only "look again": a listener that wakes reads the database. So a wake-up that is lost costs the
time until the next one, never a message, and every screen can resume from a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import trio

EVENTS = "events"
WANTED = "wanted"  # what is wanted of some agent changed
RESTING = "resting"  # a message rests until an instant
DEPLOYED = "deployed"  # what some agent runs on changed
CREDENTIALS = "credentials"  # what is known of some credential changed
TURN_ENDS = "turn ends"  # a turn has ended
APPROVED = "approved"  # an approval waits to be carried out


def mail(agent: str) -> str:
    """The topic of an agent's queue."""
    return f"mail:{agent}"


def stream(agent: str) -> str:
    """The topic of an agent's turn lines and live state."""
    return f"stream:{agent}"


class Listener:
    """Wakes once for any number of publications since the last wait."""

    def __init__(self) -> None:
        self._woken = trio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def wait(self) -> None:
        """Return when something was published since the last return. Cancelling it loses nothing."""
        await self._woken.wait()
        self._woken = trio.Event()


class Bus:
    def __init__(self) -> None:
        self._listeners: dict[str, set[Listener]] = {}

    def publish(self, topics: Iterable[str]) -> None:
        for topic in topics:
            for listener in self._listeners.get(topic, ()):
                listener.wake()

    def topics(self) -> list[str]:
        """Every topic that somebody listens to now."""
        return list(self._listeners)

    @contextmanager
    def listen(self, *topics: str) -> Iterator[Listener]:
        """Listen from now on. Read the database after entering, then wait: nothing falls between."""
        listener = Listener()
        for topic in topics:
            self._listeners.setdefault(topic, set()).add(listener)
        try:
            yield listener
        finally:
            for topic in topics:
                group = self._listeners[topic]
                group.discard(listener)
                if not group:
                    del self._listeners[topic]
