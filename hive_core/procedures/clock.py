"""The hive's clock: what is due at an instant, done at that instant, each by one transaction.

It sleeps until the next instant that any of its timers knows, or until one of them says that this has changed. The
wall clock can be set, so it never sleeps for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import trio

from hive_core.store.door import Store
from hive_core.store.writer import Transaction

LOOK_AGAIN_S = 30.0


class Timer(Protocol):
    """What is due at instants that stand in the database."""

    topic: str  # published when the next instant may have changed

    def fire(self, tx: Transaction) -> None:
        """Do what is due at `tx.now_ms`. Nothing that was due before is forgotten, and nothing is done twice."""

    def next_after(self, tx: Transaction) -> int | None:
        """The first instant after `tx.now_ms`, in ms since 1970; None when there is none."""


async def serve_clock(store: Store, timers: Sequence[Timer]) -> None:
    """Let every timer do what is due, until cancelled."""

    def tick(tx: Transaction) -> float:
        for timer in timers:
            timer.fire(tx)
        instants = [at for timer in timers if (at := timer.next_after(tx)) is not None]
        return (min(instants) - tx.now_ms) / 1000 if instants else LOOK_AGAIN_S

    with store.bus.listen(*{timer.topic for timer in timers}) as listener:
        while True:
            rest_s = await store.insist(tick)
            with trio.move_on_after(min(max(rest_s, 0.0), LOOK_AGAIN_S)):
                await listener.wait()
