"""What the host asks of a harness besides turns: to see whether its program comes up."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import trio

from hive_core.protocol.harness import REASONS

_SERVER = re.compile("[a-z][a-z0-9_-]{0,29}")


class Checked(NamedTuple):
    """error: in a sentence; empty where all was well. reason: one of protocol.harness.REASONS, where it was told.
    without: the servers of tools that are not there."""

    error: str = ""
    reason: str | None = None
    without: tuple[str, ...] = ()


@dataclass(slots=True)
class AskedCheck:
    """key: names it. prompt: to be answered by the model. end: of what was told."""

    prompt: str | None = None
    key: str = field(default_factory=lambda: secrets.token_hex(8))
    end: Checked = Checked()  # noqa: RUF009 - it is immutable
    told: trio.Event = field(default_factory=trio.Event)


def _servers(told: object) -> tuple[str, ...]:
    """The names of a harness's list that are names of servers; agent.toml has 16 at most."""
    names = told if isinstance(told, list) else []
    return tuple(name for name in names[:16] if isinstance(name, str) and _SERVER.fullmatch(name))


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

    @property
    def calls_model(self) -> bool:
        """Whether a check is under way that may."""
        return self.asked is not None and self.asked.prompt is not None

    async def ask(self, prompt: str | None = None) -> Checked:
        """How a check ends, with a turn that answers the prompt where there is one."""
        self.asked = asked = AskedCheck(prompt)
        self._change()
        try:
            await asked.told.wait()
            return asked.end
        finally:
            self.asked = None

    def answered(self, request: dict[str, Any], say: str) -> bool:
        """Take what the harness tells of a check; whether that was asked. say: its error, as it may be shown."""
        asked = self.asked
        if asked is None or asked.told.is_set() or request.get("check") != asked.key:
            return False
        if request.get("ok") is not True:
            reason = request.get("reason")
            known = reason if isinstance(reason, str) and reason in REASONS else None
            asked.end = Checked(say or "its harness gave no reason", known)
        else:
            asked.end = Checked(without=_servers(request.get("without", [])))
        asked.told.set()
        return True

    def _change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()
