"""Ranges of uids that belong to nobody on this host, for containers."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import pwd
from collections.abc import Collection
from pathlib import Path

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

SIZE = 65536
# What systemd keeps for containers (its UIDS-GIDS page), but for the last range, which containers are tried with.
RANGES = range(0x00080000, 0x6FFF0000, SIZE)


def pick_range(name: str, taken: Collection[int]) -> int:
    """The first uid of a range that is free: the name's hash first, the next one otherwise. Raises Refusal."""
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(RANGES)
    foreign = [range(start, start + count) for start, count in _subordinate()]
    peoples = {number - number % SIZE for number in _known()}
    for step in range(len(RANGES)):
        uids = range(candidate := RANGES[(first + step) % len(RANGES)], candidate + SIZE)
        if candidate in taken or candidate in peoples or _is_somebodys(candidate):
            continue
        if not any(other.start < uids.stop and uids.start < other.stop for other in foreign):
            return candidate
    raise Refusal("refused", f"cannot allocate uids for {name}: all {len(RANGES)} ranges are; purge some agents")


def _known() -> set[int]:
    """The uids and gids of all users and groups that the host can list. A directory service may have more."""
    return {user.pw_uid for user in pwd.getpwall()} | {group.gr_gid for group in grp.getgrall()}


def _is_somebodys(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _subordinate() -> list[tuple[int, int]]:
    """The ranges that users of the host may give to containers of their own: (first, how many)."""
    found = []
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        for line in lines:
            parts = line.split(":")
            if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit():
                found.append((int(parts[1]), int(parts[2])))
    return found


class UidRangesFile:
    """The ranges of uids that agents have, in a file of root's. A range is free again when its agent is destroyed."""

    def __init__(self, path: Path, hive: str) -> None:
        self._path = path
        self._hive = hive

    async def first_uid(self, name: AgentName) -> int:
        """The first uid of an agent's range, which is allocated when it has none. Raises Refusal when all are."""
        held = self._read()
        if name not in held:
            held[name] = pick_range(f"{self._hive}/{name}", {*held.values()})
            self._write(held)
        return held[name]

    def release(self, name: AgentName) -> None:
        held = self._read()
        if held.pop(name, None) is not None:
            self._write(held)

    def _read(self) -> dict[str, int]:
        with contextlib.suppress(FileNotFoundError):
            return {str(name): int(first) for name, first in json.loads(self._path.read_text()).items()}
        return {}

    def _write(self, held: dict[str, int]) -> None:
        fresh = self._path.with_suffix(".new")
        with fresh.open("w") as file:
            json.dump(held, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(self._path)
