"""The process driver: an agent is a harness in a bubblewrap sandbox, all namespaces unshared, the network too.

The sandbox has a pid namespace of its own, so ending its first process ends the whole agent. The wrapper outside is
bwrap itself, which writes the exit code into the status file.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from hive_core.containers.bounds import AgentGroups
from hive_core.containers.bubblewrap import bwrap_command
from hive_core.containers.entering import confined
from hive_core.containers.host_process import HostProcessDriver, Launch
from hive_core.containers.inside import HOME, harness_environment, in_memory
from hive_core.containers.mounts import STATE, AgentDirs
from hive_core.containers.status_file import end_inside
from hive_core.protocol.words import AgentName


class ProcessDriver(HostProcessDriver):
    """Starts harnesses with bwrap, or bare where `sandbox` is "none" and somebody chose that."""

    def __init__(
        self,
        state_dir: Path,
        *,
        sandbox: str,
        claude: Path | None,
        orphan_grace_s: float,
        life_fd: int | None = None,
        cgroups: AgentGroups | None = None,
    ) -> None:
        super().__init__(state_dir, claude=claude, orphan_grace_s=orphan_grace_s, life_fd=life_fd, cgroups=cgroups)
        self.sandbox = sandbox

    def _first_inside(self, name: AgentName) -> int | None:
        # Bare, the harness is what was started.
        return self._remembered(name) if self.sandbox == "none" else super()._first_inside(name)

    def _end_left(self, name: AgentName) -> None:
        if (state := self._state_id(name)) is not None:
            end_inside(self._file(name, "status"), state)

    def _entering(self, dirs: AgentDirs, first: int) -> list[str]:
        if self.sandbox == "none":
            environment = harness_environment(str(dirs.state))
            return ["env", f"--chdir={dirs.state}", *(f"{name}={value}" for name, value in environment.items())]
        # As in its user namespace it is, where nobody else is known.
        options = ("--enter-as-is", str(first), "--chdir", STATE)
        return confined(self._filter, harness_environment(HOME), *options)

    def _launch(self, name: AgentName, dirs: AgentDirs, status_fd: int, opened: contextlib.ExitStack) -> Launch:
        command = self._command(name, dirs)
        if self.sandbox == "none":
            return Launch(command, harness_environment(str(dirs.state)))
        sandbox, kept = self._sandbox(name, dirs, status_fd, opened)
        return Launch([*sandbox, *command], harness_environment(HOME), kept)

    def _sandbox(
        self, name: AgentName, dirs: AgentDirs, status_fd: int | None, opened: contextlib.ExitStack
    ) -> tuple[list[str], list[int]]:
        """bwrap with its options, and the descriptors it is given; `opened` closes them here."""
        filter_fd = opened.enter_context(in_memory(self._filter)).fileno() if self._filter else None
        command = bwrap_command(dirs, self._claude_of(name), status_fd, filter_fd)
        return command, [] if filter_fd is None else [filter_fd]
