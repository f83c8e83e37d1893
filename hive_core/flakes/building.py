"""What evaluates and builds the systems of agents' containers here, as the configuration has it."""

from __future__ import annotations

from pathlib import Path

import trio

from hive_core.config import Config
from hive_core.flakes.flakes import MetaFlake, Sources
from hive_core.flakes.nix import Nix, NixFailed, NixLimits, explained
from hive_core.protocol.refusal import Refusal


def make_nix(config: Config) -> Nix:
    """nix, in the limits that are set."""
    limits = NixLimits(config.evaluation_s, config.evaluation_memory_bytes // 2**20)
    return Nix(config.state_dir / "nix", limits)


def make_meta_flake(config: Config, nix: Nix) -> MetaFlake:
    """The flake that builds every agent. Raises Refusal when what it is made of is not set."""
    return MetaFlake(config.state_dir / "meta", config.state_dir / "applied", nix, sources(config))


def sources(config: Config) -> Sources:
    """Where agents' modules and packages come from. Raises Refusal("usage") when that is not set, or is no flake."""
    return Sources(
        hyperhive=_flake(config.hyperhive_source, "hyperhive_source", "a checkout of hyperhive"),
        nixpkgs=_flake(config.nixpkgs, "nixpkgs", "a nixpkgs"),
    )


def nix_trouble(config: Config) -> str | None:
    """Why the systems of agents cannot be evaluated here, found by trying; None when they can. Blocks for a moment."""
    try:
        sources(config)
        trio.run(make_nix(config).run, ["eval", "--expr", "1"])
    except NixFailed as failed:
        return f"nix does not work here: {explained(failed)}"
    except (Refusal, OSError) as exc:
        return str(exc)
    return None


def _flake(folder: Path | None, key: str, what: str) -> Path:
    if folder is not None and (folder / "flake.nix").is_file():
        return folder
    why = "is not set" if folder is None else f"is {folder}, which holds no flake.nix"
    raise Refusal("usage", f"cannot build containers: {key} {why}; set it to the path of {what}")
