"""NixOS containers of a daemon without privileges: it builds systems itself, and the helper has containers of them."""

from __future__ import annotations

from hive_core.containers.driver import Systems
from hive_core.containers.helped import HelpedDriver, Helper
from hive_core.containers.nixos_build import SystemBuilds
from hive_core.containers.process import ProcessDriver
from hive_core.protocol.words import AgentName, StorePath, parse_store_path

# A NixOS boots, its units are stopped, and a switch starts those of the new system: the helper has bounds of its own.
PATIENCE_OF_S = {"start": 400.0, "find": 200.0, "destroy": 200.0, "switch": 900.0, "roll_back": 900.0}


class HelpedSystems(HelpedDriver, Systems):
    """See driver.py."""

    def __init__(self, helper: Helper, sandbox: str, leftover: ProcessDriver, builds: SystemBuilds) -> None:
        super().__init__(helper, sandbox, leftover)
        self._builds = builds

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        return await self._builds.build(name, derivation)

    async def switch(self, name: AgentName, system: StorePath) -> None:
        await self._helper.ask("switch", name, system=system)
        self._builds.forget(name)

    async def roll_back(self, name: AgentName) -> StorePath:
        return parse_store_path((await self._helper.ask("roll_back", name)).get("system"))

    async def current(self, name: AgentName) -> StorePath | None:
        system = (await self._helper.ask("current", name)).get("system")
        return None if system is None else parse_store_path(system)

    async def destroy(self, name: AgentName) -> None:
        await super().destroy(name)
        self._builds.forget(name)
