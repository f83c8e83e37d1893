"""The nspawn driver: an agent is a harness in a systemd-nspawn container over the host's own /usr, which is read-only.

An agent has a range of uids of its own, in which its root is nobody on the host. Its directories are mounted with
rootidmap: what its root makes there belongs to the daemon's user. Where the kernel or a file system cannot do that,
the container has the host's uids without any of their rights, as a bubblewrap sandbox of a root daemon has.

The wrapper outside is a shell that waits for systemd-nspawn and writes its exit code into the status file. systemd
closes every descriptor before it runs what is inside, so nothing in there has the lock. What runs inside first is
confined.py: it takes away what nspawn cannot leave out, and then its own rights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hive_core.containers.bounds import AgentGroups
from hive_core.containers.entering import confined
from hive_core.containers.host_names import host_name
from hive_core.containers.host_process import HostProcessDriver, Launch
from hive_core.containers.inside import (
    ETC,
    ETC_FILES,
    HOME,
    KEYS_OF_THE_HOST,
    NETWORK_FILES,
    OUR_PASSWD,
    PASSWD,
    PROC_OF_THE_HOST,
    SYSTEM_PATHS,
    harness_environment,
    is_below,
    links_of,
    program_paths,
)
from hive_core.containers.mounts import STATE, AgentDirs, agent_dirs
from hive_core.containers.process_tree import kill_that_see
from hive_core.containers.running import RunningProcess
from hive_core.containers.seccomp import LANDLOCK, filter_program
from hive_core.containers.status_file import end_holders
from hive_core.protocol.words import AgentName

UIDS = 65536  # of one agent
LIFE_FD = 3  # inside
HOST_UIDS = "nspawn-host-uids"  # the name of a container without uids of its own
# It says so at each end where /run is no tmpfs, and all is well.
_OF_NO_AGENT = "Attempted to remove disk file system under"
_PROBE_PATIENCE_S = 20.0
_PROBE = AgentName("probe")
PROBE_UID = 0x6FFF0000  # the last of the range that systemd keeps for containers; no agent gets it
# What systemd-nspawn puts into a container and an agent has no use for: all of it tells of the host, or is its.
_EMPTIED = ("/sys", "/run/host", "/dev/net")


def nspawn_command(machine: str, dirs: AgentDirs, claude: Path | None, base: int | None, root: Path) -> list[str]:
    """systemd-nspawn with its options, to be followed by what runs inside.

    machine: the container's name among all of the host.
    base: the first of the agent's own uids; None gives it the host's, without their rights.
    """
    mapping = "" if base is None else ":rootidmap"
    argv = [shutil.which("systemd-nspawn") or "systemd-nspawn", "--quiet", "--settings=no", "--register=no"]
    argv += ["--keep-unit", f"--directory={root}", "--volatile=yes", f"--machine={machine}", "--hostname=hive"]
    argv += [f"--private-users={'identity' if base is None else f'{base}:{UIDS}'}"]
    argv += ["--private-network"] if dirs.network == "private" else list(LANDLOCK)
    argv += ["--private-users-ownership=off", "--console=pipe", "--link-journal=no", "--timezone=off"]
    argv += ["--resolv-conf=off", "--no-new-privileges=yes", f"--tmpfs={HOME}:mode=0700", "--tmpfs=/var/tmp:mode=1777"]
    argv += [f"--bind-ro={_escaped(OUR_PASSWD)}:{PASSWD}"]
    for path in (*ETC_FILES, *(NETWORK_FILES if dirs.network == "host" else ())):
        argv += [f"--bind-ro={path}"] if os.path.exists(path) else []
    for path in _system_outside_usr():
        argv += [f"--bind-ro={path}"]
    for path in sorted(program_paths(claude)):
        argv += [f"--bind-ro={_escaped(path)}:{_escaped(path)}{mapping}"]
    for mount in dirs.mounts:
        option = "--bind-ro" if mount.read_only else "--bind"
        argv += [f"{option}={_escaped(mount.source)}:{mount.target}{'' if mount.mapped else mapping}"]
    return [*argv, "--"]


def _system_outside_usr() -> Iterator[str]:
    """Directories that a program needs and that are no links into /usr."""
    for path in SYSTEM_PATHS:
        if path != "/usr" and os.path.isdir(path) and not os.path.islink(path):
            yield path


def _escaped(path: str | Path) -> str:
    return str(path).replace("\\", "\\\\").replace(":", "\\:")


def inside_options(claude: Path | None) -> list[str]:
    """What confined.py takes away in a container of systemd-nspawn's."""
    options = ["--output-of-stdout", "--no-namespaces"]
    for path in _EMPTIED:
        options += ["--empty", path]
    for path in PROC_OF_THE_HOST:
        options += ["--read-only", path]
    for path in (*KEYS_OF_THE_HOST, "/proc/kmsg"):
        options += ["--hide", path] if os.path.exists(path) else []
    bound = {*SYSTEM_PATHS, *program_paths(claude)}
    for path, target in links_of(sys.executable):
        if not is_below(path, bound):
            options += ["--link", path, target]
    return [*options, "--read-only", ETC, "--read-only", "/", "--chdir", STATE]


