"""The meta flake, which builds every agent: locked in two phases, and evaluated as what it takes in, hostile input.

Each agent's repository holds agent.nix, a module of NixOS. The meta flake has one input and one nixosConfiguration an
agent; it takes the repositories as plain trees (flake = false), so an agent's flake.nix is never read here and can
bring in nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio
from pydantic import ValidationError

from hive_core.flakes.effects_of_systems import NO_CLOSURE, Closure, Facts, parse_closure, parse_facts
from hive_core.flakes.flake_files import agent_files, git_url, meta_flake, nix_string, other_packages_flake
from hive_core.flakes.nix import Nix, NixFailed, explained
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted
from hive_core.protocol.words import (
    MANAGER,
    PERSONA_LIMIT_BYTES,
    AgentName,
    CommitSha,
    StorePath,
    parse_store_path,
    parse_text,
)
from hive_core.settings import AgentSettings, describe

log = logging.getLogger(__name__)
GIT_WITHIN_S = 30
_WANTED = resources.files("hive_core").joinpath("templates/nix/wanted.nix").read_text("utf-8")
_FACTS_BEGIN = "trace: hyperhive: facts"  # nix tells so on the side
_WITHOUT_FACTS = f'config: removeAttrs (({_WANTED}) config) [ "facts" ]'

_UPDATED = "inputs.json"  # in the repository: the revisions that were locked anew last


class _Looked(Exception):
    """What was to be seen was seen: put it back."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Where agents' modules and packages come from, as folders or store paths, and what they are built for."""

    hyperhive: Path
    nixpkgs: Path
    system: str = f"{platform.machine()}-linux"

    @property
    def urls(self) -> dict[str, str]:
        """The same as inputs of a flake."""
        return {"hyperhive": _path_url(self.hyperhive), "nixpkgs": _path_url(self.nixpkgs)}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an agent's module says, checked as agent.toml is."""

    settings: AgentSettings
    persona: str
    system: StorePath  # where it says that what is built of it is
    derivation: StorePath  # what nix builds that from; it is in the store until that is cleaned up
    facts: Facts  # what that holds


