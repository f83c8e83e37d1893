"""Builds the NixOS systems of agents, which takes no rights on the host: whoever may ask nix may do it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hive_core.containers.driver import Systems
from hive_core.containers.nixos_container import NixosContainers
from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.run_command import TookTooLong
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, StorePath, parse_store_path


class SystemBuilds:
    """
    state_dir  the daemon's; what was built is kept by a link in there until it is switched to
    build_s    how long a system may be built
    """

    def __init__(self, state_dir: Path, build_s: float, host: NixosHost | None = None) -> None:
        self._files = state_dir / "processes"
        self._build_s = build_s
        self._host = host or NixosHost()

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        """See driver.py."""
        if (await self._host.run("nix-store", "--check-validity", derivation)).code:
            why = f"the store has no {derivation} any more; it has to be evaluated again"
            raise Refusal("not_found", f"cannot build {name}: {why}")
        self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = ["nix-store", "--realise", derivation, "--add-root", str(self._link(name))]
        try:
            await self._host.insist(f"build {name}", *words, patience_s=self._build_s)
        except TookTooLong:
            why = f"it took longer than {self._build_s:g} s (build_s) and was ended; build less, or set build_s higher"
            raise Refusal("failed", f"cannot build {name}: {why}") from None
        return parse_store_path(os.readlink(self._link(name)))

    def forget(self, name: AgentName) -> None:
        """What was built is kept by others, or by nobody."""
        self._link(name).unlink(missing_ok=True)

    def _link(self, name: AgentName) -> Path:
        return self._files / f"{name}.built"


class NixosContainerDriver(NixosContainers, Systems):
    """The driver of a daemon that is root: it builds systems, and has the containers too."""

    def __init__(self, state_dir: Path, builds: SystemBuilds, **settings: Any) -> None:
        super().__init__(state_dir, **settings)
        self._builds = builds

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        return await self._builds.build(name, derivation)

    async def switch(self, name: AgentName, system: StorePath) -> None:
        await super().switch(name, system)
        self._builds.forget(name)
