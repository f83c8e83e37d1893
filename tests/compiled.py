"""Our packages compiled ahead, as an installation has them: an agent's container cannot keep what it compiles."""

from __future__ import annotations

import compileall

from tests.needs import ROOT

PACKAGES = ("hive_core", "hive_agent", "hive_mind", "dashboard")


def compile_packages() -> None:
    """Compile what has changed; a checkout that cannot be written to is left as it is."""
    for package in PACKAGES:
        compileall.compile_dir(ROOT / package, quiet=2)
