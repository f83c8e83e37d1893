"""The ranges of uids that agents have, as the helper remembers them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from hive_core.containers.ranges import pick_range
from hive_core.protocol.words import AgentName


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
