"""What every driver offers: it starts an agent in a container of its own, finds it again, looks into it, and ends it.

It does so itself, or asks another process that does. A driver knows no messages and no settings: what an agent is told
it hears over its sockets, so a new commit needs no other container.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from hive_core.containers.mounts import AgentDirs
from hive_core.containers.running import Done, Exit, Running, Usage
from hive_core.protocol.words import AgentName, StorePath


class Driver(Protocol):
    """Starts, finds and ends agents. tests/containers/test_every_driver.py is the contract, run with each of them.

    Calls that concern one agent are made one at a time.
    """

    @property
    def sandbox(self) -> str:
        """What is around an agent, in one word: "none" is nothing at all."""

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        """Names the shape that the agent's container has when it is started now; the same in every daemon like this."""

    async def start(self, name: AgentName, dirs: AgentDirs) -> Running:
        """Start the agent's harness. Raises OSError when it cannot be started, or the agent runs already."""

    async def find(self, name: AgentName, dirs: AgentDirs) -> Running | None:
        """The agent that an earlier daemon left running, or None.

        One that was given another run directory can never reach us, and one in another kind of container is not as it
        is wanted: it is ended, and counts as not running.
        """

    async def missed_exit(self, name: AgentName) -> Exit | None:
        """How the agent ended while no daemon watched, told once; None when there is nothing to tell."""

    async def forget(self, name: AgentName) -> None:
        """The end of the agent was seen and told."""

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        """The end of what the harness printed, at most `limit` bytes of it."""

    async def logs(self, name: AgentName, lines: int = 50) -> list[str]:
        """The last lines that the harness printed, the oldest first."""

    async def usage(self, name: AgentName) -> Usage:
        """What the agent takes of the host now; nothing when it does not run."""

    async def exec(self, name: AgentName, dirs: AgentDirs, command: Sequence[str], patience_s: float = 60.0) -> Done:
        """Run a command in the agent's container, with no more rights than the agent has.

        Raises Refusal when the agent does not run, or the command takes longer than `patience_s`: it was killed.
        """

    async def destroy(self, name: AgentName) -> None:
        """Forget that there ever was such an agent, which has ended; its directories stay. Nothing when it is gone."""


class Former(Protocol):
    """What an agent runs in still where the hive's sandbox was another before."""

    async def end(self, name: AgentName, dirs: AgentDirs) -> None:
        """End that. Raises Refusal when it cannot be ended: nothing else is started then."""

    async def forget(self, name: AgentName) -> None:
        """Remove what is kept of that, which has ended, on the host; the agent is destroyed."""


@runtime_checkable
class Switching(Protocol):
    """The NixOS systems that agents' containers have: what a driver offers besides whose sandbox is "nixos-container".

    A switch leaves the harness as it is, so that no turn is cut: `Driver.generation` names the system too, and an agent
    that has another takes the new one at its turn's edge. Calls that concern one agent are made one at a time.
    """

    async def switch(self, name: AgentName, system: StorePath) -> None:
        """Make this the agent's system, in a container that is made when there is none; one that runs switches to it.

        Raises Refusal, and then the agent has the system that it had: "conflict" when a container of that id is
        somebody else's, "failed" with the last lines of what went wrong.
        """

    async def roll_back(self, name: AgentName) -> StorePath:
        """Go back to the system before the current one, which is removed from what is kept; the one it has then.

        Raises Refusal: "conflict" when there is none before, or the container is somebody else's; "failed" when one
        that runs does not switch to it: the agent has the system of before all the same, from its next start on.
        """

    async def current(self, name: AgentName) -> StorePath | None:
        """The system that the agent's container has when it is started now; None when it has none."""


@runtime_checkable
class Systems(Switching, Protocol):
    """The same of a daemon's driver, which has them built too."""

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        """Build an agent's system from a derivation that an evaluation left in the store. Touches nothing that runs.

        Raises Refusal: "not_found" when the store was cleaned up and has it no more, "failed" with the last lines of
        what nix said.
        """
