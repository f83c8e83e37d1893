"""What the helper believes: files that root alone can have written."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal

_LINKS_MOST = 40


def check_trusted(path: Path, setting: str) -> None:
    """Raise Refusal unless root alone can change what a path leads to: each directory, link and file on the way.

    setting: what names the path, for the sentence.
    """
    here, left, links = Path("/"), list(path.parts[1:]), 0
    while left:
        part = left.pop(0)
        here = here.parent if part == ".." else here / part
        try:
            found = here.lstat()
            if stat.S_ISLNK(found.st_mode):
                links += 1
                if links > _LINKS_MOST:
                    raise Refusal("refused", f"cannot use {path} as {setting}: its links lead in a circle; mend them")
                target = Path(os.readlink(here))
                left = [*target.parts[target.is_absolute() :], *left]
        except OSError as exc:
            raise Refusal("refused", f"cannot use {path} as {setting}: {explain(exc)}") from None
        if found.st_uid != 0 or _others_may_change(found.st_mode):
            raise _not_roots(path, setting, here)
        if stat.S_ISLNK(found.st_mode):
            here = Path("/") if target.is_absolute() else here.parent


def check_code() -> None:
    """Raise Refusal unless root alone can change what this process runs, and where it would look for more."""
    setting = "a part of the helper"
    for path in {*_code()}:
        check_trusted(path, setting)
        # Where modules are looked for a sticky directory is not enough: anybody can put one there that is not there.
        folder = path if path.is_dir() else path.parent
        if folder.stat().st_mode & 0o022:
            raise _not_roots(path, setting, folder)


def _not_roots(path: Path, setting: str, here: Path) -> Refusal:
    fix = f"`chown root: {here}; chmod go-w {here}`, or set {setting} to another"
    why = f"{here} can be changed by others than root, and the helper does as it says"
    return Refusal("refused", f"cannot use {path} as {setting}: {why}; {fix}")


def _code() -> Iterator[Path]:
    yield Path(sys.executable)
    for entry in sys.path:
        if os.path.exists(entry or "."):
            yield Path(os.path.abspath(entry))
    for module in [*sys.modules.values()]:
        for file in (getattr(module, "__file__", None), getattr(module, "__cached__", None)):
            if file and os.path.exists(file):
                yield Path(os.path.abspath(file))


def _others_may_change(mode: int) -> bool:
    """What is in a sticky directory can be changed by its owner alone; a link's own mode says nothing."""
    sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    return not stat.S_ISLNK(mode) and not sticky and bool(mode & 0o022)
