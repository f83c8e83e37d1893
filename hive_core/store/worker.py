"""A thread of its own for what may wait: one call after another, for one task.

trio's pool of threads would cost three turns of the scheduler for each call: one for the limit, one for its queue of
answers, one for the caller. This costs the last of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import outcome
import trio


class Worker:
    def __init__(self) -> None:
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._answered = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._result: outcome.Outcome[Any] = outcome.Value(None)
        threading.Thread(target=self._serve, name="store", daemon=True).start()

    async def run(self, function: Callable[[], object]) -> outcome.Outcome[Any]:
        """What `function` returned or raised in the thread. For one task, which nobody cancels."""
        self._asked.put(function)
        await trio.lowlevel.wait_readable(self._answered)
        os.eventfd_read(self._answered)
        return self._result

    def close(self) -> None:
        """End the thread. Nothing may be running in it."""
        self._asked.put(None)
        os.close(self._answered)

    def _serve(self) -> None:
        while (function := self._asked.get()) is not None:
            self._result = outcome.capture(function)
            os.eventfd_write(self._answered, 1)
