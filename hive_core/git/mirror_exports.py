"""What an agent's clones borrow of a mirror: its packs by another name in agents/NAME/mirrors/PROJECT, and its refs.

Nothing is copied where both are on one file system. In the agent's container the directory is read-only; git takes
objects from it (`git clone --reference`, objects/info/alternates), and asks no server for what the refs in it lead to.
All of it blocks. What a daemon that died left half done, the next call completes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from hive_core.git.sterile_git import run_git

# The order in which they appear: a pack is there for git when its .idx is.
_KINDS = (".pack", ".rev", ".bitmap", ".idx")
_HEADER = "# pack-refs with: sorted \n"
_NEW = ".new"


def export_mirror(mirror: Path, place: Path) -> None:
    """Let `place` hold what a bare repository holds now. Its packs alone count: keep no loose objects in it.

    A git that reads there meanwhile finds each object before, during and after. Raises GitFailed, OSError.
    """
    # The refs before the packs: what they lead to is in a pack by now.
    refs = run_git(mirror, "for-each-ref", "--format=%(objectname) %(refname)").decode()
    head = (mirror / "HEAD").read_text()
    packs = place / "objects" / "pack"
    for folder in (place, place / "refs", place / "objects", packs):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = [file for kind in _KINDS for file in sorted((mirror / "objects" / "pack").glob(f"pack-*{kind}"))]
    for file in wanted:
        _link(file, packs / file.name)
    _write(place / "packed-refs", _HEADER + refs)
    _write(place / "HEAD", head)
    names = {file.name for file in wanted}
    gone = [file for file in packs.iterdir() if file.name not in names]
    for file in sorted(gone, key=lambda one: one.suffix != ".idx"):
        file.unlink(missing_ok=True)


def remove_export(place: Path) -> None:
    """Remove what was exported there. Nothing when it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place)


def _link(file: Path, target: Path) -> None:
    if target.exists():
        return
    fresh = target.with_name(f"{target.name}{_NEW}")
    fresh.unlink(missing_ok=True)
    try:
        os.link(file, fresh)
    except FileNotFoundError:
        return  # packed anew meanwhile: who did that exports again
    except OSError:  # another disk, or too many links
        shutil.copyfile(file, fresh)
    fresh.rename(target)


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(f"{file.name}{_NEW}")
    fresh.write_text(text)
    fresh.rename(file)
