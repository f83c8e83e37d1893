"""A hive's projects for a test: sources, mirrors, and an agent's git.sock, with the program that a container has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hive_core.credentials import Credentials
from hive_core.limits import Limits
from hive_core.procedures.projects import ProjectMirrors
from hive_core.procedures.pushes import GitServices
from hive_core.protocol.words import AgentName, parse_project_name
from hive_core.services.agents import set_deployed
from hive_core.services.projects import Projects
from hive_core.sockets.git import GitDesk
from hive_core.sockets.unix import listen_unix, serve_unix
from tests.hives import SETTINGS, Services, open_services
from tests.needs import ROOT

SITE, IRIS, ARGUS = parse_project_name("site"), AgentName("iris"), AgentName("argus")
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    **dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "ada"),
    **dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "ada@localhost"),
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
}


def try_git(folder: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        env={**ENVIRONMENT, **(env or {})},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # as names of branches may need it
    )


def git(folder: Path, *words: str, env: dict[str, str] | None = None) -> str:
    done = try_git(folder, *words, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(folder: Path, file: str = "README", text: str = "hello\n", branch: str | None = None) -> str:
    """A commit in a repository with a work tree; its id."""
    if branch is not None:
        git(folder, "checkout", "--quiet", "-B", branch)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(text)
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", f"Change {file}")
    return git(folder, "rev-parse", "HEAD")


def make_source(folder: Path, branch: str = "main") -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", f"--initial-branch={branch}")
    commit(folder)
    return folder


async def register(services: Services, name: str = SITE) -> None:
    """A project of which there is a row, and no mirror."""
    await Projects(services.store).add(parse_project_name(name), f"/srv/{name}.git", "none", "main", 0, "operator")


@dataclass
class ProjectHive:
    """folder: for whatever the test makes. The agents iris and argus have a git.sock each."""

    folder: Path
    services: Services
    mirrors: ProjectMirrors
    git_services: GitServices
    sockets: dict[AgentName, Path] = field(default_factory=dict)

    def lent(self, name: str = "site", agent: AgentName = IRIS) -> Path:
        return self.services.state_dir / "agents" / agent / "mirrors" / name

    async def events(self, kind: str) -> list[Any]:
        return await self.services.store.rows("SELECT * FROM events WHERE kind = ? ORDER BY seq", (kind,))

    async def list_projects(self, *projects: dict[str, Any], agent: AgentName = IRIS) -> None:
        """Deploy these as an agent's."""
        settings = {**SETTINGS, "projects": [*projects], "policy": {"projects": [*projects]}}
        await self.services.store.write(lambda tx: set_deployed(tx, agent, "0" * 40, settings))
        await self.mirrors.lend()

    def inside(self, agent: AgentName = IRIS) -> dict[str, str]:
        """The environment of git in the agent's container."""
        helpers = ROOT / "hive_agent" / "path"
        path = f"{os.environ['PATH']}{os.pathsep}{helpers}"
        return {"PATH": path, "HIVE_PYTHON": sys.executable, "HIVE_GIT_SOCKET": str(self.sockets[agent])}

    async def try_git(self, folder: Path, *words: str, agent: AgentName = IRIS) -> subprocess.CompletedProcess[str]:
        """git as in the agent's container, while the hive serves it."""
        return await trio.to_thread.run_sync(partial(try_git, folder, *words, env=self.inside(agent)))

    async def git(self, folder: Path, *words: str, agent: AgentName = IRIS) -> str:
        done = await self.try_git(folder, *words, agent=agent)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    async def clone(self, name: str = "site", agent: AgentName = IRIS) -> Path:
        """An agent's clone that borrows from the mirror, as the harness makes it."""
        target = self.folder / f"{agent}-{name}"
        borrowed = str(self.lent(name, agent))
        await self.git(
            self.folder, "clone", "--quiet", "--reference", borrowed, f"hive://{name}", str(target), agent=agent
        )
        return target


@asynccontextmanager
async def open_project_hive(folder: Path, **limits: Any) -> AsyncIterator[ProjectHive]:
    (folder / "hive").mkdir()
    async with open_services(folder / "hive") as services, trio.open_nursery() as nursery:
        of_hive = Limits(**limits)
        mirrors = ProjectMirrors(services.store, of_hive, services.state_dir)
        credentials = Credentials(services.state_dir, {})
        git_services = GitServices(
            services.store, mirrors, credentials, services.agents.access, of_hive, services.state_dir
        )
        hive = ProjectHive(folder, services, mirrors, git_services)
        await services.add_agents("hm1nd", IRIS, ARGUS)
        for agent in (IRIS, ARGUS):
            (services.state_dir / "agents" / agent).mkdir(parents=True)
            hive.sockets[agent] = folder / f"{agent}.sock"
            desk = GitDesk(agent, git_services)
            nursery.start_soon(serve_unix, listen_unix(hive.sockets[agent]), desk.serve)
        await nursery.start(mirrors.serve)
        yield hive
        nursery.cancel_scope.cancel()
