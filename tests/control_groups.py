"""Control groups that a test has left: of hives whose agents were killed, which nobody removes behind them."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from hive_core.containers.cgroups import folders_of
from tests.processes import look_until


def remove_groups(*state_dirs: Path) -> None:
    """Kill what is in the groups of these hives, and remove them once it is gone."""
    for state_dir in state_dirs:
        for folder in folders_of(state_dir):
            for group in sorted(map(Path, folder.glob("**/")), reverse=True):
                look_until(lambda group=group: _is_removed(group))  # type: ignore[misc]


def _is_removed(group: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # what was killed is not gone yet
    return True
