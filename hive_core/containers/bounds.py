"""What an agent may take of the host, and what can hold it to that."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from hive_core.protocol.words import AgentName


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one agent."""

    memory_bytes: int
    cpu_percent: int  # 100 is one processor
    tasks: int  # processes and threads


class AgentGroups(Protocol):
    """The control groups of a hive's agents. A group has all that comes of the agent's wrapper.

    bounds: what each is held to.
    trouble: why there can be none, and what would mend it; None: there can.
    kind: whose groups they are, in one word.
    """

    bounds: Bounds
    trouble: str | None
    kind: str

    def entering(self, name: AgentName, command: Sequence[str], keeper: int) -> list[str]:
        """The command, to be run in a new group of the agent's; it keeps its pid, descriptors and environment.

        keeper: the process that keeps the agent's prints. Raises OSError when there can be no such group now.
        """

    def remove(self, name: AgentName) -> int:
        """Remove the group of an agent that has ended; how many of its processes were killed for their memory."""

    def sweep(self, keep: Collection[str]) -> None:
        """Remove what is left of groups that nothing is in, whose last process was not gone when its agent's end was
        seen. keep: the agents that may be about to enter theirs."""
