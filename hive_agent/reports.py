"""What a harness tells its host beside the turns: each again until the host has taken it.

In order, but for what the host has no room for now: that waits behind the others, or one wake that is held up would
hold up all.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import trio

from hive_agent.link import HostLink
from hive_core.protocol.refusal import Refusal

REST_S = 5.0  # before what the host could not take now is told again
KEPT = 256  # while the host is away; the oldest goes then


class Reports:
    """`add` never waits."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[dict[str, Any], Callable[[], None]]] = deque(maxlen=KEPT)
        self._added = trio.Event()

    def add(self, form: dict[str, Any], told: Callable[[], None] = lambda: None) -> None:
        """Tell the host; `told` is called when it knows, or has refused for good."""
        self._waiting.append((form, told))
        self._added.set()

    async def serve(self, link: HostLink) -> None:
        """Tell what is added, until cancelled."""
        while True:
            while self._waiting:
                form, told = self._waiting.popleft()
                if await self._tell(link, form):
                    told()
                    continue
                # "None runs" is no longer true behind a command that was begun since.
                put_back = self._waiting.appendleft if form.get("state") == "none" else self._waiting.append
                put_back((form, told))
                await trio.sleep(REST_S)
            self._added = trio.Event()
            await self._added.wait()

    async def _tell(self, link: HostLink, form: dict[str, Any]) -> bool:
        """False when the host cannot take it now."""
        try:
            await link.tell(form)
        except Refusal as refusal:
            print(f"cannot tell the host of {form['op']}: {refusal.message}", file=sys.stderr)
            return refusal.code != "unavailable"
        return True