class MetaFlake:
    """The repository of the meta flake. One at a time may stage; the daemon is the only one that writes it."""

    def __init__(self, folder: Path, applied: Path, nix: Nix, sources: Sources) -> None:
        """
        folder   its work tree
        applied  where the agents' repositories are
        """
        self._folder = folder
        self._applied = applied
        self._nix = nix
        self._sources = sources
        self._staging = trio.Lock()
        self._updated: dict[str, str] = {}  # the revisions of the inputs that were locked anew last

    async def open(self) -> None:
        """Make the repository if it is missing, and put back what a daemon that died had staged."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._git("init", "--quiet", "--template=", "--initial-branch=main")
        await self._put_back()
        try:
            await self._git("rev-parse", "--quiet", "--verify", "HEAD")
        except Refusal:
            await self._git("commit", "--quiet", "--allow-empty", "--message", "An empty hive")
        with contextlib.suppress(FileNotFoundError):
            self._updated = json.loads((self._folder / _UPDATED).read_text("utf-8"))

    @property
    def inputs(self) -> str:
        """What decides, besides its repository, what an agent is built from."""
        updated = {"updated": self._updated} if self._updated else {}
        return json.dumps(self._sources.urls | {"system": self._sources.system} | updated, sort_keys=True)

    async def look_at_inputs(self) -> tuple[dict[str, str], dict[str, str]]:
        """The revision of each input as it is locked, and as it would be if it was locked now; nothing is changed.

        Raises Refusal when nothing was locked yet, or it cannot be locked now.
        """
        before, after = await self._locked(), {}
        with contextlib.suppress(_Looked):
            async with self.staged(await self._git("show", "HEAD:flake.nix"), "", tuple(before)):
                after = self._revisions((self._folder / "flake.lock").read_text("utf-8"))
                raise _Looked
        return before, after

    async def lock_inputs(self, wanted: Mapping[str, str]) -> None:
        """Lock the inputs anew, which have these revisions then; done already is fine. Raises Refusal else."""
        if await self._locked() == wanted == self._updated:
            return
        async with self.staged(await self._git("show", "HEAD:flake.nix"), "inputs: locked anew", tuple(wanted)):
            after = self._revisions((self._folder / "flake.lock").read_text("utf-8"))
            if after != wanted:
                raise Refusal("conflict", "cannot update the inputs: they are others by now; ask for them again")
            (self._folder / _UPDATED).write_text(json.dumps(after), "utf-8")
            await self._git("add", _UPDATED)
        self._updated = after

    async def _locked(self) -> dict[str, str]:
        try:
            return self._revisions(await self._git("show", "HEAD:flake.lock"))
        except Refusal:
            why = "no agent was built yet, so none is locked"
            raise Refusal("conflict", f"cannot look at the inputs: {why}") from None

    def _revisions(self, lock: str) -> dict[str, str]:
        """Of a flake.lock: what each of our inputs is locked to, by its commit, or the hash of its files."""
        nodes = json.loads(lock)["nodes"]
        locked = {name: nodes[nodes["root"]["inputs"][name]]["locked"] for name in self._sources.urls}
        return {name: str(one.get("rev") or one["narHash"]) for name, one in locked.items()}

    def agent_files(self, name: AgentName, title: str, packages: Sequence[str] = ()) -> dict[str, str]:
        """flake.nix and agent.nix of an agent's first commit, with these packages of nixpkgs."""
        hyperhive, system = self._sources.urls["hyperhive"], self._sources.system
        return agent_files(name, title, hyperhive=hyperhive, system=system, packages=packages)

    def render(self, commits: Mapping[AgentName, CommitSha]) -> str:
        """flake.nix with these agents, each at a commit that is pinned in its applied repository."""
        return self._render({name: git_url(self._repository(name), commit) for name, commit in commits.items()})

    def _render(self, agents: Mapping[AgentName, str]) -> str:
        return meta_flake(agents, **self._sources.urls, system=self._sources.system)

    @asynccontextmanager
    async def staged(
        self, flake: str, message: str, update: Sequence[str] = (), *, if_other: bool = False
    ) -> AsyncIterator[str]:
        """Stage a flake.nix with its lock. Left well, it is committed with `message`; left by an exception or a
        cancellation, everything is as before.

        update    inputs to lock anew; those that are new, or are at another URL, are locked anyway
        if_other  commit nothing where flake and lock are what they were
        yields    the staged flake, as a URL

        Raises Refusal("failed") when it cannot be locked, or committed.
        """
        async with self._staging:
            try:
                await self._put_back()
                (self._folder / "flake.nix").write_text(flake, "utf-8")
                await self._git("add", "flake.nix")
                await self._lock(update)
                await self._git("add", "flake.nix", "flake.lock")
                yield self.url
                with trio.CancelScope(shield=True):
                    if not if_other or await self._git("diff", "--cached", "--name-only"):
                        await self._git("commit", "--quiet", "--allow-empty", "--message", message)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._try_to_put_back()
                raise

    @property
    def url(self) -> str:
        return f"git+file://{quote(str(self._folder))}"

    async def log(self) -> list[str]:
        """The first lines of its commits, newest first: what was deployed."""
        return (await self._git("log", "--format=%s")).splitlines()

    async def tells(self, line: str) -> bool:
        """Whether the message of a commit has this line. Raises Refusal where its repository cannot be read."""
        found = await self._git("log", "--max-count=20", "--format=%B", "--fixed-strings", f"--grep={line}")
        return line in found.splitlines()

    async def evaluate(self, name: AgentName, commit: CommitSha) -> Evaluated:
        """What an agent's module says at a commit that is pinned in its applied repository; nothing is changed.

        It is code that an agent wrote: it runs in a sandbox, for so long and in so much memory as nix.limits has it,
        and sees the repository of this agent alone. Raises Refusal("refused") with one sentence that names what is
        wrong.
        """
        repository = self._repository(name)
        return await self._evaluate(name, git_url(repository, commit), repository)

    async def evaluate_files(self, name: AgentName, files: Mapping[str, str]) -> Evaluated:
        """The same of a commit with these files, which is still to be made: name → text."""
        with tempfile.TemporaryDirectory(prefix="hive-files-") as folder:
            for file, text in files.items():
                (Path(folder) / file).write_text(text, "utf-8", newline="")
            return await self._evaluate(name, _path_url(Path(folder)), Path(folder))

    async def _evaluate(self, name: AgentName, url: str, source: Path) -> Evaluated:
        """What the module says that is at a URL, in a folder."""
        try:
            async with self._locked_flake(self._render({name: url})) as flake:
                wanted = f"{_path_url(flake)}#nixosConfigurations.{nix_string(name)}.config"
                words = ["eval", "--json", "--no-write-lock-file", wanted, "--apply"]
                readable = [flake, source, *self._readable()]
                try:
                    said = await self._nix.run([*words, _WANTED], readable=readable)
                except NixFailed as failed:
                    if failed.over in ("time", "memory") or _FACTS_BEGIN not in failed.said:
                        raise
                    # All that it is run by is well, and what a card tells besides cannot be told.
                    said = await self._nix.run([*words, _WITHOUT_FACTS], readable=readable)
        except NixFailed as failed:
            raise Refusal("refused", f"cannot use agent.nix of {name}: {explained(failed)}") from None
        except OSError as exc:
            raise Refusal("unavailable", f"cannot evaluate agent.nix of {name}: {exc}") from None
        return _checked(name, said)

    async def differs_by_packages(
        self, name: AgentName, before: CommitSha, after: CommitSha, derivation: StorePath
    ) -> bool:
        """Whether what `after` makes, a derivation, is what `before` makes with its packages; both are pinned. False
        where that cannot be told."""
        repository = self._repository(name)
        urls = [git_url(repository, commit) for commit in (before, after)]
        flake = other_packages_flake(name, *urls, **self._sources.urls, system=self._sources.system)
        try:
            async with self._locked_flake(flake) as folder:
                words = ["eval", "--raw", "--no-write-lock-file", f"{_path_url(folder)}#derivation"]
                said = await self._nix.run(words, readable=[folder, repository, *self._readable()])
        except (NixFailed, OSError):
            return False
        return said.decode("utf-8", "replace") == derivation

    async def closure(self, *paths: str) -> Closure | None:
        """What systems, or packages, need in all; None where one is not in the store, so was never built here."""
        if not paths:
            return NO_CLOSURE
        try:
            words = [parse_store_path(path) for path in paths]
            return parse_closure(await self._nix.run(["path-info", "--recursive", "--size", *words]))
        except (Refusal, NixFailed, OSError):
            return None

    @asynccontextmanager
    async def _locked_flake(self, text: str) -> AsyncIterator[Path]:
        """A folder with this flake.nix, and with all inputs that are locked as they are in the last meta flake that was
        committed: what is built of it is what the staged one gives, and nobody waits."""
        with tempfile.TemporaryDirectory(prefix="hive-evaluation-") as folder:
            (Path(folder) / "flake.nix").write_text(text, "utf-8")
            with contextlib.suppress(Refusal):  # nothing was committed yet; what is staged may be half written
                (Path(folder) / "flake.lock").write_text(await self._git("show", "HEAD:flake.lock"), "utf-8")
            yield Path(folder)

    def _repository(self, name: AgentName) -> Path:
        return self._applied / f"{name}.git"

    def _readable(self) -> list[Path]:
        return [self._sources.hyperhive, self._sources.nixpkgs]

    async def _lock(self, update: Sequence[str]) -> None:
        words = ["flake", "lock", self.url, *(word for name in update for word in ("--update-input", name))]
        try:
            await self._nix.run(words, readable=[self._applied, *self._readable()], writable=[self._folder])
        except NixFailed as failed:
            raise Refusal("failed", f"cannot lock the meta flake: {explained(failed)}") from None

    async def _try_to_put_back(self) -> None:
        try:
            await self._put_back()
        except (Refusal, OSError) as exc:  # the next one who stages puts it back, as does the next daemon
            log.error("the meta flake stays as it was staged: %s", exc)

    async def _put_back(self) -> None:
        for held in ("index", "HEAD", "refs/heads/main"):  # by a git that was killed: nobody else works here
            (self._folder / ".git" / f"{held}.lock").unlink(missing_ok=True)
        await self._git("reset", "--quiet", "--hard")
        await self._git("clean", "--quiet", "--force", "-d", "-x")

    async def _git(self, *arguments: str) -> str:
        command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false", "-c", "user.name=hyperhive"]
        command += ["-c", "user.email=hive@localhost", *arguments]
        environment = self._nix.environment()
        with trio.fail_after(GIT_WITHIN_S):
            done = await trio.run_process(
                command, cwd=self._folder, env=environment, capture_stdout=True, capture_stderr=True, check=False
            )
        if done.returncode:
            said = quoted(done.stderr.decode("utf-8", "replace").strip())[:300]
            raise Refusal("failed", f"cannot use the meta flake's repository in {self._folder}: {said}")
        return done.stdout.decode("utf-8", "replace")


