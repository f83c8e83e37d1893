"""What an agent's container sees of the hive's directories: one list, which each driver translates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hive_core.containers.inside import HOME
from hive_core.program_config import make_program_config
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName, Network

# Inside:
RUN, STATE, CLAUDE = "/run/hive", "/state", f"{HOME}/.claude"
SHARED = "/shared"  # written by all
PROJECTS, MIRRORS = "/projects", "/mirrors"  # its clones; what they borrow objects from
EXTRAS = "/extras"  # its skills and plugins, as deployed, and what its program takes for its own directory
AGENTS, APPLIED, META = "/agents", "/applied", "/meta"  # the manager's
TARGETS, MANAGER_TARGETS = (RUN, STATE, CLAUDE, SHARED, PROJECTS, MIRRORS, EXTRAS), (AGENTS, APPLIED, META)


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host's, and where it stands in a container."""

    source: Path
    target: str
    read_only: bool = False
    mapped: bool = False  # the agent's uids are its owner's in there already


@dataclass(frozen=True, slots=True)
class AgentDirs:
    """What one agent's container has of the host: these directories are all that it can write.

    network: "private" has a loopback of its own and nothing else; "host" is the host's own network, its loopback too.
    """

    mounts: tuple[Mount, ...]
    opened: bool = False  # the sources are descriptors of directories, where no link can stand
    network: Network = "private"

    def source(self, target: str) -> Path | None:
        """What stands at a place of the container; None when nothing is mounted there."""
        return next((mount.source for mount in self.mounts if mount.target == target), None)

    def make(self) -> None:
        """Make what is not there yet, for the daemon's user alone.

        Raises OSError, and Refusal for a symbolic link: nothing else that looks after these directories follows one.
        """
        for path in () if self.opened else (self.state.parent, *(mount.source for mount in self.mounts)):
            if path.is_symlink():
                raise Refusal(
                    "refused", f"{path} is a symbolic link; put the directory itself there, or mount it from elsewhere"
                )
        for mount in self.mounts:
            mount.source.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.opened:
            make_program_config(self.extras, CLAUDE, f"{HOME}/.cache/claude")

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
        """Sessions of the program."""
        return self._own(CLAUDE)

    @property
    def projects(self) -> Path:
        """Its clones of projects."""
        return self._own(PROJECTS)

    @property
    def mirrors(self) -> Path:
        """The packs of the mirrors of its projects."""
        return self._own(MIRRORS)

    @property
    def extras(self) -> Path:
        """The skills and plugins of its deployed commit."""
        return self._own(EXTRAS)

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


def agent_dirs(state_dir: Path, runtime_dir: Path, name: AgentName, network: Network = "private") -> AgentDirs:
    """What an agent's container has of a hive whose directories are these. Nothing is looked at, and nothing made."""
    own = state_dir / "agents" / name
    mounts = [
        # Its sockets can be connected to, not replaced.
        Mount(run_dir(runtime_dir, name), RUN, read_only=True),
        Mount(own / "state", STATE),
        Mount(own / "claude", CLAUDE),
        # In every container it is root that writes, and on the host the daemon's user: so all can edit what one made.
        Mount(state_dir / "shared", SHARED),
        Mount(own / "projects", PROJECTS),
        # The files in it are those of the hive's own mirrors, by another name: nobody inside may write them.
        Mount(own / "mirrors", MIRRORS, read_only=True),
        # What was approved is what its program loads.
        Mount(own / "extras", EXTRAS, read_only=True),
    ]
    if name == MANAGER:
        # In it is NAME/config of every agent, also of those to come, and nothing else of them.
        mounts.append(Mount(state_dir / "proposed", AGENTS))
        mounts.append(Mount(state_dir / "applied", APPLIED, read_only=True))
        mounts.append(Mount(state_dir / "meta", META, read_only=True))
    return AgentDirs(tuple(mounts), network=network)


def shape(dirs: AgentDirs) -> list[str]:
    """What an agent can see of what it is given, for telling one container from another."""
    network = ["the host's network"] if dirs.network == "host" else []
    return [f"{mount.target}{' read-only' if mount.read_only else ''}" for mount in dirs.mounts] + network
