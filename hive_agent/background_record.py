"""What is kept on disk of a command in the background until the host knows of its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hive_core.protocol.harness import BACKGROUND_COMMAND_LIMIT, BACKGROUND_TAIL_LIMIT

RECORD_LIMIT_BYTES = 64 * 1024
TOLD_LIMIT = 64  # records of a harness that died
TAIL_LINES = 10


class Record:
    """One command: while it runs, and once it has ended.

    state   running, ended, timed_out or cut_off
    code    its exit code, negative for a signal; None while it runs, and where nobody knows
    """

    def __init__(self, folder: Path, work: str, turn: int, command: str, note: str, pid: int) -> None:
        self._folder = folder
        self.work = work
        self._kept: dict[str, Any] = {
            "turn": turn,
            "command": command[:BACKGROUND_COMMAND_LIMIT],
            "note": note,
            "pid": pid,
            "started": start_time(pid),
            "state": "running",
            "code": None,
            "took_ms": None,
        }

    @classmethod
    def read(cls, path: Path) -> Record:
        """Raises OSError or ValueError for what is no record."""
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            kept = json.loads(file.read(RECORD_LIMIT_BYTES))
        record = cls(path.parent, path.stem, 0, "", "", 0)
        if not isinstance(kept, dict) or kept.keys() != record._kept.keys():
            raise ValueError("it is no record")
        record._kept = kept
        return record

    @property
    def output(self) -> Path:
        return self._folder / f"{self.work}.log"

    def write(self) -> None:
        """Keep it on disk, where that takes it: without it the host knows less of what a restart cuts off."""
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        fresh = self._folder / f".{self.work}.fresh"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(fresh, flags, 0o600), "w") as file:
            json.dump(self._kept, file)
        fresh.rename(self._path)

    def end(self, state: str, code: int | None, took_s: float) -> None:
        """Note how it ended, and after how long."""
        self._kept |= {"state": state, "code": code, "took_ms": int(took_s * 1000)}
        self.write()

    def cut_off(self) -> None:
        """The harness that ran it has died: so has it, or it does now."""
        if self._kept["state"] != "running":
            return
        pid, started = self._kept["pid"], self._kept["started"]
        if isinstance(pid, int) and pid > 1 and started is not None and start_time(pid) == started:
            with contextlib.suppress(OSError, OverflowError):
                os.killpg(pid, signal.SIGKILL)
        self._kept |= {"state": "cut_off"}

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def as_form(self) -> dict[str, Any]:
        """What the host is told: a request of harness.sock."""
        kept = self._kept
        form = {
            "op": "background",
            "work": self.work,
            "output": str(self.output),
            **{key: kept[key] for key in ("turn", "state", "command", "note", "code", "took_ms")},
        }
        if kept["state"] != "running":
            form["tail"] = tail_of(self.output)
        return form

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.work}.json"


def cut_off_works(folder: Path) -> Iterator[Record]:
    """What the harness before left without an end, or with one that the host does not know. Others are removed."""
    with contextlib.suppress(OSError):
        for number, path in enumerate(sorted(folder.glob("*.json"))):
            try:
                if number >= TOLD_LIMIT:
                    raise ValueError("nobody begins so many")
                record = Record.read(path)
                record.cut_off()
            except (OSError, ValueError, RecursionError):
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            yield record


def tail_of(path: Path) -> str:
    """The last lines that a command printed; "" where there are none."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - BACKGROUND_TAIL_LIMIT))
            text = file.read(BACKGROUND_TAIL_LIMIT).decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip("\n").split("\n")[-TAIL_LINES:])


def start_time(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None when there is none of that id."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
