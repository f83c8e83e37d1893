"""A stand-in NixOS host below a directory: real nix with a store of its own, real systemd-nspawn, and the rest of it.

nixos-container, systemctl and journalctl are stood in for (commands.py, unit.py). A "system" has an init that starts a
script in the place of the harness, with the rights that nix/agent/service.nix gives it. Its programs are those of this
machine.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from hive_core.containers.entering import confined
from hive_core.containers.inside import ETC, KEYS_OF_THE_HOST, PROC_OF_THE_HOST, harness_environment
from hive_core.containers.nixos_host import SHOWN, NixosHost
from hive_core.containers.seccomp import filter_program
from hive_core.protocol.words import StorePath, parse_store_path
from tests.containers.standin import guest_init
from tests.containers.standin.state import NEVER_RAN, Host
from tests.needs import ROOT

_NIX_CONFIG = "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =\nsandbox = false"
_ENVIRONMENT = {**harness_environment("/root"), "PATH": "/run/current-system/sw/bin:/usr/bin:/bin"}
_SYSTEMCTL = """#!/bin/sh
pid=$(cat /run/hive-agent.pid)
case "$*" in
  "kill --kill-whom=main --signal=TERM hive-agent.service") kill -s TERM "$pid" ;;
  "show --property=MainPID --value hive-agent.service") echo "$pid" ;;
  *) echo "there is no: $*" >&2; exit 1 ;;
esac
"""
# The host's: how a unit is, is asked all the time and answered without an interpreter; Systemctl has the rest.
_SHOW = """case "$*" in
  "show {shown} container@"*.service)
    unit=${{3#container@}}
    cat {units}/"${{unit%.service}}" 2>/dev/null || printf '%s\\n' {never_ran}
    exit ;;
esac
"""
# switch-to-configuration: activates, starts what is to be started once, and ends with 4 when a unit failed.
_SWITCH = """#!/bin/sh
system={system}
[ "$1" = test ] || exit 2
"$system/activate" || exit 2
failed=
for unit in "$system"/oneshots/*; do
  [ -e "$unit" ] || continue
  echo "starting ${{unit##*/}}"
  "$unit" || failed="$failed ${{unit##*/}}.service"
