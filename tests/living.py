"""A hive in a thread of its own, so that a test of hypothesis can go on in steps."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import outcome
import trio

from hive_core.limits import Limits
from tests.hives import PATIENCE_S, Services, open_services

T = TypeVar("T")
Prepare = Callable[[Services, trio.Nursery], None]


class LivingHive:
    """prepare: called with the services of each daemon, and a nursery that ends with it."""

    def __init__(self, *names: str, limits: Limits, prepare: Prepare = lambda hive, nursery: None) -> None:
        self._limits = limits
        self._prepare = prepare
        self._folder = tempfile.TemporaryDirectory()
        self._results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=trio.run, args=(self._live,))
        self._thread.start()
        self._token, self._calls = self._results.get(timeout=PATIENCE_S)
        self.do(lambda hive: hive.add_agents(*names))

    async def _live(self) -> None:
        send, receive = trio.open_memory_channel[Callable[[Services], Awaitable[Any]] | None](1)
        self._results.put((trio.lowlevel.current_trio_token(), send))
        again = True
        while again:
            again = False
            async with open_services(Path(self._folder.name), limits=self._limits) as hive, trio.open_nursery() as life:
                self._prepare(hive, life)
                async for call in receive:
                    if call is None:
                        again = True
                        break
                    with trio.move_on_after(PATIENCE_S):
                        self._results.put(await outcome.acapture(call, hive))
                life.cancel_scope.cancel()

    def do(self, call: Callable[[Services], Awaitable[T]]) -> T:
        trio.from_thread.run_sync(self._calls.send_nowait, call, trio_token=self._token)
        result: T = self._results.get(timeout=PATIENCE_S).unwrap()
        return result

    def restart(self) -> None:
        """The daemon ends, and another begins."""
        trio.from_thread.run_sync(self._calls.send_nowait, None, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(self._calls.close, trio_token=self._token)
        self._thread.join(PATIENCE_S)
        self._folder.cleanup()