def _path_url(folder: Path) -> str:
    return f"path:{quote(str(folder))}"


def _checked(name: AgentName, said: bytes) -> Evaluated:
    try:
        found: dict[str, Any] = json.loads(said)
    except (ValueError, RecursionError):
        raise Refusal("refused", f"cannot use agent.nix of {name}: what it gives is nested too deep") from None
    if found["mounts"]:
        where = quoted(", ".join(map(str, found["mounts"])))[:200]
        raise Refusal(
            "refused",
            f"cannot use agent.nix of {name}: it mounts {where}, and what a container sees of the host is not its "
            "own to say; take fileSystems out",
        )
    if found["role"] != ("manager" if name == MANAGER else "agent"):
        raise Refusal("refused", f"cannot use agent.nix of {name}: hyperhive.role is the hive's to say; take it out")
    given = {key: value for key, value in found["settings"].items() if value is not None}
    try:
        settings = AgentSettings.model_validate(given)
    except ValidationError as exc:
        raise Refusal("refused", f"cannot use agent.nix of {name}: hyperhive.settings: {describe(exc)}") from None
    persona = parse_text(found["persona"], "hyperhive.persona", PERSONA_LIMIT_BYTES)
    try:
        system, derivation = parse_store_path(found["system"]), parse_store_path(found["derivation"])
    except Refusal as refusal:
        why = f"system.build.toplevel is no system ({refusal.message})"
        raise Refusal("refused", f"cannot use agent.nix of {name}: {why}; leave it to NixOS") from None
    return Evaluated(settings, persona, system, derivation, parse_facts(found.get("facts")))
