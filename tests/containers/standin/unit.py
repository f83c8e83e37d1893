"""Runs one container@.service of a stand-in host's as systemd would.

The unit's start script is told by what it does: it reads the conf file as an EnvironmentFile, turns its settings into
flags of systemd-nspawn, the real one, and lets a shell expand EXTRA_NSPAWN_FLAGS without quotes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import shlex
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hive_core.containers.process_tree import kill_descendants
from tests.containers.standin.state import Host, Journal, parse_settings

if TYPE_CHECKING:  # dear to import, and most units are not bounded
    from hive_core.containers.cgroups import Cgroups

_PR_SET_CHILD_SUBREAPER = 36
# What a NixOS system has in its store, and this machine in its /usr.
_LENT = ("/usr:/usr", "/usr/bin:/bin", "/usr/sbin:/sbin", "/lib:/lib", "/lib64:/lib64")
_REBOOT = 133
_STARTS_MOST = 5  # StartLimitBurst=


def nspawn_script(host: Host, machine: str, conf: dict[str, str]) -> str:
    profile, roots = host.nix / "var/nix/profiles/per-container" / machine, host.nix / "var/nix/gcroots/per-container"
    root = host.root_of(machine)
    for folder in (profile, roots / machine, *(root / each for each in ("usr/bin", "etc", "var/lib", "root"))):
        folder.mkdir(parents=True, exist_ok=True)
    users = conf.get("PRIVATE_USERS", "")
    idmap = ":idmap" if users.isdigit() and int(users) else ""
    # Another test of this machine may have one of the same id just now.
    own = f"{machine}-{hashlib.sha256(os.fsencode(host.folder)).hexdigest()[:6]}"
    flags = ["--keep-unit", "-M", own, f"--hostname={machine}", "-D", str(root)]
    flags += ["--private-network"] if conf.get("PRIVATE_NETWORK") == "1" else []
    flags += [f"--private-users={users}"] if users else []
    flags += ["--network-veth"] if conf.get("HOST_ADDRESS") or conf.get("LOCAL_ADDRESS") else []
    flags += ["--notify-ready=yes", "--kill-signal=SIGRTMIN+3"]
    for path in ("store", "var/nix/db", "var/nix/daemon-socket"):
        flags.append(f"--bind-ro={host.nix / path}:/nix/{path}{idmap}")
    flags += [f"--bind={profile}:/nix/var/nix/profiles{idmap}", f"--bind={roots / machine}:/nix/var/nix/gcroots{idmap}"]
    flags += ["--link-journal=try-guest", "--setenv", f"PATH={os.defpath}", "--register=no"]
    flags += [f"--bind-ro={path}" for path in _LENT]
    init = f"{conf.get('SYSTEM_PATH') or '/nix/var/nix/profiles/system'}/init"
    return f"exec systemd-nspawn {shlex.join(flags)} ${{EXTRA_NSPAWN_FLAGS-}} {init}"


class Unit:
    def __init__(self, host: Host, machine: str) -> None:
        self.host = host
        self.machine = machine
        self.name = f"container@{machine}.service"
        self.journal = Journal(host, self.name)
        self.conf = parse_settings(host.conf_file(machine))
        self.drop_in = host.loaded_drop_in(self.name)

    def run(self) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for _ in range(_STARTS_MOST):
            if not self._run_once():
                return
        self._set("failed", 0)

    def _run_once(self) -> bool:
        """One run of the unit; whether it is to be run again."""
        self.invocation = os.urandom(16).hex()
        groups = _groups(self.host.folder, self.drop_in)
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(f"{folder}/notify")
            process = self._start(f"{folder}/notify", groups)
            self._set("activating", process.pid)
            self._watch(process, ready)
        code = process.wait()
        self._set("deactivating", 0)
        kill_descendants(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while True:
                os.waitpid(-1, 0)
        if groups is not None and groups.remove(self.machine):
            said = f"{self.name}: A process of this unit has been killed by the OOM killer."
            self.journal.write(self.invocation, said, by_systemd=True)
        self._stop_post(code)
        forced = str(code) in self.drop_in.get("RestartForceExitStatus", [str(_REBOOT)])[-1].split()
        fine = code == 0 or str(code) in self.drop_in.get("SuccessExitStatus", [str(_REBOOT)])[-1].split()
        stopped = self.host.stop_file(self.machine).exists()
        again = not stopped and (
            forced or (not fine and self.drop_in.get("Restart", ["on-failure"])[-1] == "on-failure")
        )
        self._set("activating" if again else "inactive" if fine else "failed", 0)
        return again

    def _start(self, notify: str, groups: Cgroups | None) -> subprocess.Popen[bytes]:
        command = ["/bin/sh", "-c", nspawn_script(self.host, self.machine, self.conf)]
        return subprocess.Popen(
            command if groups is None else _entering(groups, self.machine, command),
            env={
                **self.conf,
                "PATH": os.defpath,  # what is above is this machine's
                "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                "NOTIFY_SOCKET": notify,
                "INVOCATION_ID": self.invocation,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _watch(self, process: subprocess.Popen[bytes], ready: socket.socket) -> None:
        """Keep what is printed, and hear of its readiness, until the main process ends."""
        assert process.stdout is not None
        printed, descriptor, rest = process.stdout.fileno(), os.pidfd_open(process.pid), b""
        os.set_blocking(printed, False)
        watched, ended = [printed, descriptor, ready.fileno()], False
        while not ended:
            found, _, _ = select.select(watched, [], [])
            ended = descriptor in found
            if ready.fileno() in found and b"READY=1" in ready.recv(4096):
                self._set("active", process.pid)
            if printed in found or ended:
                piece = _read(printed)
                if not piece and not ended and printed in watched:
                    watched.remove(printed)
                *lines, rest = (rest + piece).split(b"\n")
                self.journal.write(self.invocation, *(line.decode("utf-8", "replace") for line in lines))
        if rest:
            self.journal.write(self.invocation, rest.decode("utf-8", "replace"))
        os.close(descriptor)
        process.stdout.close()

    def _stop_post(self, code: int) -> None:
        environment = {
            "INVOCATION_ID": self.invocation,
            "EXIT_CODE": "exited" if code >= 0 else "killed",
            "EXIT_STATUS": str(code) if code >= 0 else signal.Signals(-code).name.removeprefix("SIG"),
        }
        for line in self.drop_in.get("ExecStopPost", []):
            words = [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]
            assert words[0].startswith("/"), "a unit has no PATH"
            subprocess.run(words, env=environment, check=False)

    def _set(self, active: str, pid: int) -> None:
        self.host.set_state(self.machine, active, pid, self.invocation)


def _groups(folder: Path, drop_in: dict[str, list[str]]) -> Cgroups | None:
    if "MemoryMax" not in drop_in:
        return None
    from hive_core.containers.bounds import Bounds
    from hive_core.containers.cgroups import Cgroups

    cpu = int(drop_in["CPUQuota"][-1].removesuffix("%"))
    return Cgroups(folder, Bounds(int(drop_in["MemoryMax"][-1]), cpu, int(drop_in["TasksMax"][-1])))


def _entering(groups: Cgroups, machine: str, command: Sequence[str]) -> list[str]:
    from hive_core.protocol.words import AgentName

    return groups.entering(AgentName(machine), command, 0)


def _read(descriptor: int) -> bytes:
    return b"".join(_pieces(descriptor))


def _pieces(descriptor: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(descriptor, 64 << 10):
            yield piece
            if len(piece) < 64 << 10:
                return
