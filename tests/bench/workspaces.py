"""`workspace_ready`: from an agent that lists a project to its clone of it, as its harness makes it before a turn.

The hive's side is what the daemon runs (mirrors, git.sock), the agent's what its harness runs, without a container
around it. Nine agents have their clones already; the tenth is measured. The repository's bytes are random, so nothing
of it can be compressed away: in one the head is small and the history large, as of most that are large. In the other,
all of it is in the head, and a clone has to write each byte; there one other agent has to do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import trio
import trio_asyncio

from hive_agent.projects import Projects
from hive_agent.runner import Seat
from hive_core.protocol.words import AgentName, parse_project_name
from hive_core.services.agents import set_deployed
from hive_core.sockets.git import GitDesk
from hive_core.sockets.unix import listen_unix, serve_unix
from tests.bench.figures import figure, say
from tests.hives import SETTINGS
from tests.project_hives import ENVIRONMENT, ProjectHive, open_project_hive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Settings

REPOSITORY_BYTES = int(os.environ.get("HIVE_BENCH_REPOSITORY_BYTES", str(1024**3)))
FILE_BYTES = 512 * 1024
ROUNDS = 3
LISTED = [{"name": "site", "force": False, "tags": False}]


def measure() -> Iterator[dict[str, Any]]:
    for name, agents, in_head in (("workspace_ready", 10, False), ("workspace_ready_all_in_head", 2, True)):
        where = "the head" if in_head else "the history"
        say(f"{name}: a clone for the last of {agents} agents, of {REPOSITORY_BYTES:,} bytes in {where}")
        with tempfile.TemporaryDirectory(prefix="hive-b-") as folder:
            source = make_repository(Path(folder) / "source.git", in_head=in_head)
            ready, cloned, linked = trio_asyncio.run(_times, Path(folder), source, agents)
        yield figure(name, min(ready), "s", "git clone of the mirror, by a transport", min(cloned))
        yield figure(f"{name}_linked", min(ready), "s", "git clone of the mirror, by hard links", min(linked))


def make_repository(path: Path, *, in_head: bool) -> Path:
    """A bare repository of random files, which are all in its last commit, or each in a commit of its own."""
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", path], env=ENVIRONMENT, check=True)
    settings = ("-c", "core.compression=0", "-c", "pack.compression=0", "-c", "fastimport.unpackLimit=0")
    command = ["git", f"--git-dir={path}", *settings, "fast-import", "--quiet"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=ENVIRONMENT) as importing:
        assert importing.stdin is not None
        for number in range(REPOSITORY_BYTES // FILE_BYTES):
            lines = f"commit refs/heads/main\ncommitter a <a@b> {number + 1} +0000\ndata 1\nx\n"
            lines += f"D f{number - 1}\n" if number and not in_head else ""
            lines += f"M 100644 inline f{number}\ndata {FILE_BYTES}\n"
            importing.stdin.write(lines.encode() + os.urandom(FILE_BYTES) + b"\n")
    assert importing.returncode == 0
    return path


async def _times(folder: Path, source: Path, agents: int) -> tuple[list[float], list[float], list[float]]:
    """Of the last agent's clone, and of a plain `git clone`, with and without a transport; in turns."""
    ready: list[float] = []
    cloned: list[float] = []
    linked: list[float] = []
    # A mirror of this size is fetched and checked once, and that may take its time.
    async with open_project_hive(folder, project_fetch_s=3600) as hive, trio.open_nursery() as nursery:
        await hive.mirrors.add(parse_project_name("site"), str(source), {}, "operator")
        seats = [await _seat(hive, number, nursery) for number in range(agents)]
        for seat in seats[:-1]:
            await _prepare(hive, seat)
        mirror, target = hive.mirrors.path(parse_project_name("site")), folder / "clone"
        for _ in range(ROUNDS):
            ready.append(await _prepare(hive, seats[-1]))
            for times, where in ((cloned, mirror.as_uri()), (linked, str(mirror))):
                begin = time.perf_counter()
                await trio.run_process(["git", "clone", "-q", where, str(target)], env=ENVIRONMENT, stdout=sys.stderr)
                times.append(time.perf_counter() - begin)
                await trio.to_thread.run_sync(shutil.rmtree, target)
        nursery.cancel_scope.cancel()
    return ready, cloned, linked


async def _seat(hive: ProjectHive, number: int, nursery: trio.Nursery) -> Seat:
    """An agent with its git.sock, and without a clone."""
    name = AgentName(f"agent{number}")
    own, run = hive.services.state_dir / "agents" / name, hive.folder / name
    for place in (own / "projects", run):
        place.mkdir(parents=True)
    await hive.services.add_agents(name)
    nursery.start_soon(serve_unix, listen_unix(run / "git.sock"), GitDesk(name, hive.git_services).serve)
    where, path = str(run), ENVIRONMENT["PATH"]
    seat = Seat(name, where, where, where, where, path, None, True, 1)
    return replace(seat, projects_dir=str(own / "projects"), mirrors_dir=str(own / "mirrors"))


async def _prepare(hive: ProjectHive, seat: Seat) -> float:
    """Seconds from the deployment of settings that list the project to the clone."""
    agent, settings = AgentName(seat.agent), cast("Settings", {"projects": LISTED})
    place = Path(seat.projects_dir) / "site"
    await trio.to_thread.run_sync(lambda: shutil.rmtree(place, ignore_errors=True))
    await hive.list_projects(agent=agent)  # none, so that nothing is lent to it any more
    assert not hive.lent(agent=agent).exists()

    async def ask(_: object) -> dict[str, Any]:
        return {"projects": await hive.mirrors.of(agent)}

    begin = time.perf_counter()
    deployed = {**SETTINGS, "projects": LISTED, "policy": {"projects": LISTED}}
    await hive.services.store.write(lambda tx: set_deployed(tx, agent, "0" * 40, deployed))
    await hive.mirrors.lend()
    notes = await Projects(seat, ask).prepare(settings)
    seconds = time.perf_counter() - begin
    assert notes == [f"site: it was cloned to {place} just now"], notes
    return seconds
