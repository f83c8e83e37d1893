"""A real daemon whose agents are NixOS containers of a stand-in host: real nix and git, real systemd-nspawn, and in
each container the harness that is shipped, which its system starts.

A system that has a package `mute` has a harness that looks for its daemon where none is.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path

from hive_core.cli.client import Client
from hive_core.protocol.container_id import container_id
from hive_core.protocol.words import AgentName
from tests.checkouts import Checkout
from tests.containers.drivers import end_processes
from tests.containers.standin.host import StandInHost
from tests.containers.standin.state import parse_settings
from tests.control_groups import remove_groups
from tests.daemons import Daemon, open_daemon
from tests.dying import Place, let_die, packages
from tests.hives import clean_environment
from tests.needs import ROOT
from tests.nixes import make_sources
from tests.processes import pids_naming
from tests.small_disks import small_disk

IRIS = AgentName("iris")

_HARNESS = """
[ "$(uname -n)" = hm1nd ] && program=hive_mind || program=hive_agent
cd / && PYTHONPATH={code} exec {python} -P -m $program serve --run {run} --sandbox nixos-container
"""
_TOPLEVEL = """
case " $path " in
  *-mute\\ *) system={mute} ;;
  *) system={good} ;;
esac
/usr/bin/cp -r "$system" "$out"
"""
# What no configuration says: where such a host has its containers, and nix its store.
_HOST = "\nNixosHost.__init__.__defaults__ = (*map(Path, {folders!r}), {programs!r})\n"
_STORE = "\nimport functools\nNix = functools.partial(Nix, store=Path({store!r}))\n"


class NixosHive:
    """
    host  where the containers are
    code  what the daemon runs
    """

    def __init__(self, daemon: Daemon, host: StandInHost, code: Path, sources: Path) -> None:
        self.daemon = daemon
        self.host = host
        self._settings = _settings(host, code, sources)

    def start(self, **environment: str) -> Client:
        """Start the daemon, or start it again; the operator."""
        return self.daemon.start(**self._settings, **environment)

    @property
    def iris(self) -> Checkout:
        """Her proposed repository."""
        return Checkout(self.daemon.state / "proposed" / "iris" / "config")

    def git(self, repository: str, *words: str) -> str:
        """What git says of a repository of the daemon's."""
        command = ["git", "-C", str(self.daemon.state / repository), *words]
        return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout

    def system(self) -> str:
        """The system of iris, as the host has it, the hive's rows, and what runs: one."""
        machine, name = container_id(IRIS), str(IRIS)
        profile = self.host.host.profiles / machine / "system"
        with closing(sqlite3.connect(f"file:{self.daemon.state / 'hive.sqlite'}?mode=ro", uri=True)) as db:
            ((row,),) = db.execute("SELECT path FROM systems WHERE agent = ?", (name,)).fetchall()
        conf = parse_settings(self.host.state.conf_file(machine))
        found = {row, conf["SYSTEM_PATH"], os.readlink(profile.parent / os.readlink(profile)), *self._running(machine)}
        (system,) = found
        return str(system)

    def _running(self, machine: str) -> Iterator[str]:
        """The system of each container of a machine that runs, as systemd-nspawn was told."""
        for pid in pids_naming(str(self.host.host.roots / machine)):
            with suppress(OSError):
                program, *_, init = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
                if program == "systemd-nspawn":
                    yield init.removesuffix("/init")


def package(name: str, script: str = ": > $out") -> str:
    """A package as Nix has it, which a script builds."""
    words = f'builder = "/bin/sh"; args = [ "-c" "{script}" ];'
    return f'(derivation {{ name = "{name}"; system = "x86_64-linux"; {words} }})'


@contextmanager
def open_nixos_hive(*flags: str, dies: Sequence[Place] = (), disk: str = "160m") -> Iterator[NixosHive]:
    """A hive that is not started yet, with all that it has and its host on a disk of that size. Its daemon dies at
    these places when it is told to."""
    with open_daemon("--default-program=rehearsal", "--sandbox=nixos-container", *flags) as daemon:
        code, sources = let_die(packages(daemon.folder / "code"), dies), make_sources(daemon.folder / "source")
        with small_disk(daemon.state, disk):
            try:
                yield NixosHive(daemon, StandInHost(daemon.state / "host"), code, sources)
            finally:
                if daemon.process.poll() is None:
                    daemon.kill()
                end_processes(daemon.folder)
                remove_groups(daemon.state / "host")


def _settings(host: StandInHost, code: Path, sources: Path) -> dict[str, str]:
    """Let the daemon of these packages have that host; what it has to be told besides."""
    nixpkgs = code.with_name("nixpkgs")
    shutil.copytree(ROOT / "tests" / "nix" / "standin", nixpkgs)
    systems = {
        kind: host.system(_HARNESS.format(code=code, python=sys.executable, run=run), code=code)
        for kind, run in (("good", "/run/hive"), ("mute", "/state/nowhere"))
    }
    (nixpkgs / "toplevel.sh").write_text(_TOPLEVEL.format(**systems))
    *folders, programs = (getattr(host.host, field.name) for field in fields(host.host))
    with (code / "hive_core/containers/nixos_host.py").open("a") as file:
        file.write(_HOST.format(folders=list(map(str, folders)), programs=programs))
    with (code / "hive_core/flakes/building.py").open("a") as file:
        file.write(_STORE.format(store=str(host.folder)))
    return {"PYTHONPATH": str(code), "HIVE_NIXPKGS": str(nixpkgs), "HIVE_HYPERHIVE_SOURCE": str(sources)}
