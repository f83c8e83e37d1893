"""Agents whose harness is a shell's script, in the containers of each driver, as tests start and watch them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from hive_core.containers.bounds import AgentGroups, Bounds
from hive_core.containers.driver import Driver
from hive_core.containers.former import FormerContainers, FormerProcesses
from hive_core.containers.helped_systems import HelpedSystems
from hive_core.containers.mounts import AgentDirs, agent_dirs
from hive_core.containers.nixos_build import NixosContainerDriver, SystemBuilds
from hive_core.containers.nspawn import HOST_UIDS, NspawnDriver
from hive_core.containers.process import ProcessDriver
from hive_core.containers.process_tree import first_in_namespace
from hive_core.containers.ranges import pick_range
from hive_core.containers.running import Running, RunningProcess
from hive_core.containers.running_unit import RunningUnit
from hive_core.protocol.words import MANAGER, AgentName, Network
from tests import processes
from tests.containers.helped import (
    HELPED_STAND_IN,
    HELPER_KINDS,
    HelpedScripts,
    end_helper,
    helped_in,
    helper_in,
    leftover_in,
    unmount_all,
)
from tests.containers.standin.host import StandInHost, host_of
from tests.control_groups import remove_groups
from tests.needs import missing
from tests.processes import PATIENCE_S, children_of, pids_naming
from tests.starters import run_forked

IRIS = AgentName("iris")
STAND_IN = "nixos-container (stand-in)"
UNITS = (STAND_IN, HELPED_STAND_IN)  # whose containers are units of a stand-in host's
SANDBOXES = ["bwrap", "nspawn", HOST_UIDS, STAND_IN, *HELPER_KINDS]
KINDS = [*SANDBOXES, "none"]


def need(kind: str) -> str:
    """The kind of driver, when this machine has what it needs; with HIVE_REQUIRE=ci a test fails without."""
    needed: tuple[str, ...] = (kind.partition("-")[0],)
    if kind in UNITS:
        needed = ("nspawn", "bwrap", "nix")
    elif kind in HELPER_KINDS:
        needed = ("nspawn", "bwrap")
    if kind in SANDBOXES and (why := next(filter(None, map(missing, needed)), "")):
        assert os.environ.get("HIVE_REQUIRE") != "ci", why
        pytest.skip(why)
    return kind


class _Script:
    """The driver as it is, but the agent is a script."""

    script = ""

    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        return ["/bin/sh", "-c", self.script]


class _Processes(_Script, ProcessDriver):
    pass


class _Containers(_Script, NspawnDriver):
    pass


class Systems(NixosContainerDriver):
    """The driver as it is, but before a start it switches to a system whose harness is a script."""

    def __init__(self, folder: Path, bounds: Bounds | None) -> None:
        self.stand_in = StandInHost(folder / "host")
        self.script = ""
        super().__init__(
            folder, builds_in(folder), base_of=base_of, claude=None, bounds=bounds, host=self.stand_in.host
        )

    async def start(self, name: AgentName, dirs: AgentDirs) -> RunningUnit:
        system = await trio.to_thread.run_sync(self.stand_in.system, self.script)
        await self.switch(name, system)
        return await super().start(name, dirs)

    @property
    def life_fd_inside(self) -> None:
        return None


class HelpedStandIn(HelpedSystems, HelpedScripts):
    """The same through a helper."""

    def __init__(self, folder: Path, cgroups: AgentGroups | None = None) -> None:
        self.stand_in = StandInHost(folder / "host")
        self.script = ""
        helper = helper_in(folder, "nixos-container", cgroups)
        super().__init__(helper, "nixos-container", leftover_in(folder), builds_in(folder))

    async def start(self, name: AgentName, dirs: AgentDirs) -> Running:
        await self.switch(name, await trio.to_thread.run_sync(self.stand_in.system, self.script))
        return await super().start(name, dirs)

    def with_script(self, script: str) -> HelpedStandIn:
        self.script = script
        return self


def builds_in(folder: Path) -> SystemBuilds:
    """What builds systems on the stand-in host of a folder."""
    return SystemBuilds(folder, build_s=60, host=host_of(folder / "host"))


async def base_of(name: AgentName) -> int:
    return pick_range(name, ())


def driver_in(
    folder: Path, kind: str, script: str, life_fd: int | None = None, cgroups: AgentGroups | None = None
) -> _Processes | _Containers | Systems | HelpedScripts:
    if kind == HELPED_STAND_IN:
        return HelpedStandIn(folder, cgroups).with_script(script)
    if kind in HELPER_KINDS:
        return helped_in(folder, kind, script, cgroups)
    driver: _Processes | _Containers | Systems
    if kind == STAND_IN:
        driver = Systems(folder, None if cgroups is None else cgroups.bounds)
    elif kind in ("bwrap", "none"):
        driver = _Processes(folder, sandbox=kind, claude=None, orphan_grace_s=600, life_fd=life_fd, cgroups=cgroups)
    else:
        driver = _Containers(
            folder,
            base_of=base_of,
            own_uids=kind != HOST_UIDS,
            claude=None,
            orphan_grace_s=600,
            life_fd=life_fd,
            cgroups=cgroups,
        )
    driver.script = script
    driver.former = (
        FormerProcesses(folder, driver.sandbox, 600)
        if isinstance(driver, Systems)
        else FormerContainers(folder, host_of(folder / "host"))
    )
    return driver


def dirs_in(folder: Path, manager: bool = False, name: str = "iris", network: Network = "private") -> AgentDirs:
    dirs = agent_dirs(folder, folder / "runtime", MANAGER if manager else AgentName(name), network)
    for path in (dirs.run, dirs.state.parent, folder / "proposed"):
        path.mkdir(parents=True, exist_ok=True)
    return dirs


def digest_of(tree: Path) -> str:
    """Of every name, kind, mode, owner, link and byte below a directory."""
    whole = hashlib.sha256()
    for folder, below, files in sorted(os.walk(tree)):
        for entry in sorted((*below, *files)):
            path = Path(folder, entry)
            found = path.lstat()
            whole.update(f"{path.relative_to(tree)} {found.st_mode} {found.st_uid} {found.st_gid} ".encode())
            if stat.S_ISLNK(found.st_mode):
                whole.update(os.readlink(path).encode())
            elif stat.S_ISREG(found.st_mode):
                whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def inside(folder: Path, kind: str, where: str = "state") -> str:
    """Where an agent finds its own directory."""
    names = {"state": "/state", "run": "/run/hive"}
    return str(getattr(dirs_in(folder), where)) if kind == "none" else names[where]


async def run(
    folder: Path, kind: str, script: str, manager: bool = False, name: AgentName = IRIS, network: Network = "private"
) -> tuple[int | None, str]:
    """Run a script as an agent to its end: (exit code, what it printed)."""
    driver = driver_in(folder, kind, script)
    name = MANAGER if manager else name
    with trio.fail_after(PATIENCE_S):
        running = await driver.start(name, dirs_in(folder, manager, name, network))
        code = (await running.wait()).code
    return code, await driver.last_words(name, 100_000)


async def run_program(folder: Path, kind: str, program: str, then: str = "true") -> tuple[int | None, str]:
    """The same with a Python program, and a command behind it."""
    (dirs_in(folder).run / "program.py").write_text(program)
    return await run(folder, kind, f"{sys.executable} {inside(folder, kind, 'run')}/program.py && {then}")


@asynccontextmanager
async def started(
    folder: Path, kind: str, script: str, network: Network = "private"
) -> AsyncIterator[tuple[Driver, Running]]:
    """An agent that runs until the block ends, and has said that it is ready. STATE is its directory."""
    ready = make_fifo(folder, "ready")
    driver = driver_in(folder, kind, script.replace("STATE", inside(folder, kind)))
    running = await driver.start(IRIS, dirs_in(folder, network=network))
    try:
        await read_fifo(ready)
        yield driver, running
    finally:
        running.kill()
        with trio.CancelScope(shield=True), trio.move_on_after(PATIENCE_S):
            await running.wait()


def first_inside(running: Running) -> int | None:
    """The host's number of the first process in an agent's container."""
    if isinstance(running, RunningUnit):
        return running.first_inside()
    return running.ways.first_inside() if isinstance(running, RunningProcess) else first_in_namespace(running.pid)


def beside(kind: str) -> int:
    """How many processes a container has besides the harness and what that starts."""
    return 2 if kind in UNITS else 0


def mates(running: Running) -> list[int]:
    """The host's numbers of all processes of the agent's: below its first one, that too."""
    first = first_inside(running)
    found = [] if first is None else [first]
    for pid in found:
        found += [child for task in _tasks(pid) for child in _children(pid, task)]
    return found


def _tasks(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(f"/proc/{pid}/task")
    return []


def _children(pid: int, task: str) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
    return []


def let_all_enter(folder: Path) -> None:
    """Open the way to a test's own directory to other users: pytest makes it for its user alone."""
    for path in (folder, *folder.parents):
        if path == Path(tempfile.gettempdir()):
            break
        path.chmod(0o755)


