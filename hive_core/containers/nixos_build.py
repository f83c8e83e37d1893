"""Builds the NixOS systems of agents, which takes no rights on the host: whoever may ask nix may do it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hive_core.containers.driver import Systems
from hive_core.containers.nixos_container import NixosContainers
from hive_core.containers.nixos_host import NixosHost
from hive_core.nix import Nix, NixFailed, explained
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, StorePath, parse_store_path


class SystemBuilds:
    """
    state_dir  the daemon's; what was built is kept by a link in there until it is switched to
    nix        what evaluates flakes, in its limits
    readable   what of the host those flakes are and take as inputs, outside of the store
    build_s    how long a system may be built
    """

    def __init__(
        self, state_dir: Path, *, nix: Nix, readable: Sequence[Path], build_s: float, host: NixosHost | None = None
    ) -> None:
        self._files = state_dir / "processes"
        self._nix = nix
        self._readable = readable
        self._build_s = build_s
        self._host = host or NixosHost()

    async def build(self, name: AgentName, flake: str) -> StorePath:
        """See driver.py."""
        system = f'{flake}#nixosConfigurations."{name}".config.system.build.toplevel'
        words = ["eval", "--raw", "--no-write-lock-file", f"{system}.drvPath"]
        try:
            derivation = parse_store_path((await self._nix.run(words, readable=self._readable)).decode())
        except NixFailed as failed:
            raise Refusal("failed", f"cannot build {name}: {explained(failed)}") from None
        self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        words = ["nix-store", "--realise", derivation, "--add-root", str(self._link(name))]
        await self._host.insist(f"build {name}", *words, patience_s=self._build_s)
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

    async def build(self, name: AgentName, flake: str) -> StorePath:
        return await self._builds.build(name, flake)

    async def switch(self, name: AgentName, system: StorePath) -> None:
        await super().switch(name, system)
        self._builds.forget(name)
