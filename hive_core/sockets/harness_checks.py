"""What the host asks of a harness besides turns: to see whether its program comes up."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import trio


@dataclass(slots=True)
class AskedCheck:
    """key: names it. error: empty where all was well."""

    key: str = field(default_factory=lambda: secrets.token_hex(8))
    error: str = ""
    told: trio.Event = field(default_factory=trio.Event)


class Checks:
    """Of one agent's harness. While it is `held` it begins no turn, and is asked the check that waits, if one does.

    can   the harness that is connected knows how
    """

    def __init__(self) -> None:
        self.can = False
        self.held = False
        self.asked: AskedCheck | None = None
        self.changed = trio.Event()

    def hold(self, held: bool) -> None:
        self.held = held
        self._change()

    async def ask(self) -> str:
        """Why the program does not come up, in a sentence; an empty text when it does."""
        self.asked = asked = AskedCheck()
        self._change()
        try:
            await asked.told.wait()
            return asked.error
        finally:
            self.asked = None

    def answered(self, request: dict[str, Any], say: str) -> bool:
        """Take what the harness tells of a check; whether that was asked. say: its error, as it may be shown."""
        asked = self.asked
        if asked is None or asked.told.is_set() or request.get("check") != asked.key:
            return False
        asked.error = "" if request.get("ok") is True else say or "its harness gave no reason"
        asked.told.set()
        return True

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()