async def wait_gone(pids: list[int]) -> None:
    await trio.to_thread.run_sync(partial(processes.wait_gone, *pids))


async def read_fifo(path: Path) -> str:
    """Wait for what an agent writes into a pipe with a name."""
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(path.read_text, abandon_on_cancel=True)


async def say_go(path: Path) -> None:
    """Write into a pipe with a name that an agent reads."""
    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(path.write_text, "go\n", abandon_on_cancel=True)


def make_fifo(folder: Path, name: str) -> Path:
    path = dirs_in(folder).state / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    return path


_STARTER = """
import os, signal, socket, sys, trio
from pathlib import Path
from tests.containers.drivers import IRIS, dirs_in, driver_in

async def main(folder, kind, script, with_life_pipe):
    theirs, ours = socket.socketpair()
    driver = driver_in(folder, kind, script, life_fd=theirs.fileno() if with_life_pipe else None)
    driver.script = script.replace("LIFE", str(driver.life_fd_inside))
    running = await driver.start(IRIS, dirs_in(folder))
    print(running.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

trio.run(main, Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4] == "life")
"""


def start_and_die(folder: Path, kind: str, script: str, life: str = "") -> int:
    """Another process starts the agent and is killed by SIGKILL. Returns the pid of the agent's wrapper."""
    driver_in(folder, kind, "")
    code, printed = run_forked(_STARTER, str(folder), kind, script, life)
    assert code == -signal.SIGKILL
    return int(printed)


def end_all(folder: Path) -> None:
    """Many agents here outlive who started them; those of a test that failed are ended by pid."""
    end_helper(folder)
    unmount_all(folder)
    end_processes(folder)
    remove_groups(folder, folder / "host", folder / "hive")


def end_processes(folder: Path) -> None:
    """Kill what names a directory, and its children, until nothing does: a unit may be starting its container."""
    while found := pids_naming(str(folder)):
        left = [each for pid in found for each in (*children_of(pid), pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        processes.wait_gone(*left)
