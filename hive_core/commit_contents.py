"""What a commit of an agent's repository holds: a few files, each checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import git

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import PERSONA_LIMIT_BYTES, CommitSha, parse_text
from hive_core.settings import AgentSettings, parse_agent_toml

# In every commit. With them alone an agent can be run in any sandbox.
FILES = ("CLAUDE.md", "agent.toml")
# What may lie beside them. agent.nix counts where containers are built from it; the flake is for whoever wants to build
# the same by hand, and is never read here.
NIX_FILES = ("agent.nix", "flake.lock", "flake.nix")
FILE_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Contents:
    """settings, prompt: what agent.toml and CLAUDE.md say. files: each file's name → its object in git."""

    settings: AgentSettings
    prompt: str
    files: Mapping[str, str]


def read_contents(repo: git.Repo, sha: CommitSha) -> Contents:
    """The checked contents of a commit. Raises Refusal that names the file."""
    found: dict[str, str] = {}
    objects: dict[str, str] = {}
    for entry in repo.commit(sha).tree:
        name = str(entry.path)
        _check_entry(sha, name, entry)
        objects[name] = entry.hexsha
        found[name] = _text(sha, name, entry.data_stream.read())
    if missing := [name for name in FILES if name not in found]:
        raise Refusal("refused", f"cannot apply {sha[:12]}: {missing[0]} is missing")
    settings = parse_agent_toml(found["agent.toml"].encode())
    return Contents(settings, parse_text(found["CLAUDE.md"], "CLAUDE.md", PERSONA_LIMIT_BYTES), objects)


def _check_entry(sha: CommitSha, name: str, entry: git.objects.base.IndexObject) -> None:
    known = (*FILES, *NIX_FILES)
    if name not in known:
        *others, last = known
        raise Refusal(
            "refused",
            f"cannot apply {sha[:12]}: it holds {ascii(name)[:60]}; only {', '.join(others)} and {last} are deployed",
        )
    if entry.type != "blob" or entry.mode != 0o100644:
        raise Refusal("refused", f"cannot apply {sha[:12]}: {name} must be a regular file that is not executable")
    if entry.size > FILE_LIMIT_BYTES:
        raise Refusal("refused", f"cannot apply {sha[:12]}: {name} is over the limit of {FILE_LIMIT_BYTES:,} bytes")


def _text(sha: CommitSha, name: str, data: bytes) -> str:
    """Text, which a card shows: of anything else a diff says only that it differs."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refusal("refused", f"cannot apply {sha[:12]}: {name}: it is not UTF-8; save it as UTF-8") from None
    if "\0" in text:
        raise Refusal("refused", f"cannot apply {sha[:12]}: {name} holds a NUL; take it out")
    return text
