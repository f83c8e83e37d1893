"""A meta flake of a test, with agents' repositories as the gate leaves them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hive_core.flakes.flake_files import agent_files, git_url, input_of, meta_flake
from hive_core.flakes.flakes import Evaluated, MetaFlake, Sources
from hive_core.flakes.nix import Nix, NixLimits
from hive_core.protocol.words import AgentName, CommitSha
from tests.nixes import ROOT

SYSTEM = "x86_64-linux"
IRIS = AgentName("iris")
AGENT = agent_files(IRIS, "", hyperhive="x", system=SYSTEM)["agent.nix"]


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit_files(bare: Path, files: Mapping[str, str]) -> CommitSha:
    """A commit on main of an applied repository, made if it is missing."""
    work = bare.parent / f"{bare.name}.work"
    if not bare.exists():
        subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(bare)], check=True)
        subprocess.run(["git", "clone", "--quiet", str(bare), str(work)], check=True, capture_output=True)
        git(work, "checkout", "--quiet", "-B", "main")
    for name, text in files.items():
        (work / name).write_text(text)
    git(work, "add", "--all")
    git(work, "commit", "--quiet", "--message", "a change")
    sha = git(work, "rev-parse", "HEAD")
    git(work, "push", "--quiet", "origin", "HEAD:main", f"HEAD:refs/proposed/{sha}")
    return CommitSha(sha)


class Desk:
    """A meta flake with the repositories of some agents."""

    def __init__(self, folder: Path, hyperhive: Path, store: Path, limits: NixLimits | None = None) -> None:
        self.folder = folder
        self.applied = folder / "applied"
        self.applied.mkdir()
        self.sources = Sources(hyperhive, ROOT / "tests/nix/standin", SYSTEM)
        self.nix = Nix(folder / "home", limits, store)
        self.meta = MetaFlake(folder / "meta", self.applied, self.nix, self.sources)

    def commit(self, name: AgentName = IRIS, **files: str) -> CommitSha:
        """A commit of an agent's repository. agent_nix="…" is its agent.nix, and so on."""
        bare = self.applied / f"{name}.git"
        first = (
            {} if bare.exists() else {"agent.nix": AGENT, "agent.toml": 'model = "haiku"\n', "CLAUDE.md": "You read.\n"}
        )
        given = {key.replace("_", "."): text for key, text in files.items()}
        return commit_files(bare, given if bare.exists() else first | given)

    def flake(self, *names: AgentName) -> str:
        agents = {name: git_url(self.applied / f"{name}.git") for name in names}
        return meta_flake(agents, **self.sources.urls, system=SYSTEM)

    async def deploy(self, *names: AgentName, message: str = "deploy") -> None:
        async with self.meta.staged(self.flake(*names), message, [input_of(name) for name in names]):
            pass

    async def evaluate(self) -> Evaluated:
        """What iris is as deployed."""
        lock = json.loads(self.contents()["flake.lock"])
        return await self.meta.evaluate(IRIS, CommitSha(lock["nodes"]["agent-iris"]["locked"]["rev"]))

    def contents(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in (self.folder / "meta").iterdir() if path.is_file()}
