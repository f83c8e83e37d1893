"""The drivers as the helper has them: what they get of the daemon's was opened first, and nothing of it is read."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hive_core.config import Config
from hive_core.containers.bubblewrap import sandbox_trouble
from hive_core.containers.driver import Driver, Former
from hive_core.containers.entering import nsenter
from hive_core.containers.groups import bounds_of, choose_groups
from hive_core.containers.host_names import host_name
from hive_core.containers.host_process import Launch
from hive_core.containers.inside import HOME, harness_environment
from hive_core.containers.mounts import STATE, AgentDirs, Mount
from hive_core.containers.nspawn import NspawnDriver, look_for_nspawn, nspawn_command
from hive_core.containers.process import ProcessDriver
from hive_core.containers.process_tree import kill_that_see
from hive_core.containers.ranges import UidRangesFile
from hive_core.containers.running import Running
from hive_core.containers.scopes import systemd_runs
from hive_core.helper.owner import Owner
from hive_core.helper.staging import clones, staging_command
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

if TYPE_CHECKING:
    from hive_core.containers.nixos_host import NixosHost

AGENTS_MOST = 1000
CONTAINERS = "/etc/nixos-containers"  # of a host that can have any


class Watched(Running, Protocol):
    """An agent whose end others can be shown."""

    def copy_descriptor(self) -> int | None:
        """A pidfd of its wrapper's, to be closed by whoever asked; None when its end was seen."""


class RootDriver(Driver, Protocol):
    """A driver whose agents outlive a helper, too: they are looked for anew, whatever became of their directories."""

    former: Former | None  # of a helper of before, whose sandbox was another

    async def start(self, name: AgentName, dirs: AgentDirs) -> Watched:
        """Start the agent's harness."""

    async def look(self, name: AgentName) -> Watched | None:
        """The agent that was left running, as it is."""

    def difference(self, name: AgentName, run: Path) -> str | None:
        """How the agent was started otherwise than it would be now, with this run directory."""


class StagedNspawn(NspawnDriver):
    """Containers whose directories are mounts that were made of open descriptors."""

    def __init__(self, state_dir: Path, ranges: UidRangesFile, config: Config, claude: Path | None) -> None:
        groups = choose_groups(state_dir, bounds_of(config))
        super().__init__(
            state_dir,
            base_of=ranges.first_uid,
            root=config.nspawn_root,
            claude=claude,
            orphan_grace_s=config.orphan_grace_s,
            cgroups=None if groups.trouble else groups,
        )
        self._ranges = ranges
        self._stage = state_dir / "stage"
        self._stage.mkdir(mode=0o700, exist_ok=True)
        self._state_dir = state_dir

    def _container(self, name: AgentName, dirs: AgentDirs, opened: contextlib.ExitStack) -> tuple[list[str], list[int]]:
        base = self._bases[name]
        mounts, staged = clones(dirs, base, self._stage, opened)
        inner = nspawn_command(host_name(name, self._state_dir), staged, self._claude_of(name), base, self._root)
        return [*_into_network(dirs), *staging_command("own", self._stage, mounts, inner)], mounts

    async def destroy(self, name: AgentName) -> None:
        await super().destroy(name)
        self._ranges.release(name)


class OwnersBwrap(ProcessDriver):
    """Sandboxes of bubblewrap that is run as the daemon's user: it finds their paths with no more rights than that."""

    def __init__(self, state_dir: Path, owner: Owner, config: Config, claude: Path | None) -> None:
        groups = choose_groups(state_dir, bounds_of(config))
        super().__init__(
            state_dir,
            sandbox="bwrap",
            claude=claude,
            orphan_grace_s=config.orphan_grace_s,
            cgroups=None if groups.trouble else groups,
        )
        self._owner = owner

    def _launch(self, name: AgentName, dirs: AgentDirs, status_fd: int, opened: contextlib.ExitStack) -> Launch:
        # The paths of open descriptors are this process's own. Whoever has no more rights than the daemon's user may
        # be led anywhere.
        found = tuple(Mount(mount.source.readlink(), mount.target, mount.read_only) for mount in dirs.mounts)
        real = replace(dirs, mounts=found, opened=False)
        sandbox, kept = self._sandbox(name, real, None, opened)
        # Nor is any descriptor of ours safe with that user, who may take it out of what runs there (pidfd_getfd(2)): by
        # the status file's whoever is handed it would be the agent, for us to kill. The wrapper, root's, alone has it.
        command = [*_into_network(real), *self._owner.become(), *sandbox, *self._command(name, real)]
        wrapper = self._waiting(name, command, " < /dev/null")
        return Launch(wrapper, harness_environment(HOME), kept, stdin_fd=status_fd)

    def _end_left(self, name: AgentName) -> None:
        if (state := self._state_id(name)) is not None:
            kill_that_see(state, STATE)

    def _may_be_ours(self, holder: int) -> bool:
        # The wrapper alone has the lock's descriptor. But root is to kill what this says, so it is looked at again.
        with contextlib.suppress(OSError):
            return b"\0hive-agent\0" in Path(f"/proc/{holder}/cmdline").read_bytes()
        return False

    def _entering(self, dirs: AgentDirs, first: int) -> list[str]:
        # The host's network, where it has that, takes rights to enter.
        return [*nsenter(first, ("net",)), "--", *self._owner.become(), *super()._entering(dirs, first)]


def _into_network(dirs: AgentDirs) -> list[str]:
    """What a command is given to that is to have the host's network: the helper's unit has none itself."""
    return [*nsenter(1, ("net",)), "--"] if dirs.network == "host" and systemd_runs() else []


def make_root_driver(config: Config, owner: Owner, claude: Path | None, host: NixosHost | None = None) -> RootDriver:
    """The driver that the configuration asks for, with a state directory of root's own."""
    state_dir = config.helper_state_dir
    ranges = UidRangesFile(state_dir / "uid_ranges.json", str(config.state_dir))
    if config.sandbox == "nixos-container":
        from hive_core.helper.nixos import StagedNixos  # what is not set is not loaded

        return StagedNixos(config, ranges, claude, host)
    driver: StagedNspawn | OwnersBwrap
    if config.sandbox == "nspawn":
        driver = StagedNspawn(state_dir, ranges, config, claude)
    else:
        driver = OwnersBwrap(state_dir, owner, config, claude)
    if host is not None or os.path.isdir(CONTAINERS):
        from hive_core.containers.former import FormerContainers

        driver.former = FormerContainers(state_dir, host, config.state_dir)
    return driver


def trouble_of(config: Config, owner: Owner, claude: Path | None, host: NixosHost | None = None) -> str | None:
    """Why agents cannot be started as the configuration asks, and what would mend it; None: they can."""
    state_dir = config.helper_state_dir
    if config.sandbox == "bwrap":
        return sandbox_trouble(owner.become())
    if config.sandbox == "nspawn":
        found = look_for_nspawn(state_dir, state_dir, claude, config.nspawn_root)
    else:
        from hive_core.containers.nixos_look import look_for_nixos_containers

        found = look_for_nixos_containers(state_dir, state_dir, host)
    return found.trouble or found.weakness


def check_room(state_dir: Path, name: AgentName) -> None:
    """Raise Refusal when there are as many agents as there may be, and this is another."""
    with contextlib.suppress(FileNotFoundError):
        known = {entry.name.partition(".")[0] for entry in os.scandir(state_dir / "processes")}
        if name not in known and len(known) >= AGENTS_MOST:
            raise Refusal("refused", f"cannot start {name}: there are {AGENTS_MOST} agents; destroy some")
