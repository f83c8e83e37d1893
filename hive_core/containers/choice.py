"""Which driver a daemon has: the one that is set, where it works here."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from hive_core.config import Config
from hive_core.containers.bubblewrap import sandbox_trouble
from hive_core.containers.driver import Driver
from hive_core.containers.former import FormerContainers, FormerProcesses
from hive_core.containers.groups import bounds_of, choose_groups
from hive_core.containers.helped import HelpedDriver, Helper
from hive_core.containers.helped_systems import PATIENCE_OF_S, HelpedSystems
from hive_core.containers.host_process import HostProcessDriver
from hive_core.containers.nixos_build import NixosContainerDriver, SystemBuilds
from hive_core.containers.nixos_look import look_for_nixos_containers
from hive_core.containers.nspawn import NspawnDriver, look_for_nspawn
from hive_core.containers.process import ProcessDriver
from hive_core.containers.seccomp import filter_program
from hive_core.flakes.building import nix_trouble
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """What was found of the sandbox that is set, by trying it."""

    sandbox: str  # what agents get: "bwrap", "nspawn", "nixos-container", or "none"
    trouble: str | None = None  # why they cannot have what is set, and what would mend it
    weakness: str | None = None  # what it does not do here, and what would mend it
    bwrap_trouble: str | None = None  # why there is no bubblewrap, which logins run in whatever is set


def choose_sandbox(config: Config, claude: Path | None) -> Choice:
    """Try what is set. Agents without a sandbox are those of a hive whose sandbox does not work, or is not wanted."""
    bwrap_trouble = trouble = sandbox_trouble()
    if config.helper is not None:
        if config.unsafe_no_sandbox:
            fix = "unset unsafe_no_sandbox, or helper"
            raise Refusal("usage", f"cannot start: the helper starts no agent without a sandbox; {fix}")
        # It has tried, and tells when it is asked; it may be away now. Systems are built here.
        trouble = nix_trouble(config) if config.sandbox == "nixos-container" else None
        if bwrap_trouble and bwrap_trouble.startswith("bubblewrap does not work"):
            said = bwrap_trouble.partition("; ")[0]
            bwrap_trouble = f"with the helper the daemon's unit is hardened so far that it can make none ({said})"
        return Choice(config.sandbox, trouble, bwrap_trouble=bwrap_trouble)
    weakness = None
    if config.sandbox == "nspawn":
        found = look_for_nspawn(config.state_dir, config.runtime_dir, claude, config.nspawn_root)
        trouble, weakness = found.trouble, found.weakness
    if config.sandbox == "nixos-container":
        found = look_for_nixos_containers(config.state_dir, config.runtime_dir)
        trouble, weakness = found.trouble or nix_trouble(config), found.weakness
    sandbox = "none" if trouble or config.unsafe_no_sandbox else config.sandbox
    return Choice(sandbox, trouble, None if sandbox == "none" else weakness, bwrap_trouble)


def make_driver(
    config: Config,
    choice: Choice,
    *,
    claude: Path | None,
    life_fd: int | None,
    first_uid: Callable[[AgentName], Awaitable[int]],
    at_end: Callable[[Callable[[], None]], object],
) -> Driver:
    """The driver that the choice asks for.

    first_uid: says where an agent's range of uids begins. at_end: is given what is to be done when nobody starts agents
    any more.
    """
    if config.helper is not None:
        return _helped_driver(config, config.helper, choice)
    groups = choose_groups(config.state_dir, bounds_of(config))
    if groups.trouble:
        log.warning("%s", groups.trouble)
    if choice.sandbox != "none" and filter_program() is None:
        log.warning("there is no filter of system calls for this processor: agents can make all of them")
    if choice.sandbox == "nixos-container":
        return _nixos_driver(config, choice, claude, first_uid)
    cgroups = None if groups.trouble else groups
    driver: HostProcessDriver
    if choice.sandbox == "nspawn":
        driver = NspawnDriver(
            config.state_dir,
            base_of=first_uid,
            own_uids=choice.weakness is None,
            root=config.nspawn_root,
            claude=claude,
            orphan_grace_s=config.orphan_grace_s,
            life_fd=life_fd,
            cgroups=cgroups,
        )
    else:
        driver = ProcessDriver(
            config.state_dir,
            sandbox=choice.sandbox,
            claude=claude,
            orphan_grace_s=config.orphan_grace_s,
            life_fd=life_fd,
            cgroups=cgroups,
        )
    driver.former = FormerContainers(config.state_dir)
    at_end(driver.tidy)
    return driver


def _helped_driver(config: Config, socket: Path, choice: Choice) -> Driver:
    leftover = ProcessDriver(config.state_dir, sandbox="", claude=None, orphan_grace_s=config.orphan_grace_s)
    own = config.sandbox == "nixos-container"
    patience_s = PATIENCE_OF_S if own else {}
    helper = Helper(socket, config.state_dir, config.runtime_dir, config.sandbox, patience_s)
    if own and choice.trouble is None:
        return HelpedSystems(helper, choice.sandbox, leftover, SystemBuilds(config.state_dir, config.build_s))
    return HelpedDriver(helper, choice.sandbox, leftover)


def _nixos_driver(
    config: Config, choice: Choice, claude: Path | None, first_uid: Callable[[AgentName], Awaitable[int]]
) -> Driver:
    """Its units outlive the daemon, whatever that asks of other agents; and systemd bounds them."""
    driver = NixosContainerDriver(
        config.state_dir,
        SystemBuilds(config.state_dir, config.build_s),
        base_of=first_uid,
        own_uids=choice.weakness is None,
        claude=claude,
        bounds=bounds_of(config),
    )
    driver.former = FormerProcesses(config.state_dir, driver.sandbox, config.orphan_grace_s)
    return driver
