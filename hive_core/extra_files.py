"""Where the skills and plugins of agents lie for their containers, which see them read-only: NAME/extras/DIGEST.

A digest names what is in it, so a change lies beside what a program has loaded, and is taken with the next process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import trio

from hive_core.extras import ExtraFile, Extras
from hive_core.program_config import NAME, NEW
from hive_core.protocol.paths import sync_folder
from hive_core.protocol.words import AgentName
from hive_core.trees import open_folder, remove_tree

_NEW = ".new."


class ExtraFiles:
    """state_dir: the hive's own. All of it in threads; all raises OSError."""

    def __init__(self, state_dir: Path) -> None:
        self._agents = state_dir / "agents"

    async def put(self, name: AgentName, extras: Extras) -> None:
        """Have them lie there, whole and on disk. Again is fine, and there is nothing to do for none."""
        if extras:
            await trio.to_thread.run_sync(self._put, name, extras)

    async def has(self, name: AgentName, digest: str) -> bool:
        return await trio.to_thread.run_sync(os.path.lexists, self._of(name) / digest)

    async def keep(self, name: AgentName, digest: str | None) -> None:
        """Remove all skills and plugins but these; None: all. No program runs on others."""
        await trio.to_thread.run_sync(self._keep, name, digest)

    def _of(self, name: AgentName) -> Path:
        return self._agents / name / "extras"

    def _put(self, name: AgentName, extras: Extras) -> None:
        place, digest = self._of(name), extras.digest
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = open_folder(place)
        try:
            if os.path.lexists(place / digest):
                return
            new = f"{_NEW}{os.urandom(6).hex()}"
            try:
                _write(place / new, extras.files_of_plugins)
                with contextlib.suppress(FileExistsError):  # by another who did the same
                    os.rename(new, digest, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    remove_tree(new, folder)
            os.fsync(folder)
        finally:
            os.close(folder)

    def _keep(self, name: AgentName, digest: str | None) -> None:
        try:
            folder = open_folder(self._of(name))
        except FileNotFoundError:
            return
        try:
            for entry in os.listdir(folder):
                if entry not in (digest, NAME) and not entry.startswith(NEW):
                    remove_tree(entry, folder)
        finally:
            os.close(folder)


def _write(root: Path, files: Mapping[str, ExtraFile]) -> None:
    """Files at their places below a directory that is made. Whoever may enter that may read them."""
    folders = {root}
    root.mkdir(mode=0o755)
    for path, file in files.items():
        target = root / path
        for parent in reversed(target.relative_to(root).parents):
            if (folder := root / parent) not in folders:
                folder.mkdir(mode=0o755)
                folders.add(folder)
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as opened:
            opened.write(file.text.encode())
            opened.flush()
            os.fchmod(descriptor, 0o755 if file.executable else 0o644)
            os.fsync(descriptor)
    for folder in folders:
        os.chmod(folder, 0o755)
        sync_folder(folder)
