"""Control groups that a test has left: of hives whose agents were killed, which nobody removes behind them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hive_core.containers.bounds import Bounds
from hive_core.containers.cgroups import Cgroups

_ANY = Bounds(memory_bytes=2**30, cpu_percent=100, tasks=100)


def remove_groups(*state_dirs: Path) -> None:
    """Remove what is empty of the groups of these hives."""
    for state_dir in state_dirs:
        cgroups = Cgroups(state_dir, _ANY)
        for parent, _ in [] if cgroups.trouble else cgroups._wanted():
            group = parent / cgroups._folder
            for each in (*sorted(group.rglob("*/"), reverse=True), group):
                with contextlib.suppress(OSError):
                    each.rmdir()
