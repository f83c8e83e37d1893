"""The files of generated flakes. Whatever is put into one becomes a literal of Nix, which nothing in it can leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from hive_core.git.proposals import pin_of
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "$": "\\$"})


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


def agent_files(
    name: AgentName, title: str, *, hyperhive: str, system: str, packages: Sequence[str] = ()
) -> dict[str, str]:
    """flake.nix and agent.nix of an agent's first commit; agent.toml and CLAUDE.md lie beside them.

    hyperhive  the flake that the modules come from, as a URL
    system     such as x86_64-linux
    packages   that agent.nix has, by their attributes in nixpkgs
    """
    flake = _TEMPLATES.get_template("agent-flake.nix.j2")
    return {
        "flake.nix": flake.render(name=name, title=title or name, hyperhive=hyperhive, system=system),
        "agent.nix": _TEMPLATES.get_template("agent.nix.j2").render(packages=packages),
    }


def meta_flake(agents: Mapping[AgentName, str], *, hyperhive: str, nixpkgs: str, system: str) -> str:
    """flake.nix of the meta flake: the same for the same agents, in whatever order they come. name → URL."""
    rows = [{"name": name, "input": input_of(name), "url": url} for name, url in sorted(agents.items())]
    template = _TEMPLATES.get_template("meta-flake.nix.j2")
    return template.render(agents=rows, hyperhive=hyperhive, nixpkgs=nixpkgs, system=system)


def other_packages_flake(name: AgentName, before: str, after: str, *, hyperhive: str, nixpkgs: str, system: str) -> str:
    """A flake whose `derivation` is of the system that an agent's files at one URL make with the packages of those at
    another."""
    template = _TEMPLATES.get_template("other-packages.nix.j2")
    return template.render(name=name, before=before, after=after, hyperhive=hyperhive, nixpkgs=nixpkgs, system=system)


def input_of(name: AgentName) -> str:
    """The meta flake's input of an agent."""
    return f"agent-{name}"


def git_url(repository: Path, commit: CommitSha | None = None) -> str:
    """A repository of this host, at a commit that is pinned in it or at its main, as a flake's URL."""
    at = f"{pin_of(commit)}&rev={commit}" if commit else "refs/heads/main"
    return f"git+file://{quote(str(repository))}?ref={at}"
