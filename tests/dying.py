"""A daemon that kills itself once at a step of its work: the shipped packages, copied, with a few lines behind them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.daemons import WITHIN_S, Daemon
from tests.needs import ROOT

BEFORE, AFTER = False, True
Place = tuple[str, str, str, bool]  # (module, call, step, BEFORE or AFTER the call)
_FILE = "dies_at"  # beside the daemon's directories: the step to die at

_DYING = """

def _dying(module, call, step, after):
    import functools, importlib, os, pathlib, signal
    owner, name = call.split(".")
    owner = getattr(importlib.import_module(module), owner)
    call = getattr(owner, name)

    def die():
        told = pathlib.Path(os.environ["XDG_CONFIG_HOME"], {file!r})
        if told.exists() and told.read_text() == step:
            told.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(call)
    async def run(*arguments, **more):
        if not after:
            die()
        done = await call(*arguments, **more)
        die()
        return done

    setattr(owner, name, run)


for _place in {places!r}:
    _dying(*_place)
"""


def packages(folder: Path) -> Path:
    """A copy of our packages that a test may change."""
    for package in ("hive_core", "hive_agent", "hive_mind", "dashboard"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def let_die(folder: Path, places: Sequence[Place]) -> Path:
    """Let a daemon of these packages die at these places, when it is told to."""
    with (folder / "hive_core" / "daemon.py").open("a") as file:
        file.write(_DYING.format(places=list(places), file=_FILE))
    return folder


def die_at(daemon: Daemon, step: str) -> None:
    """Let a running daemon die when it next comes to a step; the one after it goes on."""
    (daemon.folder / _FILE).write_text(step)


def wait_dead(daemon: Daemon) -> None:
    assert daemon.process.wait(WITHIN_S) == -9
    assert not (daemon.folder / _FILE).exists()
