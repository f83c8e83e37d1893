"""A machine that booted systemd, made of this one: its /usr read-only over an empty root, in systemd-nspawn.

It starts in seconds and nothing is downloaded. hyperhive lies in /opt/hive, run by an interpreter like ours, and its
unit is the one of nix/systemd.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hive_core.containers.cgroups import mounted_trees
from hive_core.containers.seccomp import LANDLOCK
from tests.needs import ROOT
from tests.nix_pages import DROP_IN, HELPER_UNIT, UNIT
from tests.processes import children_of, look_until

SOURCE, VENV, LIBRARIES, PYTHON = "/opt/hive/source", "/opt/hive/venv", "/opt/hive/libraries", "/opt/python"
PACKAGES = ("hive_core", "hive_agent", "hive_mind", "dashboard")
WITHIN_S = 60


class BootedHost:
    """The machine, entered as root by its first process."""

    def __init__(self, first: int, own_memory: bool) -> None:
        self._own_memory = own_memory  # whether it has a group of its own in a tree for memory alone
        self.holds_memory = False  # whether its systemd holds units to their MemoryMax=
        self._enter = ["nsenter", "--target", str(first), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]

    def entering(self, user: str = "") -> list[str]:
        """What a command of this machine's is given to, to run in there as root, USER or USER:GROUP."""
        name, _, group = user.partition(":")
        become = ["setpriv", f"--reuid={name}", f"--regid={group or name}", "--init-groups"] if user else []
        return [*self._enter, *become]

    def run(self, *command: str, user: str = "", given: str = "") -> subprocess.CompletedProcess[str]:
        """A command in there, as root or a user, with `given` on its stdin."""
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "LANG": "C.UTF-8"}
        return subprocess.run(
            [*self.entering(user), *command],
            input=given,
            env=environment,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )

    def ok(self, *command: str, user: str = "", given: str = "") -> str:
        done = self.run(*command, user=user, given=given)
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        self.ok("sh", "-c", 'mkdir -p "$(dirname "$1")" && cat > "$1"', "sh", path, given=text)

    def install(self, config: str, drop_in: str) -> None:
        """The unit, its user and group, a configuration, and two people of whom one may command the daemon."""
        people = 'u ada - "ada"\nu eve - "eve"\nm ada hive-admin\n'
        self.write("/etc/sysusers.d/hyperhive.conf", (UNIT.parent / "hyperhive.sysusers.conf").read_text() + people)
        self.write("/etc/systemd/system/hyperhive.service", UNIT.read_text())
        self.write("/etc/systemd/system/hyperhive.service.d/test.conf", drop_in)
        self.write("/etc/hyperhive/config.toml", config)
        self.ok("systemd-sysusers")
        self.ok("systemctl", "daemon-reload")

    def install_helper(self) -> None:
        """The helper's unit too, and what the daemon's has besides then."""
        self.write("/etc/systemd/system/hyperhive-root.service", HELPER_UNIT.read_text())
        self.write("/etc/systemd/system/hyperhive.service.d/helper.conf", DROP_IN.read_text())
        self.ok("systemctl", "daemon-reload")

    def hold_memory(self) -> None:
        """Have its systemd hold units to their MemoryMax=, where this machine has a control group for that.

        systemd-nspawn gives the tree of memory (v1) read-only, and systemd looks at what it has when it begins.
        """
        if self._own_memory:
            self.ok("mount", "-o", "remount,bind,rw", "/sys/fs/cgroup/memory")
            self.ok("systemctl", "daemon-reexec")
        one = self.run("grep", "-qw", "memory", "/sys/fs/cgroup/cgroup.controllers")
        self.holds_memory = self._own_memory or one.returncode == 0

    def remove_helper(self) -> None:
        """As a system does that goes without it from now on: its unit is ended and is no more."""
        self.ok("systemctl", "stop", "hyperhive-root.service")
        self.ok("rm", "/etc/systemd/system/hyperhive-root.service")
        self.ok("rm", "/etc/systemd/system/hyperhive.service.d/helper.conf")
        self.ok("systemctl", "daemon-reload")


