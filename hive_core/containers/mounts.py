"""What an agent's container sees of the hive's directories: one list, which each driver translates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hive_core.containers.inside import HOME
from hive_core.protocol.words import MANAGER, AgentName

RUN, STATE, CLAUDE, AGENTS = "/run/hive", "/state", f"{HOME}/.claude", "/agents"  # inside


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host's, and where it stands in a container."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class AgentDirs:
    """The host's directories of one agent, as its container has them; they are all of the host that it can write."""

    mounts: tuple[Mount, ...]

    def source(self, target: str) -> Path | None:
        """What stands at a place of the container; None when nothing is mounted there."""
        return next((mount.source for mount in self.mounts if mount.target == target), None)

    def make(self) -> None:
        """Make what is not there yet, for the daemon's user alone. Raises OSError."""
        for mount in self.mounts:
            mount.source.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def run(self) -> Path:
        """Its sockets."""
        return self._own(RUN)

    @property
    def state(self) -> Path:
        """Its durable notes."""
        return self._own(STATE)

    @property
    def claude(self) -> Path:
        """Sessions and settings of the program."""
        return self._own(CLAUDE)

    @property
    def proposed(self) -> Path | None:
        """Everybody's configuration, for the manager alone."""
        return self.source(AGENTS)

    def _own(self, target: str) -> Path:
        found = self.source(target)
        assert found is not None, f"an agent has no {target}"
        return found


def run_dir(runtime_dir: Path, name: AgentName) -> Path:
    """Where an agent's sockets are."""
    return runtime_dir / "manager" if name == MANAGER else runtime_dir / "agents" / name


def agent_dirs(state_dir: Path, runtime_dir: Path, name: AgentName) -> AgentDirs:
    """What an agent's container has of a hive whose directories are these. Nothing is looked at, and nothing made."""
    own = state_dir / "agents" / name
    mounts = [
        # Its sockets can be connected to, not replaced.
        Mount(run_dir(runtime_dir, name), RUN, read_only=True),
        Mount(own / "state", STATE),
        Mount(own / "claude", CLAUDE),
    ]
    if name == MANAGER:
        mounts.append(Mount(state_dir / "proposed", AGENTS))
    return AgentDirs(tuple(mounts))
