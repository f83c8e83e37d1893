"""What a supervisor asks of an agent's harness, whatever answers for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import trio


class CheckEnd(Protocol):
    @property
    def error(self) -> str:
        """In a sentence; empty where all was well."""

    @property
    def without(self) -> Sequence[str]:
        """The servers of tools of its settings that are not there."""

    @property
    def reason(self) -> str | None:
        """One of protocol.harness.REASONS, where it was told."""


class Desk(Protocol):
    """What is asked and told of an agent's harness."""

    said_hello: trio.Event

    def expect(self) -> None:
        """Its container is started: what is known of the harness before does not hold for the next one."""

    @property
    def asked_to_stop(self) -> bool:
        """Whether its harness is to end at its turn's edge."""

    def ask_to_stop(self) -> None:
        """Let the harness end at its turn's edge."""

    def call_at_edges(self, call: Callable[[], None]) -> None:
        """Call this whenever the harness is between two turns; it may ask it to stop."""

    async def hung(self) -> str:
        """Return why the harness of a container that runs counts as hung, once it does."""

    def hold(self, held: bool) -> None:
        """Let no turn begin while it is held, though its harness stays."""

    async def check(self, prompt: str | None = None) -> CheckEnd | None:
        """Have its harness, which is held and has said hello, see whether its program comes up, and answers a prompt.

        None of a harness that cannot be asked.
        """
