"""A hive whose containers are NixOS systems, as far as its gate: real git, real nix, real store.

The driver's systems are scripted: what is built is what nix makes of the flake, and where a container would be switched
there is a file that says so. `python -m tests.nix.house FOLDER HYPERHIVE STORE NIXPKGS STEP` carries out what is
approved and is killed right after a step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from hive_core.flakes.flakes import MetaFlake, Sources
from hive_core.flakes.nix import Nix, NixLimits
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.repos import Repos
from hive_core.procedures.flake_deployments import FlakeDeployments
from hive_core.protocol.words import AgentName, StorePath, parse_store_path
from hive_core.store.door import Store
from tests.hives import PATIENCE_S, Services, open_services
from tests.needs import ROOT

SYSTEM = "x86_64-linux"
STANDIN = ROOT / "tests/nix/standin"


def nothing(step: str) -> None:
    pass


class ScriptedSystems:
    """The systems of a driver, kept in a file as profiles are, so that they outlive whoever switched to them.

    at   called with each step that was just begun ("build", "switch"), or done ("built", "switched"); what it raises is
         what went wrong
    """

    def __init__(self, file: Path, nix: Nix, at: Callable[[str], None] = nothing) -> None:
        self.file = file
        self.at = at
        self.done: list[tuple[str, str]] = []  # ("switch", NAME), …
        self._nix = nix

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        self._step("build", name)
        said = json.loads(await self._nix.run(["show-derivation", derivation]))
        self.at("built")
        return parse_store_path(said[derivation]["outputs"]["out"]["path"])

    async def switch(self, name: AgentName, system: StorePath) -> None:
        self._step("switch", name)
        self._write(name, [system, *self._read().get(name, [])])
        self.at("switched")

    async def roll_back(self, name: AgentName) -> StorePath:
        _, *earlier = self._read()[name]
        self._write(name, earlier)
        return StorePath(earlier[0])

    async def current(self, name: AgentName) -> StorePath | None:
        systems = self._read().get(name)
        return StorePath(systems[0]) if systems else None

    def _step(self, step: str, name: AgentName) -> None:
        self.done.append((step, name))
        self.at(step)

    def _read(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        return found

    def _write(self, name: AgentName, systems: list[str]) -> None:
        self.file.write_text(json.dumps(self._read() | {name: systems}))


class House:
    """What is on the disk of a hive, for one daemon after another."""

    def __init__(
        self, folder: Path, hyperhive: Path, store: Path, limits: NixLimits | None = None, nixpkgs: Path = STANDIN
    ) -> None:
        self.folder = folder
        self.store = store
        self.sources = Sources(hyperhive, nixpkgs, SYSTEM)
        self.nix = Nix(folder / "nix", limits, store)
        self.systems: Any = ScriptedSystems(folder / "profiles.json", self.nix)

    @property
    def meta(self) -> MetaFlake:
        return MetaFlake(self.folder / "meta", self.folder / "applied", self.nix, self.sources)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Services]:
        """The services of one daemon, with hm1nd's repositories; the gate is not served."""
        meta = self.meta
        await meta.open()

        def deployments(store: Store, repos: Repos, locks: AgentLocks) -> FlakeDeployments:
            return FlakeDeployments(store, repos, locks, meta, self.systems)

        async with open_services(self.folder, deployments=deployments) as services:
            await services.gate.ensure_manager("You manage.")
            yield services

    async def carry_out_and_die(self, step: str) -> None:
        """What is approved is carried out by a daemon that is killed right after a step."""
        told = [self.folder, self.sources.hyperhive, self.store, self.sources.nixpkgs, step]
        command = [sys.executable, "-m", "tests.nix.house", *map(str, told)]
        with trio.fail_after(PATIENCE_S):
            died = await trio.run_process(command, cwd=ROOT, capture_stderr=True, check=False)
        assert died.returncode == -9, died.stderr.decode()

    def git(self, *words: str) -> str:
        """What git says of the meta flake."""
        command = ["git", "-C", str(self.folder / "meta"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def log(self) -> list[str]:
        """What was deployed, newest first."""
        return self.git("log", "--format=%s").splitlines()

    def tree(self) -> dict[str, bytes]:
        """All that a change may have touched of what is deployed, by its path."""
        watched = [self.folder / "meta" / name for name in ("flake.nix", "flake.lock")]
        watched += [self.folder / "profiles.json", *sorted((self.folder / "applied").glob("*/refs/heads/main"))]
        return {str(path): path.read_bytes() for path in watched if path.exists()}


def with_nixpkgs(house: House, folder: Path, version: str) -> House:
    """The same hive, the next daemon of which is given another nixpkgs."""
    other = House(house.folder, house.sources.hyperhive, Path(str(house.nix._store)))
    shutil.copytree(house.sources.nixpkgs, folder)
    text = (folder / "pkgs.nix").read_text()
    (folder / "pkgs.nix").write_text(text.replace("${pname}-0", f"${{pname}}{version}"))
    other.sources = replace(house.sources, nixpkgs=folder)
    return other


@asynccontextmanager
async def serving(services: Services, patience_s: float = 2 * PATIENCE_S) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(services.gate.serve)
        with trio.fail_after(patience_s):
            yield
        nursery.cancel_scope.cancel()


async def mended(services: Services, *names: str) -> None:
    """Until these agents may be started."""
    with services.store.bus.listen("wanted") as listener:
        while any(services.gate.hindrance(AgentName(name)) for name in names):
            await listener.wait()


async def carry_out_and_die(house: House, step: str) -> None:
    def reached(now: str) -> None:
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)

    def then(call: Callable[..., Awaitable[Any]], now: str) -> Callable[..., Awaitable[Any]]:
        async def run(*arguments: Any) -> Any:
            done = await call(*arguments)
            reached(now)
            return done

        return run

    house.systems.at = reached
    async with house.open() as services:
        services.repos.deploy = then(services.repos.deploy, "moved")  # type: ignore[method-assign]
        deployments = services.gate._deployments
        deployments.mend = then(deployments.mend, "mended")  # type: ignore[method-assign]
        deployments.settle = then(deployments.settle, "committed")  # type: ignore[method-assign]
        deployments._meta._lock = then(deployments._meta._lock, "staged")  # type: ignore[attr-defined]
        deployments.lock_inputs = then(deployments.lock_inputs, "locked")  # type: ignore[method-assign]
        await services.gate.serve()


if __name__ == "__main__":
    state, ours, nix_store, packages = map(Path, sys.argv[1:5])
    trio.run(carry_out_and_die, House(state, ours, nix_store, nixpkgs=packages), sys.argv[5])
