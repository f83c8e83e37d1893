"""Group `containers`: how soon an agent is in its container, and what its reconciler takes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from hive_core.containers.bounds import Bounds
from hive_core.containers.groups import choose_groups
from hive_core.containers.host_process import Launch
from hive_core.containers.mounts import AgentDirs, agent_dirs
from hive_core.containers.nspawn import NspawnDriver, nspawn_command
from hive_core.containers.ranges import pick_range
from hive_core.protocol.words import AgentName
from tests.bench import swarm_containers
from tests.bench.figures import figure, say
from tests.needs import missing

ROUNDS = 40
IRIS = AgentName("iris")


def measure() -> Iterator[dict[str, Any]]:
    yield from swarm_containers.measure()
    if trouble := missing("nspawn"):
        say(f"left out: {trouble}")
        return
    yield nspawn_start()


class _Began(NspawnDriver):
    """In the place of the harness's interpreter, what tells that it has begun."""

    def _launch(self, name: AgentName, dirs: AgentDirs, status_fd: int, opened: ExitStack) -> Launch:
        launch = super()._launch(name, dirs, status_fd, opened)
        interpreter = launch.command.index("--") + 1
        assert launch.command[interpreter] == sys.executable
        return replace(launch, command=[*launch.command[:interpreter], "/bin/sh", "-c", "echo > /state/began"])


async def _first_uid(name: AgentName) -> int:
    return pick_range(name, ())


def nspawn_start() -> dict[str, Any]:
    say("nspawn_start: asked to the harness's exec, against the bare `systemd-nspawn … true` with the same flags")
    ours, bare = [], []
    with tempfile.TemporaryDirectory(prefix="hive-b-") as folder:
        dirs = agent_dirs(Path(folder), Path(folder) / "run", AgentName("bench"))
        dirs.make()
        os.mkfifo(dirs.state / "began")
        groups = choose_groups(Path(folder), Bounds(4 * 2**30, 200, 2048))
        driver = _Began(
            Path(folder),
            base_of=_first_uid,
            claude=None,
            orphan_grace_s=600.0,
            cgroups=None if groups.trouble else groups,
        )
        plain = nspawn_command("hive-bench", dirs, None, pick_range(IRIS, ()), Path("/"))
        for _ in range(ROUNDS):
            bare.append(_seconds([*plain, "/usr/bin/true"]))
            ours.append(trio.run(_until_began, driver, dirs))
        trio.run(driver.destroy, IRIS)
    peer = "systemd-nspawn … true"
    return figure("nspawn_start", statistics.median(ours) * 1e3, "ms", peer, statistics.median(bare) * 1e3, digits=1)


def _seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


async def _until_began(driver: NspawnDriver, dirs: AgentDirs) -> float:
    begin = time.perf_counter()
    running = await driver.start(IRIS, dirs)
    await trio.to_thread.run_sync((dirs.state / "began").read_text)
    seconds = time.perf_counter() - begin
    await running.wait()
    await driver.forget(IRIS)
    return seconds
