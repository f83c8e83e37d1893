"""Toolkits: what a new agent can be given by one word. Which there are stands in toolkits.toml."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import NamedTuple

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown


class Toolkit(NamedTuple):
    """tools: of its program; None: those that agents have anyway. packages: of nixpkgs, by their attributes."""

    tools: list[str] | None = None
    packages: list[str] = []  # noqa: RUF012 - never changed


@cache
def toolkits() -> dict[str, Toolkit]:
    given = tomllib.loads(resources.files("hive_core").joinpath("toolkits.toml").read_text("utf-8"))
    return {name: Toolkit(**words) for name, words in given.items()}


def parse_toolkit(raw: object) -> Toolkit:
    """The one of this name; without a name what agents have anyway. Raises Refusal("usage")."""
    if raw is None:
        return Toolkit()
    if not isinstance(raw, str) or raw not in toolkits():
        raise Refusal("usage", f"cannot use {shown(raw)} as a toolkit: there are {', '.join(toolkits())}")
    return toolkits()[raw]
