"""NixOS containers: an agent is a unit in one of its own, which was built from its flake (nixos_build.py).

The container is `container@ID.service` of the host's systemd, so there is never a second copy of it, and it outlives
the daemon. Inside, the harness is a unit whose end ends the container with its exit code; the host's unit writes that
into the agent's end file, with the run (InvocationID) that it is of, even when no daemon watches. What is printed is in
the host's journal, which knows the run too.

Before each start the conf file and the unit's drop-in are written anew: binds, uids, bounds, and which network.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hive_core.containers.bounds import Bounds
from hive_core.containers.cgroups import joining
from hive_core.containers.driver import Driver, Former
from hive_core.containers.entering import confined
from hive_core.containers.host_process import LINES_LIMIT_BYTES, LINES_MOST
from hive_core.containers.inside import HOME, harness_environment, program_paths
from hive_core.containers.mounts import STATE, AgentDirs, Mount
from hive_core.containers.mounts import shape as seen
from hive_core.containers.nixos_conf import OWN_FILES, conf_text, drop_in_text, marker
from hive_core.containers.nixos_host import NixosHost, UnitState, reason_of
from hive_core.containers.nixos_systems import NixosSystems, write_whole
from hive_core.containers.process_tree import boot_id, folder_id, numbered_inside, usage_below
from hive_core.containers.run_command import run_command
from hive_core.containers.running import Done, Exit, Usage
from hive_core.containers.running_unit import RunningUnit, exit_code
from hive_core.containers.seccomp import filter_program
from hive_core.protocol.container_id import container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, Network, StorePath

log = logging.getLogger(__name__)
SANDBOX = "nixos-container"
HOST_UIDS = "nixos-container-host-uids"  # the name of one without uids of its own
_SYSTEMCTL = "/run/current-system/sw/bin/systemctl"  # inside
HARNESS_UNIT = "hive-agent.service"  # inside; nix/agent/service.nix
_ENVIRONMENT = {**harness_environment(HOME), "PATH": "/run/current-system/sw/bin:/usr/bin:/bin"}  # of a command
_START_WITHIN_S = 150.0
_STOP_WITHIN_S = 150.0
_ENDS_WITHIN_S = 10.0
# How systemd inside passes on to the console what a unit prints.
_OF_HARNESS = re.compile(r"(?:\[[ \d.]+\] )?hive-agent\[\d+\]: ?")
_KILLED_FOR_MEMORY = "killed by the OOM killer"
# What a NixOS system makes and finds below /: it can make nothing there itself, where `/` stays the host's root's.
_ROOT_FOLDERS = ("bin", "etc", "home", "lib", "lib64", "mnt", "nix", "opt", "root", "sbin", "srv", "usr/bin")
_ROOT_FOLDERS_OF_VAR = tuple(f"var/{each}" for each in ("empty", "cache", "lib/private", "log", "spool", "tmp"))
_ROOT_FILES = ("etc/os-release", "etc/machine-id")


class NixosContainers(NixosSystems, Driver):
    """Starts containers through nixos-container, and has them switch. Needs root.

    base_of: the first uid of an agent's own range, the same for ever.
    own_uids: whether agents have uids of their own.
    bounds: what each may take of the host; None bounds them not at all.
    former: what ends what an agent runs in otherwise, where the hive's sandbox was another.
    """

    former: Former | None = None

    def __init__(
        self,
        state_dir: Path,
        *,
        base_of: Callable[[AgentName], Awaitable[int]],
        own_uids: bool = True,
        claude: Path | None,
        bounds: Bounds | None,
        hive: Path | None = None,
        host: NixosHost | None = None,
    ) -> None:
        super().__init__(state_dir, hive=hive, host=host)
        self._sandbox = SANDBOX if own_uids else HOST_UIDS
        self._base_of = base_of
        self._claude = claude
        self._bounds = bounds
        self._filter = filter_program()
        self._loaded: set[AgentName] = set()  # whose drop-ins systemd has read as they stand

    @property
    def sandbox(self) -> str:
        return self._sandbox

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        made_of = [
            self.sandbox,
            str(self._claude),
            *self._lent(),
            *seen(dirs),
            str(self._bounds),
            await self.current(name),
        ]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]

    async def start(self, name: AgentName, dirs: AgentDirs) -> RunningUnit:
        """Start the agent's container. Raises Refusal and OSError when it cannot be started, or runs already."""
        system = await self.current(name)
        if not self._is_ours(name) or system is None:
            raise Refusal("conflict", f"cannot start {name}: it has no system yet; let a commit of its be deployed")
        unit = self._unit(name)
        state = await self._host.state(unit)
        if not state.ended:
            raise BlockingIOError(errno.EAGAIN, f"it runs already, or ends just now: systemctl status {unit}")
        # A directory of the agent's may be on a disk that hangs: that holds up nobody else.
        where = await trio.to_thread.run_sync(self._prepare, dirs, limiter=trio.CapacityLimiter(1))
        base = await self._base_of(name) if self.sandbox == SANDBOX else None
        async with self._placed(name, dirs, base) as placed:
            await self._write_settings(name, system, placed, base, dirs.network)
            self._file(name, "end").unlink(missing_ok=True)
            self._write(name, "run", {**where, "since": self._told(name, "run").get("since", _now())})
            if state.active == "failed":
                await self._host.run("systemctl", "reset-failed", unit)
            return await self._start_unit(name)

    @asynccontextmanager
    async def _placed(self, name: AgentName, dirs: AgentDirs, base: int | None) -> AsyncIterator[Sequence[Mount]]:
        """What is mounted for an agent, where its unit finds it for as long as it begins."""
        yield dirs.mounts

    def _prepare(self, dirs: AgentDirs) -> dict[str, object]:
        dirs.make()
        return self._where(dirs.run)

    async def find(self, name: AgentName, dirs: AgentDirs) -> RunningUnit | None:
        if self.former is not None:
            await self.former.end(name, dirs)
        if (running := await self.look(name)) is None:
            return None
        if (difference := self.difference(name, dirs.run)) is None:
            return running
        log.warning("ended %s (pid %d): it was started %s", name, running.pid, difference, extra={"agent": name})
        await self._end(name, running)
        return None

    async def look(self, name: AgentName) -> RunningUnit | None:
        """The agent that was left running, as it is."""
        if not self._has_own(name):
            return None
        state = await self._host.state(self._unit(name))
        if state.active == "deactivating":  # how it ended is written at the end of that
            state = await self._host.settled(self._unit(name), _ENDS_WITHIN_S)
        if not state.runs:
            return None
        self._remember(name, state.invocation)
        return self._running(name, state)

    async def missed_exit(self, name: AgentName) -> Exit | None:
        told = self._told(name, "json")
        if not told:
            return None
        await self.forget(name)
        code = exit_code(self._file(name, "end"), told.get("invocation", ""))
        return Exit(code, with_machine=code is None and told.get("boot") != boot_id())

    async def forget(self, name: AgentName) -> None:
        self._file(name, "json").unlink(missing_ok=True)

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        run = self._told(name, "run").get("invocation")
        if not run:
            return ""
        lines = await self._host.journal(LINES_MOST, f"_SYSTEMD_INVOCATION_ID={run}")
        words = [*(_said_by_harness(lines) or lines)]
        of_systemd = await self._host.journal(20, "_PID=1", f"INVOCATION_ID={run}")
        if self._bounds is not None and any(_KILLED_FOR_MEMORY in line for line in of_systemd):
            most = f"agent_memory_bytes, {self._bounds.memory_bytes:,}"
            words.append(f"hive: the kernel killed some of its processes: together they held more than {most}")
        return "\n".join(words).strip().encode()[-limit:].decode("utf-8", "ignore")

    async def logs(self, name: AgentName, lines: int = 50) -> list[str]:
        since = self._told(name, "run").get("since")
        if not since:
            return []
        most = min(lines, LINES_MOST)
        # Others print too, while it is started: more are read than are told.
        printed = await self._host.journal(most + 200, f"--since=@{since}", f"--unit={self._unit(name)}")
        text = "\n".join(_said_by_harness(printed)[-most:])[-LINES_LIMIT_BYTES:]
        return text.splitlines()

    async def usage(self, name: AgentName) -> Usage:
        try:
            first = await self._first_inside(name)
        except Refusal:
            first = None
        return Usage(0, 0) if first is None else Usage(*usage_below(first))

    async def exec(self, name: AgentName, dirs: AgentDirs, command: Sequence[str], patience_s: float = 60.0) -> Done:
        harness = await self._harness(name)
        if harness is None:
            raise Refusal("conflict", "cannot run a command in the container: the agent does not run; start it first")
        entering = confined(self._filter, _ENVIRONMENT, "--enter", str(harness), "--chdir", STATE)
        return await run_command(joining(harness, [*entering, *command]), patience_s)

    async def destroy(self, name: AgentName) -> None:
        if self._has_own(name):
            await self._host.destroy(f"destroy {name}", container_id(name))
        if self.former is not None:
            await self.former.forget(name)
        for suffix in OWN_FILES:
            self._file(name, suffix).unlink(missing_ok=True)

    async def _start_unit(self, name: AgentName) -> RunningUnit:
        unit = self._unit(name)
        try:
            done = await self._host.run("nixos-container", "start", container_id(name), patience_s=_START_WITHIN_S)
        except Refusal:
            # Whoever asked is told that it does not run: it shall not come up later.
            with contextlib.suppress(Refusal):
                await self._host.run("systemctl", "stop", unit, patience_s=_STOP_WITHIN_S)
            raise
        state = await self._host.state(unit)
        if done.code and not self._file(name, "end").exists():
            raise Refusal("failed", f"cannot start {name}: {done.output.strip()[-300:] or 'no reason given'}")
        running = self._running(name, state)
        try:
            self._remember(name, state.invocation)
        except (Refusal, OSError):
            # Whoever asked is told that it does not run.
            with trio.CancelScope(shield=True):
                await self._end(name, running)
            raise
        return running

    async def _write_settings(
        self, name: AgentName, system: StorePath, mounts: Sequence[Mount], base: int | None, network: Network
    ) -> None:
        """What the host has of the container is what this daemon composes, whoever wrote there meanwhile."""
        first_line = marker(self._hive, name)
        write_whole(self._conf_file(name), conf_text(first_line, system, mounts, self._lent(), base, network))
        drop_in = drop_in_text(first_line, self._file(name, "end"), self._bounds)
        if write_whole(self._host.drop_in(container_id(name)), drop_in):
            self._loaded.discard(name)
        if name not in self._loaded:  # nor is it known of one that a daemon of before has written
            await self._host.insist(f"start {name}", "systemctl", "daemon-reload")
            self._loaded.add(name)
        self._make_root(self._host.roots / container_id(name), base or 0)

    def _make_root(self, root: Path, owner: int) -> None:
        """The folders of the container's root directory, which no container ever writes: they belong to its root."""
        for folder in ("", *_ROOT_FOLDERS, *_ROOT_FOLDERS_OF_VAR):
            (root / folder).mkdir(mode=0o755, parents=True, exist_ok=True)
        for file in _ROOT_FILES:
            (root / file).touch()
        for path in (root, *root.rglob("*")):
            os.chown(path, owner, owner, follow_symlinks=False)
            if not path.is_symlink():  # who is not root in there has to find its programs, whatever our umask is
                path.chmod(0o755 if path.is_dir() else 0o644)

    def _lent(self) -> list[str]:
        """Programs that agents need and that are not in the host's store."""
        return sorted(program_paths(self._claude))

    def _running(self, name: AgentName, state: UnitState) -> RunningUnit:
        end_file = self._file(name, "end")
        pid = state.pid if state.runs else 0
        return RunningUnit(self._host, self._unit(name), pid, state.invocation, end_file, partial(self._ask, name))

    async def _ask(self, name: AgentName) -> None:
        """Ask the harness to end at its turn's edge, which ends the container."""
        done = await self._inside(name, _SYSTEMCTL, "kill", "--kill-whom=main", "--signal=TERM", HARNESS_UNIT)
        if done.code:
            raise Refusal("failed", f"cannot stop {name}: {reason_of(done)}")

    async def _end(self, name: AgentName, running: RunningUnit) -> None:
        running.kill()
        await running.wait()
        unit = self._unit(name)
        if not (await self._host.state(unit)).ended:
            await self._host.insist(f"end {name}", "systemctl", "stop", unit, patience_s=_STOP_WITHIN_S)
        await self.forget(name)

    async def _harness(self, name: AgentName) -> int | None:
        """The host's number of the harness. systemd inside says which it is: whoever may lie there is in there too."""
        first = await self._first_inside(name)
        if first is None:
            return None
        done = await self._inside(name, _SYSTEMCTL, "show", "--property=MainPID", "--value", HARNESS_UNIT)
        if done.code:
            raise Refusal("failed", f"cannot find the harness of {name}: {reason_of(done)}")
        inside = done.output.strip()
        return numbered_inside(first, int(inside)) if inside.isdecimal() else None

    def difference(self, name: AgentName, run: Path) -> str | None:
        """How the agent was started otherwise than this daemon would; None too when nobody wrote it down."""
        told, here = self._told(name, "run"), self._where(run)
        if told.get("sandbox", self.sandbox) != self.sandbox:
            return f"with sandbox {told['sandbox']}, and this daemon has {self.sandbox}"
        if told.get("id", here["id"]) != here["id"]:
            return f"with its sockets in {told.get('run')}, and this daemon has them in {run}"
        return None

    def _where(self, run: Path) -> dict[str, object]:
        with contextlib.suppress(OSError):
            return {"run": os.path.realpath(run), "id": list(folder_id(run)), "sandbox": self.sandbox}
        return {"run": str(run), "id": None, "sandbox": self.sandbox}

    def _remember(self, name: AgentName, invocation: str) -> None:
        self._write(name, "json", {"invocation": invocation, "boot": boot_id()})
        self._write(name, "run", {**self._told(name, "run"), "invocation": invocation})

    def _write(self, name: AgentName, suffix: str, value: dict[str, object]) -> None:
        write_whole(self._file(name, suffix), json.dumps(value))

    def _told(self, name: AgentName, suffix: str) -> dict[str, Any]:
        try:
            told = json.loads(self._file(name, suffix).read_text())
        except (OSError, ValueError):
            return {}
        return told if isinstance(told, dict) else {}


def _said_by_harness(lines: Sequence[str]) -> list[str]:
    """What of a container's console the harness printed."""
    return [line[match.end() :] for line in lines if (match := _OF_HARNESS.match(line))]


def _now() -> int:
    return int(time.time())
