"""What a stand-in NixOS host keeps below its directory: conf files, units, their journal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_JOURNAL_LIMIT_BYTES = 4 << 20
# What systemctl shows of a unit, and of one that never ran. A unit's file has these lines.
NEVER_RAN = {"ActiveState": "inactive", "MainPID": "0", "InvocationID": ""}


class Host:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.confs = folder / "etc/nixos-containers"
        self.nix = folder / "nix"
        self.drop_ins = folder / "run/systemd/system"
        self.units = folder / "run/units"
        self._loaded = folder / "run/loaded"

    def make(self) -> None:
        for path in (self.confs, self.units, self._loaded, self.drop_ins, self.folder / "run/lock"):
            path.mkdir(parents=True, exist_ok=True)
        for name in ("store", "var/nix/db", "var/nix/daemon-socket", "var/nix/profiles/per-container"):
            (self.nix / name).mkdir(parents=True, exist_ok=True)

    def conf_file(self, machine: str) -> Path:
        return self.confs / f"{machine}.conf"

    def root_of(self, machine: str) -> Path:
        return self.folder / "var/lib/nixos-containers" / machine

    def stop_file(self, machine: str) -> Path:
        return self.units / f"{machine}.stop"

    def state(self, machine: str) -> dict[str, str]:
        return parse_settings(self.units / machine) or dict(NEVER_RAN)

    def set_state(self, machine: str, active: str, pid: int, invocation: str) -> None:
        fresh = self.units / f".{machine}.{os.getpid()}"
        fresh.write_text(f"ActiveState={active}\nMainPID={pid}\nInvocationID={invocation}\n")
        fresh.rename(self.units / machine)

    def forget(self, machine: str) -> None:
        (self.units / machine).unlink(missing_ok=True)

    @contextmanager
    def locked(self, what: str) -> Iterator[None]:
        with (self.folder / "run/lock" / what).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def reload(self) -> None:
        """What systemd knows of drop-ins is what it read when it was told to read them."""
        import shutil  # costly, and seldom needed: each command is a process of its own

        with self.locked("reload"):
            shutil.rmtree(self._loaded, ignore_errors=True)
            shutil.copytree(self.drop_ins, self._loaded)

    def loaded_drop_in(self, unit: str) -> dict[str, list[str]]:
        """The settings of a unit's drop-ins, each with all that was given; an empty one forgets those before."""
        found: dict[str, list[str]] = {}
        with self.locked("reload"):
            texts = [file.read_text() for file in sorted((self._loaded / f"{unit}.d").glob("*.conf"))]
        for text in texts:
            for line in text.splitlines():
                key, equals, value = line.partition("=")
                if equals and not line.startswith("#"):
                    found[key] = [*found.get(key, []), value] if value else [""]
        return found


def parse_settings(file: Path) -> dict[str, str]:
    """An EnvironmentFile."""
    settings = {}
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text().splitlines():
            if line and line[0] not in "#;":
                key, _, value = line.partition("=")
                settings[key] = value
    return settings


class Journal:
    """What a unit printed, one object a line; no more than LogRateLimitBurst lines in 30 s, as journald has it."""

    def __init__(self, host: Host, unit: str) -> None:
        self._file = host.folder / "run/journal" / unit
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._burst = int(host.loaded_drop_in(unit).get("LogRateLimitBurst", ["10000"])[-1])
        self._since, self._count = 0.0, 0

    def write(self, invocation: str, *lines: str, by_systemd: bool = False) -> None:
        import json

        now = time.time()
        if now - self._since > 30:
            self._since, self._count = now, 0
        allowed = max(0, self._burst - self._count)
        self._count += len(lines)
        with self._file.open("a") as file:
            for line in lines[:allowed]:
                told = {"at": now, "invocation": invocation, "by_systemd": by_systemd, "text": line}
                file.write(json.dumps(told) + "\n")

    def read(self) -> Iterator[dict[str, object]]:
        import json

        with contextlib.suppress(FileNotFoundError):
            for line in self._file.read_text()[-_JOURNAL_LIMIT_BYTES:].splitlines():
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
