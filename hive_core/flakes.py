"""The flakes that build agents: rendered, locked in two phases, and evaluated as what they are, hostile input.

Each agent's repository holds agent.nix, a module of NixOS. The meta flake has one input and one nixosConfiguration an
agent; it takes the repositories as plain trees (flake = false), so an agent's flake.nix is never read here and can
bring in nothing.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import trio
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import ValidationError

from hive_core.nix import Nix, NixFailed, explained
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted
from hive_core.protocol.words import PERSONA_LIMIT_BYTES, AgentName, CommitSha, parse_text
from hive_core.settings import AgentSettings, describe

GIT_WITHIN_S = 30
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "$": "\\$"})
# What of an evaluated agent the host wants to know.
_WANTED = (
    "config: { inherit (config.hyperhive) settings persona;"
    ' mounts = builtins.filter (path: path != "/") (builtins.attrNames config.fileSystems); }'
)


def nix_string(text: object) -> str:
    """A text as a literal of Nix, which nothing in it can leave. Raises Refusal("usage") for what Nix cannot hold."""
    if not isinstance(text, str) or "\0" in text:
        raise Refusal("usage", "cannot write this into a flake: it must be text without NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal("usage", "cannot write this into a flake: it must be text in UTF-8") from None
    return f'"{text.translate(_ESCAPES)}"'


# Whatever a template shows becomes a literal: there is no expression that could forget it.
_TEMPLATES = Environment(
    loader=PackageLoader("hive_core", "templates/nix"),
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    autoescape=False,
    finalize=nix_string,
)


def agent_files(name: AgentName, title: str, *, hyperhive: str, system: str) -> dict[str, str]:
    """flake.nix and agent.nix of an agent's first commit; agent.toml and CLAUDE.md lie beside them.

    hyperhive  the flake that the modules come from, as a URL
    system     such as x86_64-linux
    """
    flake = _TEMPLATES.get_template("agent-flake.nix.j2")
    return {
        "flake.nix": flake.render(name=name, title=title or name, hyperhive=hyperhive, system=system),
        "agent.nix": _TEMPLATES.get_template("agent.nix.j2").render(),
    }


def meta_flake(agents: Mapping[AgentName, str], *, hyperhive: str, nixpkgs: str, system: str) -> str:
    """flake.nix of the meta flake: the same for the same agents, in whatever order they come. name → URL."""
    rows = [{"name": name, "input": input_of(name), "url": url} for name, url in sorted(agents.items())]
    template = _TEMPLATES.get_template("meta-flake.nix.j2")
    return template.render(agents=rows, hyperhive=hyperhive, nixpkgs=nixpkgs, system=system)


def input_of(name: AgentName) -> str:
    """The meta flake's input of an agent."""
    return f"agent-{name}"


def git_url(repository: Path, commit: CommitSha | None = None) -> str:
    """A repository of this host, at a commit or at its main, as a flake's URL."""
    at = f"&rev={commit}" if commit else ""
    return f"git+file://{quote(str(repository))}?ref=refs/heads/main{at}"


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an agent's module says, checked as agent.toml is."""

    settings: AgentSettings
    persona: str


class MetaFlake:
    """The repository of the meta flake. One at a time may stage; the daemon is the only one that writes it."""

    def __init__(self, folder: Path, applied: Path, nix: Nix, sources: Sequence[Path] = ()) -> None:
        """
        folder   its work tree
        applied  where the agents' repositories are
        sources  what else of the host its inputs are, outside the store
        """
        self._folder = folder
        self._applied = applied
        self._nix = nix
        self._readable = [applied, *sources]
        self._staging = trio.Lock()

    async def open(self) -> None:
        """Make the repository if it is missing, and put back what a daemon that died had staged."""
        if not (self._folder / ".git").is_dir():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._git("init", "--quiet", "--template=", "--initial-branch=main")
            await self._git("commit", "--quiet", "--allow-empty", "--message", "An empty hive")
        (self._folder / ".git" / "index.lock").unlink(missing_ok=True)
        await self._put_back()

    @asynccontextmanager
    async def staged(self, flake: str, message: str, update: Sequence[str] = ()) -> AsyncIterator[str]:
        """Stage a flake.nix with its lock; what is built within builds that. Left well, it is committed with
        `message`; left by an exception or a cancellation, everything is as before.

        update   inputs to lock anew; those that are new are locked anyway
        yields   the staged flake, as a URL

        Raises Refusal("failed") when it cannot be locked.
        """
        async with self._staging:
            try:
                (self._folder / "flake.nix").write_text(flake, "utf-8")
                await self._git("add", "flake.nix")
                await self._lock(update)
                await self._git("add", "flake.nix", "flake.lock")
                yield self.url
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._put_back()
                raise
            with trio.CancelScope(shield=True):
                await self._git("commit", "--quiet", "--allow-empty", "--message", message)

    @property
    def url(self) -> str:
        return f"git+file://{quote(str(self._folder))}"

    async def log(self) -> list[str]:
        """The first lines of its commits, newest first: what was deployed."""
        return (await self._git("log", "--format=%s")).splitlines()

    async def evaluate(self, name: AgentName, commit: CommitSha | None = None) -> Evaluated:
        """What an agent's module says, as deployed or at a commit of its applied repository; nothing is changed.

        It is code that an agent wrote: it runs in a sandbox, for so long and in so much memory as nix.limits has it.
        Raises Refusal("refused") with one sentence that names what is wrong.
        """
        wanted = f"{self.url}#nixosConfigurations.{nix_string(name)}.config"
        words = ["eval", "--json", "--no-write-lock-file", wanted, "--apply", _WANTED]
        if commit:
            words += ["--override-input", input_of(name), git_url(self._applied / f"{name}.git", commit)]
        try:
            said = await self._nix.run(words, readable=[self._folder, *self._readable])
        except NixFailed as failed:
            raise Refusal("refused", f"cannot use agent.nix of {name}: {explained(failed)}") from None
        return _checked(name, said)

    async def _lock(self, update: Sequence[str]) -> None:
        words = ["flake", "lock", self.url, *(word for name in update for word in ("--update-input", name))]
        try:
            await self._nix.run(words, readable=self._readable, writable=[self._folder])
        except NixFailed as failed:
            raise Refusal("failed", f"cannot lock the meta flake: {explained(failed)}") from None

    async def _put_back(self) -> None:
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


def _checked(name: AgentName, said: bytes) -> Evaluated:
    found: dict[str, Any] = json.loads(said)
    if found["mounts"]:
        where = quoted(", ".join(found["mounts"]))[:200]
        raise Refusal(
            "refused",
            f"cannot use agent.nix of {name}: it mounts {where}, and what a container sees of the host is not its "
            "own to say; take fileSystems out",
        )
    given = {key: value for key, value in found["settings"].items() if value is not None}
    try:
        settings = AgentSettings.model_validate(given)
    except ValidationError as exc:
        raise Refusal("refused", f"cannot use agent.nix of {name}: hyperhive.settings: {describe(exc)}") from None
    return Evaluated(settings, parse_text(found["persona"], "hyperhive.persona", PERSONA_LIMIT_BYTES))