class NspawnDriver(HostProcessDriver):
    """Starts harnesses with systemd-nspawn.

    base_of: the first uid of an agent's own range, the same for ever.
    own_uids: whether agents have uids of their own; `nspawn_trouble` finds out where they can.
    root: the root directory whose /usr agents see.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        base_of: Callable[[AgentName], Awaitable[int]],
        own_uids: bool = True,
        root: Path = Path("/"),
        claude: Path | None,
        orphan_grace_s: float,
        life_fd: int | None = None,
        cgroups: AgentGroups | None = None,
    ) -> None:
        super().__init__(state_dir, claude=claude, orphan_grace_s=orphan_grace_s, life_fd=life_fd, cgroups=cgroups)
        self.sandbox = "nspawn" if own_uids else HOST_UIDS
        self._base_of = base_of
        self._root = root
        self._bases: dict[AgentName, int] = {}

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        return f"{await super().generation(name, dirs)} {self._root}"

    @property
    def life_fd_inside(self) -> int | None:
        return None if self._life_fd is None else LIFE_FD

    async def start(self, name: AgentName, dirs: AgentDirs) -> RunningProcess:
        self._bases[name] = await self._base_of(name)
        return await super().start(name, dirs)

    def _launch(self, name: AgentName, dirs: AgentDirs, status_fd: int, opened: contextlib.ExitStack) -> Launch:
        command, kept = self._container(name, dirs, opened)
        options = inside_options(self._claude_of(name))
        command += confined(self._filter, harness_environment(HOME), *options, flags=["-P"])
        command += self._command(name, dirs)
        own_words = opened.enter_context(self._file(name, "nspawn").open("wb"))
        return Launch(
            self._waiting(name, command),
            _environment(),
            kept,
            stdin_fd=self._life_fd,
            error_fd=own_words.fileno(),
        )

    def _container(self, name: AgentName, dirs: AgentDirs, opened: contextlib.ExitStack) -> tuple[list[str], list[int]]:
        """systemd-nspawn's command, and the descriptors it is given; `opened` closes them here."""
        base = self._bases[name] if self.sandbox == "nspawn" else None
        return nspawn_command(host_name(name, self._files.parent), dirs, self._claude_of(name), base, self._root), []

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        words = [await super().last_words(name, limit)]
        with contextlib.suppress(OSError):
            said = self._file(name, "nspawn").read_text("utf-8", "replace")
            words += [line for line in said.splitlines() if not line.startswith(_OF_NO_AGENT)]
        return "\n".join(words).strip()[-limit:]

    def _end_left(self, name: AgentName) -> None:
        # systemd-nspawn that is killed leaves all that is inside.
        end_holders(self._file(name, "status"))
        if (state := self._state_id(name)) is not None:
            kill_that_see(state, STATE)

    def _entering(self, dirs: AgentDirs, first: int) -> list[str]:
        options = ("--enter", str(first), "--chdir", STATE)
        return confined(self._filter, harness_environment(HOME), *options)


@dataclass(frozen=True, slots=True)
class Found:
    """What containers of systemd-nspawn's can be here."""

    trouble: str | None = None  # why there are none, and what would mend it
    weakness: str | None = None  # why agents get no uids of their own, and what would mend it


def look_for_nspawn(state_dir: Path, runtime_dir: Path, claude: Path | None, root: Path = Path("/")) -> Found:
    """Whether systemd-nspawn works here, found by running it on directories beside the agents'."""
    if os.geteuid() != 0:
        return Found("systemd-nspawn needs root: run the daemon as root, or set sandbox to bwrap")
    if shutil.which("systemd-nspawn") is None:
        fix = "`apt-get install systemd-container` (or your system's equivalent)"
        return Found(f"systemd-nspawn is not installed: {fix}")
    if (reason := _try(state_dir, runtime_dir, claude, root, PROBE_UID)) is None:
        return Found()
    if (second := _try(state_dir, runtime_dir, claude, root, None)) is None:
        fix = "mount the state and runtime directories from ext4, xfs, btrfs or (from Linux 6.3 on) tmpfs"
        return Found(weakness=f"agents have no uids of their own ({reason}); {fix}")
    return Found(f"systemd-nspawn does not work here ({second}); set sandbox to bwrap")


def _try(state_dir: Path, runtime_dir: Path, claude: Path | None, root: Path, base: int | None) -> str | None:
    """Why a container could not be had, or None."""
    with contextlib.ExitStack() as opened:
        state, run = (
            Path(opened.enter_context(tempfile.TemporaryDirectory(prefix=".hive-", dir=_existing(folder))))
            for folder in (state_dir, runtime_dir)
        )
        dirs = agent_dirs(state, run, _PROBE)
        dirs.make()
        command = nspawn_command(f"hive-probe-{os.getpid()}", dirs, claude, base, root)
        command += confined(filter_program(), harness_environment(HOME), *inside_options(claude))
        command += ["/bin/sh", "-c", "ls /run/hive && echo works > /state/probe"]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                env=_environment(),
                timeout=_PROBE_PATIENCE_S,
            )
        except subprocess.TimeoutExpired:
            return f"it did not end within {_PROBE_PATIENCE_S:.0f} s"
        if done.returncode == 0 and (dirs.state / "probe").exists():
            return None
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith(_OF_NO_AGENT)]
        return said[-1].strip()[:300] if said else "no reason given"


def _environment() -> dict[str, str]:
    """systemd-nspawn's own: with the daemon's NOTIFY_SOCKET it would tell systemd that the daemon is ready."""
    return {"PATH": os.environ.get("PATH", os.defpath)}


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())