done
[ -z "$failed" ] && exit 0
echo "warning: the following units failed:$failed" >&2
exit 4
"""


def host_of(folder: Path, programs: Path | None = None) -> NixosHost:
    """Where the host below a directory keeps what it has of containers; nothing is made."""
    state = Host(folder)
    return NixosHost(
        confs=state.confs,
        roots=folder / "var/lib/nixos-containers",
        profiles=state.nix / "var/nix/profiles/per-container",
        store=state.nix / "store",
        drop_ins=state.drop_ins,
        programs=str(programs or folder / "bin"),
    )


class StandInHost:
    """
    programs  where its commands are; below its directory when it is not said
    booted    whether the machine's own systemd and journal are the host's, which is then at `/`
    """

    def __init__(self, folder: Path, programs: Path | None = None, booted: bool = False) -> None:
        self.folder = folder
        self._booted = booted
        self.state = Host(folder)
        self.state.make()
        self._programs = programs or folder / "bin"
        if not self._programs.exists():
            self._make_programs()
        self.host = host_of(folder, self._programs)

    def _make_programs(self) -> None:
        fresh = self._programs.with_name(f"bin.{os.getpid()}")
        fresh.mkdir()
        for name in ("nixos-container", *([] if self._booted else ["systemctl", "journalctl"])):
            what = "nixos-container-of-systemd" if self._booted else name
            words = [sys.executable, "-S", "-m", "tests.containers.standin.commands", str(self.folder), what]
            # nixos-container calls nix-env and nix.
            path = f"PYTHONPATH={ROOT} PATH={shlex.quote(str(self._programs))}:$PATH"
            quick = self._show() if name == "systemctl" else ""
            write_program(fresh / name, f'#!/bin/sh\n{quick}{path} exec {shlex.join(words)} "$@"\n')
        for name in ("nix", "nix-env", "nix-store"):
            words = ["bwrap", "--dev-bind", "/", "/", "--bind", str(self.state.nix), "/nix", f"/usr/bin/{name}"]
            settings = f"HOME={shlex.quote(str(self.folder))} NIX_CONFIG={shlex.quote(_NIX_CONFIG)} NIX_REMOTE="
            write_program(fresh / name, f'#!/bin/sh\n{settings} exec {shlex.join(words)} "$@"\n')
        # A host has its store long before its first container. Two commands that make it at once fail: "is busy".
        with self.state.locked("store"):
            subprocess.run([fresh / "nix-store", "--init"], check=True)
        try:
            fresh.rename(self._programs)
        except OSError:
            shutil.rmtree(fresh)

    def _show(self) -> str:
        never_ran = [f"{key}={value}" for key, value in NEVER_RAN.items()]
        units = shlex.quote(str(self.state.units))
        return _SHOW.format(shown=SHOWN, units=units, never_ran=shlex.join(never_ran))

    def system(
        self, script: str, oneshots: Mapping[str, str] | None = None, init: str = "", code: Path = ROOT
    ) -> StorePath:
        """A system whose harness is a script, in the store; the same for the same. init: another one than ours.

        code: the folder of the packages that the daemon runs, which its containers see
        """
        folder = self._programs.with_name(f"system.{os.getpid()}.{threading.get_ident()}")
        shutil.rmtree(folder, ignore_errors=True)
        files = {**system_files(script, oneshots or {}, code), **({"init": init} if init else {})}
        for name, text in files.items():
            write_program(folder / name, text)
        done = self.run("nix-store", "--add", str(self._named(folder)))
        return parse_store_path(done.strip())

    def _named(self, folder: Path) -> Path:
        named = folder.parent / f"{folder.name}.d" / "nixos-system-agent"
        shutil.rmtree(named.parent, ignore_errors=True)
        named.parent.mkdir()
        folder.rename(named)
        return named

    def run(self, *words: str) -> str:
        """What one of the host's commands printed."""
        path = f"{self._programs}:{os.environ['PATH']}"
        done = subprocess.run(words, env={"PATH": path}, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout


def system_files(script: str, oneshots: Mapping[str, str], code: Path = ROOT) -> dict[str, str]:
    """The files of a system, each of them a program; `oneshots` are units that a switch starts."""
    program = filter_program()
    # As the unit has it: ProtectKernelTunables, ReadOnlyPaths, InaccessiblePaths, in a mount namespace of its own.
    options = [word for path in (*PROC_OF_THE_HOST, ETC) for word in ("--read-only", path)]
    options += [word for path in (*KEYS_OF_THE_HOST, "/proc/kmsg") if os.path.exists(path) for word in ("--hide", path)]
    harness = ["/usr/bin/unshare", "--mount", *confined(program, _ENVIRONMENT, *options), "/bin/sh", "-c", script]
    harness = [word.replace(f"{ROOT}/hive_core", f"{code}/hive_core") for word in harness]
    source = Path(guest_init.__file__).read_text().replace("HARNESS: list[str] = []", f"HARNESS = {harness!r}")
    activate = (
        '#!/bin/sh\nsystem=$(dirname "$(readlink -f "$0")")\nln -sfn "$system" /run/current-system\n'
        "echo made-by-activation > /etc/hostname\n"
    )
    return {
        "init": f"#!{sys.executable} -IS\n{source}",
        "activate": activate,
        "bin/switch-to-configuration": _SWITCH.format(system='$(dirname "$(dirname "$(readlink -f "$0")")")'),
        "sw/bin/systemctl": _SYSTEMCTL,
        **{f"oneshots/{name}": f"#!/bin/sh\n{text}\n" for name, text in oneshots.items()},
    }


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