@contextmanager
def booted_host(folder: Path, *more: str) -> Iterator[BootedHost]:
    """`folder` holds what is ours of it; `more` are packages beside our own that it has."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # The system's own where it is like ours: another's libpython may be looked for where it was built.
    base = "/usr" if Path(f"/usr/bin/python{version}").exists() else os.path.realpath(sys.base_prefix)
    binds = [f"--bind-ro={ROOT / package}:{SOURCE}/{package}" for package in (*PACKAGES, *more)]
    if base != "/usr":
        binds.append(f"--bind-ro={base}:{PYTHON}")
    _write_environment(folder, base if base == "/usr" else PYTHON)
    # Linked, for an agent can be given no mount below another with its own uids.
    site = folder / "venv" / "lib" / f"python{version}" / "site-packages"
    site.parent.mkdir(parents=True)
    site.symlink_to(LIBRARIES)
    binds += [f"--bind-ro={folder}/venv:{VENV}", f"--bind-ro={folder}/bin:/usr/local/bin"]
    binds.append(f"--bind-ro={os.path.realpath(sysconfig.get_paths()['purelib'])}:{LIBRARIES}")
    options = ["--quiet", "--register=no", "--keep-unit", "--boot", "--directory=/", "--volatile=yes"]
    options += ["--private-network", "--capability=all", "--machine=hive-test"]
    # Nobody answers what a first boot asks, and this machine's own services stay off.
    command = ["systemd-nspawn", *options, *LANDLOCK, *binds, "systemd.firstboot=off", "systemd.unit=basic.target"]
    with _own_groups() as entries, (folder / "console").open("wb") as console:
        enter = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit; shift; done; shift; exec "$@"'
        words = ["/bin/sh", "-c", enter, "sh", *map(str, entries), "--", *command]
        nspawn = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            memory = mounted_trees().get("memory")
            own_memory = any(memory in entry.parents for entry in entries)
            yield look_until(lambda: _find(nspawn.pid, own_memory))
        finally:
            nspawn.terminate()
            try:
                nspawn.wait(WITHIN_S)
            except subprocess.TimeoutExpired:  # it powers off in peace, which a busy machine may not come to
                nspawn.kill()
                nspawn.wait()


@contextmanager
def _own_groups() -> Iterator[list[Path]]:
    """The files by which a machine enters control groups of its own, in each tree in which its systemd makes some, or
    can be had to (`hold_memory`).

    Two machines in one group would each take the other's units of the same name for their own: kill what is in them,
    and wait for it.
    """
    mounted, groups = mounted_trees(), []
    name = f"hive-test-{os.getpid()}-{time.monotonic_ns()}"  # one for both: systemd takes them for the same group
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kind, path = line.split(":", 2)
        if kind in ("", "name=systemd", "memory") and kind in mounted:
            own = mounted[kind] / path.lstrip("/")
            own = own if own.is_dir() else mounted[kind]
            groups += [own / name] if kind != "memory" or os.access(own, os.W_OK) else []
    try:
        for group in groups:
            group.mkdir()
        yield [group / "cgroup.procs" for group in groups]
    finally:
        for group in groups:
            look_until(partial(_remove, group))


def _remove(group: Path) -> bool:
    """Whether it could be removed: what has just ended may be in there for a moment yet."""
    for each in (*sorted(group.rglob("*/"), reverse=True), group):
        with contextlib.suppress(OSError):
            each.rmdir()
    return not group.exists()


def _find(nspawn: int, own_memory: bool) -> BootedHost | None:
    """The machine once it is up. In its first moments the child of nspawn is another than in the end."""
    for child in children_of(nspawn):
        host = BootedHost(child, own_memory)
        if host.run("systemctl", "is-active", "basic.target").returncode == 0:
            return host
    return None


def _write_environment(folder: Path, base: str) -> None:
    """A virtual environment for the place where it is going to be, and our commands."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for place in ("venv/bin", "bin"):
        (folder / place).mkdir(parents=True)
    (folder / "venv/bin/python").symlink_to(f"{base}/bin/python{version}")
    (folder / "venv/pyvenv.cfg").write_text(f"home = {base}/bin\ninclude-system-site-packages = false\n")
    modules = {"hive-core": "hive_core.daemon_cli", "hive": "hive_core.cli", "hive-root": "hive_core.helper.cli"}
    for name, module in modules.items():
        script = folder / "bin" / name
        lines = [f"#!{VENV}/bin/python -P", "import sys", f"sys.path.insert(0, {SOURCE!r})"]
        script.write_text("\n".join([*lines, f"from {module} import main", "sys.exit(main())", ""]))
        script.chmod(0o755)
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)
