"""What an agent may run in still when the hive's sandbox was another before: units of systemd, or processes of ours.

A driver knows its own kind of container alone, and there is never a second copy of an agent: so before it looks for
one of its own, whatever runs of the agent in the other kind is ended.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from hive_core.containers.mounts import AgentDirs
from hive_core.containers.nixos_conf import OWN_FILES, marker
from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.process import ProcessDriver
from hive_core.containers.running_unit import RunningUnit
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

log = logging.getLogger(__name__)


class FormerProcesses:
    """Of a hive whose agents were processes of the daemon's, and are NixOS containers now."""

    def __init__(self, state_dir: Path, sandbox: str, orphan_grace_s: float) -> None:
        self._leftover = ProcessDriver(state_dir, sandbox=sandbox, claude=None, orphan_grace_s=orphan_grace_s)

    async def end(self, name: AgentName, dirs: AgentDirs) -> None:
        if (running := await self._leftover.find(name, dirs)) is not None:  # nobody wrote down in what it runs
            running.kill()
            await running.wait()
            await self._leftover.forget(name)

    async def forget(self, name: AgentName) -> None:
        await self._leftover.destroy(name)


class FormerContainers:
    """The other way round. The container stays, for a hive that goes back to it, and is not started by itself."""

    def __init__(self, state_dir: Path, host: NixosHost | None = None, hive: Path | None = None) -> None:
        self._files = state_dir.absolute() / "processes"
        self._hive = hive or state_dir.absolute()
        self._host = host or NixosHost()

    async def end(self, name: AgentName, dirs: AgentDirs) -> None:
        if not self._is_ours(name):
            return
        unit = f"container@{container_id(name)}.service"
        state = await self._host.state(unit)
        if state.runs:
            log.warning("ended %s (%s): its sandbox is another now", name, unit, extra={"agent": name})
            running = RunningUnit(self._host, unit, state.pid, state.invocation, self._hive, _ask_nothing)
            running.kill()
            await running.wait()
        self._forget(self._files / f"{name}.json")

    async def forget(self, name: AgentName) -> None:
        """Also where that fails the agent is destroyed: a daemon without the host's rights could never destroy it."""
        if not self._is_ours(name):
            return
        machine = container_id(name)
        try:
            await self._host.destroy(f"remove the container that {name} had", machine)
        except Refusal as refusal:
            way_out = f"as root: `nixos-container destroy {machine}`"
            log.warning("%s; %s", refusal.message, way_out, extra={"agent": name})
        for suffix in OWN_FILES:
            (self._files / f"{name}.{suffix}").unlink(missing_ok=True)

    def _is_ours(self, name: AgentName) -> bool:
        conf = self._host.confs / f"{container_id(name)}.conf"
        try:
            return conf.read_text("utf-8", "replace").startswith(marker(self._hive, name))
        except OSError:
            return False

    def _forget(self, file: Path) -> None:
        """Its end was asked for. What is of the driver that is set now says nothing of a run of a unit."""
        try:
            told = json.loads(file.read_text())
        except (OSError, ValueError):
            return
        if isinstance(told, dict) and "invocation" in told:
            file.unlink(missing_ok=True)


async def _ask_nothing() -> None:
    pass
