"""The directories of agents that were destroyed: moved aside, moved back, or removed. All of it in threads.

Whatever is done is done by renaming first, so a daemon that dies in between finds it half done and goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import trio

from hive_core.protocol.paths import sync_folder
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.trees import measure_tree, open_folder, remove_tree

PLACE = "tombstones"
MEASURE_WITHIN_S = 10.0


def _parts(name: AgentName) -> dict[str, tuple[str, str]]:
    """What there is of an agent: what it is called in a tombstone → its folder and its name there."""
    return {"agent": ("agents", name), "proposed": ("proposed", name), "applied.git": ("applied", f"{name}.git")}


class Keeper:
    """state_dir: the hive's own; run_dir: the directory of an agent's sockets."""

    def __init__(self, state_dir: Path, run_dir: Callable[[AgentName], Path]) -> None:
        self._state = state_dir
        self._place = state_dir / PLACE
        self._run_dir = run_dir

    async def put_away(self, name: AgentName, label: str) -> int:
        """Move an agent's directories under its label; how many bytes they take. Again is fine. Raises OSError."""
        return await trio.to_thread.run_sync(self._put_away, name, label)

    async def check_room(self, name: AgentName, label: str) -> None:
        """Raise Refusal("conflict") when something stands in the place of what would be brought back."""
        await trio.to_thread.run_sync(self._check_room, name, label)

    async def bring_back(self, name: AgentName, label: str) -> None:
        """The other way. Raises OSError, also when something stands in the place."""
        await trio.to_thread.run_sync(self._bring_back, name, label)

    async def remove(self, label: str, number: int) -> None:
        """Remove what is kept under a label. Again is fine. Raises OSError, or Refusal for what is not ours."""
        await trio.to_thread.run_sync(self._remove, label, number)

    def _put_away(self, name: AgentName, label: str) -> int:
        room = self._place / label
        room.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part, (folder, entry) in _parts(name).items():
            _move(self._state / folder / entry, room / part)
        with contextlib.suppress(FileNotFoundError):
            # Its files are the mirrors' by another name: kept, they would keep what a mirror no longer has.
            _remove_below(room / "agent", "mirrors")
        self._sync(room)
        with contextlib.suppress(FileNotFoundError):
            run = self._run_dir(name)
            _remove_below(run.parent, run.name)
        return self._measure(label)

    def _check_room(self, name: AgentName, label: str) -> None:
        for part, (folder, entry) in _parts(name).items():
            target = self._state / folder / entry
            if os.path.lexists(self._place / label / part) and os.path.lexists(target):
                why = f"at {target} something is there already; move that away"
                raise Refusal("conflict", f"cannot revive {label}: {why}")

    def _bring_back(self, name: AgentName, label: str) -> None:
        room = self._place / label
        for part, (folder, entry) in _parts(name).items():
            (self._state / folder).mkdir(mode=0o700, exist_ok=True)
            _move(room / part, self._state / folder / entry)
        self._sync(room)
        with contextlib.suppress(FileNotFoundError):
            room.rmdir()

    def _remove(self, label: str, number: int) -> None:
        gone = f".purged-{number}"
        with contextlib.suppress(FileNotFoundError):
            place = open_folder(self._place)
            try:
                with contextlib.suppress(FileNotFoundError):
                    self._check_ours(label, place)
                    os.rename(label, gone, src_dir_fd=place, dst_dir_fd=place)
                remove_tree(gone, place)
                os.fsync(place)
            finally:
                os.close(place)

    def _check_ours(self, label: str, place: int) -> None:
        try:
            room = open_folder(label, place)
        except NotADirectoryError:
            raise _not_ours(self._place / label, "it is no directory") from None
        try:
            if os.fstat(room).st_uid != os.geteuid():
                raise _not_ours(self._place / label, "it belongs to another user")
        finally:
            os.close(room)

    def _measure(self, label: str) -> int:
        place = open_folder(self._place)
        try:
            return measure_tree(label, place, time.monotonic() + MEASURE_WITHIN_S)[0]
        finally:
            os.close(place)

    def _sync(self, room: Path) -> None:
        for folder in (room, self._place, *(self._state / name for name in ("agents", "proposed", "applied"))):
            with contextlib.suppress(FileNotFoundError):
                sync_folder(folder)


def _not_ours(path: Path, why: str) -> Refusal:
    return Refusal("refused", f"cannot remove {path}: {why}, so it is not what the hive keeps there; look at it")


def _move(source: Path, target: Path) -> None:
    """Rename what is there; nothing when it was done before. Never onto something else."""
    if not os.path.lexists(source):
        return
    if os.path.lexists(target):
        raise FileExistsError(f"cannot move {source} to {target}: something is there already; move that away")
    try:
        os.rename(source, target)
    except OSError as exc:
        raise OSError(exc.errno, f"cannot move {source} to {target}: {exc.strerror}") from exc


def _remove_below(folder: Path, name: str) -> None:
    descriptor = open_folder(folder)
    try:
        remove_tree(name, descriptor)
    finally:
        os.close(descriptor)
