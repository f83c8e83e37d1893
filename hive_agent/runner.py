"""What a harness needs of an agent's program, whichever it is.

A program is one module with one Runner, named in RUNNERS. The turn loop knows no more of it than this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import NamedTuple

from hive_agent.refusals import Refusals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from hive_core.protocol.harness import Check, Context, Lease, Outcome

# The name in agent.toml → module and class. Only the one that is used is imported.
RUNNERS = {
    "claude": ("hive_agent.claude", "Claude"),
    "rehearsal": ("hive_agent.rehearsal", "Rehearsal"),
}


@dataclass(frozen=True, slots=True)
class Seat:
    """Where the program works."""

    agent: str
    run_dir: str  # the host's sockets
    state_dir: str  # its working directory
    home: str
    config_dir: str  # its sessions and settings
    path: str  # PATH
    claude: str | None  # the executable, None where there is none
    sandboxed: bool
    model_port: int  # of the loopback that leads to the model
    egress_port: int = 0  # and of the one that leads to the hive's proxy; 0: there is none
    harness: str = ""  # the address of the harness's own tool, where it has one
    configs_dir: str = "/agents"  # every agent's configuration, where this is the manager
    projects_dir: str = "/projects"  # its clones of projects
    mirrors_dir: str = "/mirrors"  # what they borrow objects from
    extras_dir: str = "/extras"  # its skills and plugins, as deployed
    refusals: Refusals = field(default_factory=Refusals, compare=False)  # of the hive's proxy


class Activity(NamedTuple):
    """What the program does now: the fields of protocol.harness.State."""

    state: str
    detail: str = ""
    until_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a turn ended, for the host's ack: the fields of protocol.harness.Ack."""

    outcome: Outcome
    session: str | None
    error: str | None = None
    usage: dict[str, Any] | None = None
    reason: str | None = None
    limited_until_ms: int | None = None
    context: Context | None = None
    session_lost: bool = False


class Checked(NamedTuple):
    """error: why the program does not come up, reach the hive's tools or answer; empty when all is well. reason: one of
    protocol.harness.REASONS, where one is known. without: the servers of tools of its settings that are not there."""

    error: str = ""
    reason: str | None = None
    without: tuple[str, ...] = ()


class Runner(ABC):
    """Runs an agent's turns, one at a time. Whoever makes one closes it: then nothing that it started runs on.

    name      what agent.toml calls its program
    activity  what it does now; whoever changes it passes a line on after that
    asked     the digest of the first prompt of its turn, once the program was told; None before
    """

    name: str
    asked: str | None = None

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.activity = Activity("starting")

    @abstractmethod
    async def take_turn(self, lease: Lease, pass_on: Callable[[str], None]) -> Ending:
        """Run the program for one message or errand; each line of its stream goes to `pass_on` as it comes.

        Cancelled, the program and all that it started are gone.
        """

    @abstractmethod
    async def check(self, check: Check) -> Checked:
        """Start the program as for a turn, and end it again, without a call of the model unless there is a prompt."""

    @abstractmethod
    def interrupt(self) -> None:
        """The turn that runs is not wanted any more: end it politely, then by force. The same again does nothing."""

    @abstractmethod
    async def rest(self) -> bool:
        """Look after what runs between two turns. It is cancelled when the next one begins, or returns before.

        Whether the program began a turn by itself, and was ended for it.
        """

    @abstractmethod
    async def close(self) -> None:
        """End what runs, politely where there is time."""


def make_runner(program: str, seat: Seat) -> Runner:
    module, name = RUNNERS[program]
    runner: Runner = getattr(import_module(module), name)(seat)
    return runner
