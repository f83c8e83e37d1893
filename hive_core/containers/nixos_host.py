"""A NixOS host as its containers need it: where they are kept, the commands that change them, and their units."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import trio

from hive_core.containers.run_command import run_command
from hive_core.containers.running import Done
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named

_SYSTEM_PROGRAMS = "/run/current-system/sw/bin"  # a unit of NixOS's is not given them by itself
SHOWN = "--property=ActiveState,MainPID,InvocationID"
_ASK_WITHIN_S = 30.0
_REASON_LIMIT = 400
_LOOKS_EACH_S = 0.05


@dataclass(frozen=True, slots=True)
class UnitState:
    """What systemd says of a unit."""

    active: str  # "active", "activating", "reloading", "deactivating", "inactive", "failed", "maintenance"
    pid: int  # of its main process, 0 when there is none
    invocation: str  # names this run of it, or the last; empty when it never ran

    @property
    def runs(self) -> bool:
        return self.pid > 0 and self.active in ("active", "activating", "reloading")

    @property
    def ended(self) -> bool:
        return self.active in ("inactive", "failed")


@dataclass(frozen=True, slots=True)
class NixosHost:
    """Where nixos-container and systemd keep what they have of a container. A test has a host below a directory."""

    confs: Path = Path("/etc/nixos-containers")
    roots: Path = Path("/var/lib/nixos-containers")
    profiles: Path = Path("/nix/var/nix/profiles/per-container")
    store: Path = Path("/nix/store")
    drop_ins: Path = Path("/run/systemd/system")  # /etc/systemd/system is in the store
    programs: str = ""  # folders of programs that come before the daemon's own

    @property
    def path(self) -> str:
        """Where the host's commands are looked for."""
        folders = (self.programs, os.environ.get("PATH", os.defpath), _SYSTEM_PROGRAMS)
        return os.pathsep.join(filter(None, folders))

    async def run(self, *words: str, patience_s: float = _ASK_WITHIN_S) -> Done:
        """Run one of the host's commands. Raises Refusal when it cannot be run, or takes longer."""
        return await run_command(words, patience_s, {"PATH": self.path, "LANG": "C.UTF-8"})

    async def insist(self, what: str, *words: str, patience_s: float = _ASK_WITHIN_S) -> Done:
        """The same, and Refusal("failed") too when it ends with another code than 0: "cannot WHAT: REASON"."""
        done = await self.run(*words, patience_s=patience_s)
        if done.code:
            raise Refusal("failed", f"cannot {what}: {reason_of(done)}")
        return done

    async def state(self, unit: str) -> UnitState:
        """What systemd says of a unit now. Raises Refusal when it says nothing."""
        try:
            done = await self.insist(f"look at {unit}", "systemctl", "show", SHOWN, unit)
        except Refusal as refusal:  # systemd may be busy: what runs goes on
            raise Refusal("unavailable", refusal.message) from None
        said = dict(line.split("=", 1) for line in done.output.splitlines() if "=" in line)
        return UnitState(
            said.get("ActiveState", "inactive"), int(said.get("MainPID") or 0), said.get("InvocationID", "")
        )

    async def destroy(self, what: str, machine: str) -> None:
        """Remove a container, and what we have of its unit. Raises Refusal: "cannot WHAT: REASON"."""
        await self.insist(what, "nixos-container", "destroy", machine)
        shutil.rmtree(self.drop_in(machine).parent, ignore_errors=True)
        await self.insist(what, "systemctl", "daemon-reload")

    def drop_in(self, machine: str) -> Path:
        return self.drop_ins / f"container@{machine}.service.d" / "hyperhive.conf"

    async def settled(self, unit: str, within_s: float) -> UnitState:
        """What a unit is when it has ended, or after so long: its main process has, and the rest is milliseconds."""
        state = await self.state(unit)
        with trio.move_on_after(within_s):
            while not state.ended:
                await trio.sleep(_LOOKS_EACH_S)
                state = await self.state(unit)
        return state

    async def journal(self, lines: int, *matches: str) -> list[str]:
        """The last lines of the host's journal that match, the oldest first; none when it cannot be read."""
        words = ("journalctl", "--quiet", "--no-pager", "--output=cat", f"--lines={lines}", *matches)
        try:
            done = await self.run(*words)
        except Refusal:
            return []
        return [] if done.code else [line.rstrip("\r") for line in done.output.splitlines()]


def reason_of(done: Done) -> str:
    """The last that a command said, for a sentence of ours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", done.output).splitlines() if line.strip()]
    return named(" · ".join(lines[-3:]))[-_REASON_LIMIT:] or f"it ended with code {done.code} and said nothing"
