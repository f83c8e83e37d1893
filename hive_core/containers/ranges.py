"""Ranges of uids that belong to nobody on this host, for containers."""

from __future__ import annotations

import grp
import hashlib
import pwd
from collections.abc import Collection
from pathlib import Path

from hive_core.protocol.refusal import Refusal

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
