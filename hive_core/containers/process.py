"""The process driver: an agent is a harness in a bubblewrap sandbox, all namespaces unshared, the network too.

The sandbox has a pid namespace of its own, so ending its first process ends the whole agent. bwrap's own
--die-with-parent is not used: it watches the *thread* that forked it. An agent that must end with the daemon watches
a pipe instead; one that may outlive it is found again by the pid and start time in its process file, and its exit
code is in bwrap's status file even when nobody watched.

The status file is locked before an agent is started, and the agent holds that lock by the descriptor it was started
with. So there is never a second copy, and one whose daemon was killed before it could write the process file is found
as the process that holds the lock. The holder is bwrap outside the sandbox: nothing inside has the descriptor.

Before an agent is started its run file says which run directory it is given: one that has another than the daemon of
later would wait for ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from hive_core.containers import printed
from hive_core.containers.keyring import leave_session_keyring
from hive_core.containers.printed import LOG_LIMIT_BYTES
from hive_core.containers.seccomp import filter_program
from hive_core.protocol.words import MANAGER, AgentName

__all__ = ["LOG_LIMIT_BYTES", "AgentDirs", "Exit", "ProcessDriver", "Running", "sandbox_trouble"]

log = logging.getLogger(__name__)

# What a program needs of the host to run, read-only, where it exists.
_SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/run/current-system/sw")
# Settings of the whole kernel, which go by the uid alone: under a root daemon the sandbox's 0 is the host's.
_PROC_OF_THE_HOST = tuple(
    f"/proc/{name}"
    for name in ("sys", "sysrq-trigger", "irq", "bus", "acpi", "fs", "scsi", "pressure", "driver", "mtrr")
)
# The host's keys, told to whoever has the same uid.
_KEYS_OF_THE_HOST = ("/proc/keys", "/proc/key-users")
_ETC_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl/certs", "/etc/localtime")
_HOME = "/root"
_PACKAGES = ("hive_core", "hive_agent", "hive_mind")
_KILL_ROUNDS = 100  # each ends what was born during the one before: two are enough, but for who forks all the time
_KILL_PATIENCE_S = 5.0  # a process can be past killing for a while
_LOG_PATIENCE_S = 1.0  # what an agent left behind may print on: its exit is told all the same


@dataclass(frozen=True, slots=True)
class AgentDirs:
    """The host's directories of one agent; they are all of the host that it can write."""

    run: Path  # → /run/hive: its sockets
    state: Path  # → /state: durable notes
    claude: Path  # → ~/.claude: sessions of the program
    proposed: Path | None  # → /agents: everybody's configuration, for the manager alone


@dataclass(frozen=True, slots=True)
class Exit:
    code: int | None  # None: it was ended from outside and left no code


class Running:
    """An agent that runs, whether this daemon started it or an earlier one."""

    def __init__(
        self,
        pid: int,
        process: subprocess.Popen[bytes] | None,
        status: Path,
        state: Path,
        keeper: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self.pid = pid
        self._process = process
        self._keeper = keeper
        self._status = status
        self._state = state
        self._pidfd = os.pidfd_open(pid)
        self._ended = False

    async def wait(self) -> Exit:
        """Return when it has ended and what it printed is kept. Cancelling it changes nothing."""
        if not self._ended:
            await trio.lowlevel.wait_readable(self._pidfd)
            if self._process is not None:
                self._process.wait()
            self._close()
        with trio.move_on_after(_LOG_PATIENCE_S):
            while self._is_printing():  # noqa: ASYNC110 - another process's end, a few ms away
                await trio.sleep(0.002)
        code = _status_value(self._status, "exit-code")
        return Exit(code if code is not None or self._process is None else self._process.returncode)

    def end(self) -> None:
        """End it and return when it is gone; for one that is in nobody's care."""
        self.kill()
        select.select([self._pidfd], [], [], _KILL_PATIENCE_S)
        self._close()

    def kill(self) -> None:
        """End the whole agent at once, also what has a session of its own; nothing when it has ended."""
        if self._ended:
            return
        try:
            # Stopped first: it is the reaper of its orphans, so all that comes from it stays below it meanwhile, and
            # bwrap's child is found in the moment of its birth.
            signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
        except ProcessLookupError:
            return
        _wait_stopped(self.pid)
        _kill_descendants(self.pid)
        # As long as it has not ended its pid is its own, and so is the group of that number.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            os.close(self._pidfd)
        _end_inside(self._status, self._state)

    def _is_printing(self) -> bool:
        if self._keeper is not None:
            return self._keeper.poll() is None
        return _is_locked(self._status.with_suffix(".log"))


class ProcessDriver:
    """Starts harnesses with bwrap, or bare where `sandbox` is "none" and somebody chose that.

    life_fd: the read end of a pipe whose write end only this daemon holds; None lets agents outlive it.
    """

    def __init__(
        self, state_dir: Path, *, sandbox: str, claude: Path | None, orphan_grace_s: float, life_fd: int | None
    ) -> None:
        self._logs = state_dir / "processes"
        self._sandbox = sandbox
        self._claude = claude
        self._orphan_grace_s = orphan_grace_s
        self._life_fd = life_fd
        self._filter = filter_program()
        if sandbox == "bwrap" and self._filter is None:
            log.warning("there is no filter of system calls for this processor: agents can make all of them")

    @property
    def sandbox(self) -> str:
        return self._sandbox

    async def start(self, name: AgentName, dirs: AgentDirs) -> Running:
        """Start the agent's harness. Raises OSError when the program cannot be run, or the agent runs already."""
        self._logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (dirs.state, dirs.claude):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = self._logs / f"{name}.status"
        with status.open("ab", buffering=0) as status_file:
            _claim(status_file)
            (self._logs / f"{name}.run").write_text(json.dumps({"run": str(dirs.run), "id": _folder_id(dirs.run)}))
            process, keeper = await trio.to_thread.run_sync(self._start, name, dirs, status_file.fileno())
        running = Running(process.pid, process, status, dirs.state, keeper)
        try:
            self._remember(name, process.pid)
        except BaseException:
            # Whoever asked is told that it does not run.
            running.kill()
            with trio.CancelScope(shield=True):
                await running.wait()
            raise
        return running

    def _start(
        self, name: AgentName, dirs: AgentDirs, status_fd: int
    ) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        """Start the harness, and before it what keeps its prints; in a thread of its own for the keyring's sake."""
        leave_session_keyring()
        output, keeper = _start_keeper(self._logs / f"{name}.log")
        try:
            with output:
                return self._start_harness(name, dirs, status_fd, output.fileno()), keeper
        except BaseException:
            keeper.wait()  # nobody prints: it ends
            raise

    def _start_harness(
        self, name: AgentName, dirs: AgentDirs, status_fd: int, output_fd: int
    ) -> subprocess.Popen[bytes]:
        command = self._command(name, dirs)
        with contextlib.ExitStack() as opened:
            keep = [status_fd]
            keep += [self._life_fd] if self._life_fd is not None else []
            if self._sandbox == "bwrap":
                filter_fd = opened.enter_context(_in_memory(self._filter)).fileno() if self._filter else None
                keep += [filter_fd] if filter_fd is not None else []
                command = [*self._bwrap(dirs, status_fd, filter_fd), *command]
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output_fd,
                stderr=output_fd,
                env=self._environment(dirs),
                cwd="/",
                pass_fds=keep,
                start_new_session=True,
            )

    def _remember(self, name: AgentName, pid: int) -> None:
        identity = {"pid": pid, "started": _start_time(pid), "boot": _boot_id()}
        fresh = self._logs / f".{name}.json"
        fresh.write_text(json.dumps(identity))
        fresh.rename(self._logs / f"{name}.json")

    def find(self, name: AgentName, dirs: AgentDirs) -> Running | None:
        """The agent that an earlier daemon left running, or None.

        One that was given another run directory can never reach us: it is ended, and counts as not running.
        """
        status = self._logs / f"{name}.status"
        pid = self._remembered(name)
        if pid is None and (pid := _lock_holder(status)) is not None:
            # What could not be written makes it no less ours: the next daemon finds it by the lock again.
            with contextlib.suppress(OSError):
                self._remember(name, pid)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                running = Running(pid, None, status, dirs.state)
                if (given := _other_run_dir(self._logs / f"{name}.run", dirs.run)) is None:
                    return running
                log.warning(
                    "ended %s (pid %d): it was started with its sockets in %s, and this daemon has them in %s",
                    name,
                    pid,
                    given,
                    dirs.run,
                    extra={"agent": name},
                )
                running.end()
                self.forget(name)
        _end_inside(status, dirs.state)
        return None

    def _remembered(self, name: AgentName) -> int | None:
        """The pid in the process file, when it still is the agent's."""
        try:
            identity = json.loads((self._logs / f"{name}.json").read_text())
            pid = int(identity["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        started = _start_time(pid)
        if started is None or (started, _boot_id()) != (identity.get("started"), identity.get("boot")):
            return None
        return pid

    def missed_exit(self, name: AgentName) -> Exit | None:
        """How the agent ended while no daemon watched, told once; None when there is nothing to tell."""
        identity = self._logs / f"{name}.json"
        if not identity.exists():
            return None
        identity.unlink()
        return Exit(_status_value(self._logs / f"{name}.status", "exit-code"))

    def forget(self, name: AgentName) -> None:
        """The end of the agent was seen and told."""
        (self._logs / f"{name}.json").unlink(missing_ok=True)

    def last_words(self, name: AgentName, limit: int = 600) -> str:
        """The end of what the harness printed, for whoever asks why it ended."""
        try:
            with (self._logs / f"{name}.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - limit))
                return log.read(limit).decode("utf-8", "replace").strip()
        except OSError:
            return ""

    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        inside = self._sandbox == "bwrap"
        module = "hive_mind.cli" if name == MANAGER else "hive_agent.cli"
        command = [sys.executable, "-P", "-m", module, "serve"]
        command += ["--run", "/run/hive" if inside else str(dirs.run)]
        command += ["--state", "/state" if inside else str(dirs.state)]
        if dirs.proposed is not None:
            command += ["--configs", "/agents" if inside else str(dirs.proposed)]
        if not inside:
            command += ["--claude-dir", str(dirs.claude)]
        command += ["--sandbox", self._sandbox, "--orphan-grace", str(self._orphan_grace_s)]
        if self._claude is not None:
            command += ["--claude", str(self._claude)]
        if self._life_fd is not None:
            command += ["--life-fd", str(self._life_fd)]
        return command

    def _environment(self, dirs: AgentDirs) -> dict[str, str]:
        """The harness's environment, built from nothing."""
        path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"))
        environment = {"PATH": path, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(_package_parents())}
        environment["HOME"] = _HOME if self._sandbox == "bwrap" else str(dirs.state)
        return environment

    def _bwrap(self, dirs: AgentDirs, status_fd: int, filter_fd: int | None) -> list[str]:
        # Found on the daemon's own PATH, as sandbox_trouble does: the harness's is built from nothing.
        bwrap = shutil.which("bwrap") or "bwrap"
        argv = [bwrap, "--unshare-all", "--unshare-user", "--uid", "0", "--gid", "0", "--hostname", "hive"]
        argv += ["--disable-userns", "--cap-drop", "ALL", "--new-session", "--json-status-fd", str(status_fd)]
        argv += ["--seccomp", str(filter_fd)] if filter_fd is not None else []
        # The harness is process 1: when it ends, the kernel ends everything else in its pid namespace.
        argv += ["--as-pid-1", "--tmpfs", "/", "--proc", "/proc"]
        for path in _PROC_OF_THE_HOST:
            argv += ["--ro-bind-try", path, path]
        for path in _KEYS_OF_THE_HOST:
            argv += ["--ro-bind", "/dev/null", path] if os.path.exists(path) else []
        argv += ["--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", _HOME]
        for path in _SYSTEM_PATHS:
            # A link (/bin → usr/bin) stays a link; a directory is bound.
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                argv += ["--ro-bind", path, path]
        for path in _ETC_FILES:
            argv += ["--ro-bind-try", path, path]
        bound = self._program_paths()
        for path in sorted(bound):
            argv += ["--ro-bind", path, path]
        for path, target in _links_of(sys.executable):
            if not _is_below(path, {*_SYSTEM_PATHS, *bound}):
                argv += ["--symlink", target, path]
        # Its sockets can be connected to, not replaced.
        argv += ["--ro-bind", str(dirs.run), "/run/hive", "--bind", str(dirs.state), "/state"]
        argv += ["--bind", str(dirs.claude), f"{_HOME}/.claude"]
        if dirs.proposed is not None:
            argv += ["--bind", str(dirs.proposed), "/agents"]
        return [*argv, "--chdir", "/state", "--"]

    def _program_paths(self) -> set[str]:
        """The interpreter, the libraries and our own packages, where they are not part of the system already."""
        paths = {sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], os.path.realpath(sys.executable)}
        paths |= {os.path.join(parent, package) for parent in _package_parents() for package in _PACKAGES}
        if self._claude is not None:
            paths |= {str(self._claude), os.path.realpath(self._claude)}
        outside = {path for path in paths if not _is_below(path, _SYSTEM_PATHS) and os.path.exists(path)}
        return {path for path in outside if not _is_below(path, outside - {path})}


def _package_parents() -> list[str]:
    """The folder our packages are imported from: site-packages, or the checkout."""
    return [str(Path(__file__).resolve().parents[2])]


def _links_of(path: str) -> list[tuple[str, str]]:
    """Every link on the way from a path to its file: (where it stands, what it says)."""
    links: list[tuple[str, str]] = []
    while os.path.islink(path) and len(links) < 40:
        target = os.readlink(path)
        links.append((path, target))
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return links


def _is_below(path: str, parents: Sequence[str] | set[str]) -> bool:
    return any(path == parent or path.startswith(parent.rstrip("/") + "/") for parent in parents)


def _status_value(path: Path, key: str) -> int | None:
    """One value of bwrap's status file, which holds a JSON object a line."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for line in path.read_text().splitlines():
            value = json.loads(line).get(key)
            if isinstance(value, int):
                return value
    return None


def _claim(status: io.FileIO) -> None:
    """Lock an agent's status file and empty it: what is started with it holds the lock for as long as it lives."""
    try:
        fcntl.flock(status, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise BlockingIOError(exc.errno, "it runs already, and holds its status file", status.name) from None
    status.truncate(0)


def _folder_id(folder: Path) -> list[int]:
    """Names a directory, also when another has its path by now."""
    found = folder.stat()
    return [found.st_dev, found.st_ino]


def _other_run_dir(given: Path, run: Path) -> str | None:
    """The run directory that the agent was given, when it is not this one; None too when nobody wrote it down."""
    try:
        told = json.loads(given.read_text())
        path, number = told["run"], told["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with contextlib.suppress(OSError):
        if _folder_id(run) == number:
            return None
    return str(path)


def _start_keeper(path: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start what keeps an agent's prints in a file: (where to print, it). Raises OSError."""
    ours, theirs = socket.socketpair()
    with ours, contextlib.ExitStack() as undo:
        undo.callback(theirs.close)
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as file:
            # Held for as long as something may still be written; what an agent of before left behind may hold it.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By its path, not as a module: it needs nothing of the package, and nothing of site-packages.
            keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", str(printed.__file__)],
                stdin=ours.fileno(),
                stdout=file,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,
            )
        undo.pop_all()
    return theirs, keeper


def _is_locked(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _in_memory(content: bytes) -> io.FileIO:
    """A file without a path, to be read by whoever inherits it."""
    file = io.FileIO(os.memfd_create("hive", os.MFD_CLOEXEC), "r+")
    file.write(content)
    file.seek(0)
    return file


def _lock_holder(status: Path) -> int | None:
    """The agent that holds its status file locked, or None. All processes are looked at only when somebody does."""
    try:
        with status.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except BlockingIOError:
        pass
    except OSError:
        return None
    path = os.path.realpath(status)
    holders = [pid for pid in _pids() if _holds_lock(pid, path)]
    # What an agent has just forked has its descriptors too, for a moment. What the daemon before had just forked does
    # not count: it had that daemon's own lock as well, and while somebody has that no other daemon begins.
    return next((pid for pid in holders if _parent(pid) not in holders), None)


def _holds_lock(pid: int, path: str) -> bool:
    """Whether a process has a file open by a descriptor that locks it; whoever just reads the file has no lock."""
    with contextlib.suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                if os.readlink(f"/proc/{pid}/fd/{number}") == path:
                    locks = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
                    if "FLOCK  ADVISORY  WRITE" in locks:
                        return True
    return False


def _end_inside(status: Path, state: Path) -> None:
    """When bwrap itself was killed, what it watched runs on, without anybody: end that too."""
    inner = _status_value(status, "child-pid")
    if inner is None or _status_value(status, "exit-code") is not None:
        return
    with contextlib.suppress(OSError):
        # The pid may be another's by now: only what is in this agent's sandbox has this directory there.
        if os.path.samefile(f"/proc/{inner}/root/state", state):
            os.kill(inner, signal.SIGKILL)


def _stat_fields(pid: int) -> list[str]:
    # The command's name is in parentheses and may hold spaces: count from behind it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _boot_id() -> str:
    """Names this boot of the kernel: pids and start times begin anew with each."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot: with the pid it names one process for ever."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _parent(pid: int) -> int | None:
    try:
        return int(_stat_fields(pid)[1])
    except OSError:
        return None


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _kill_descendants(root: int) -> None:
    """Kill all that comes from a process that is stopped, and what is born meanwhile, until nothing new is found.

    Who was sent SIGKILL has no more children: a round that finds nobody new is the last. Zombies are looked through,
    not killed; they stay, so that nobody loses their ancestor between two looks.
    """
    killed: set[tuple[int, int]] = set()
    for _ in range(_KILL_ROUNDS):
        fresh = _descendants(root) - killed
        if not fresh:
            return
        for pid, started in fresh:
            _kill_the(pid, started)
        killed |= fresh


def _kill_the(pid: int, started: int) -> None:
    """Kill one process; a stranger that has its pid by now started later, and is left alone."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            if _start_time(pid) == started:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _descendants(root: int) -> set[tuple[int, int]]:
    """All that comes from a process: (pid, start time)."""
    seen: dict[int, tuple[int, int]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            fields = _stat_fields(pid)
            seen[pid] = int(fields[1]), int(fields[19])
    children: dict[int, list[int]] = {}
    for pid, (parent, started) in seen.items():
        # Nobody is older than its parent: that number went to another while we looked.
        if parent in seen and seen[parent][1] <= started:
            children.setdefault(parent, []).append(pid)
    found, level = set(), children.get(root, [])
    while level:
        found |= {(pid, seen[pid][1]) for pid in level}
        level = [grandchild for child in level for grandchild in children.get(child, [])]
    return found


def _wait_stopped(pid: int) -> None:
    """A stop counts once the process has left what it was doing in the kernel: some microseconds."""
    with contextlib.suppress(OSError):
        for _ in range(1000):
            if _stat_fields(pid)[0] in "TtZX":
                return
            time.sleep(0.0001)


def sandbox_trouble() -> str | None:
    """None when bwrap works here, found by running it; else one sentence that names the fix."""
    probe = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--uid", "0", "--gid", "0"]
    probe += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    with _in_memory(filter_program() or b"") as program:
        probe += ["--seccomp", str(program.fileno())] if filter_program() else []
        try:
            done = subprocess.run(
                [*probe, "true"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=10,
                pass_fds=[program.fileno()],
            )
        except FileNotFoundError:
            return "bubblewrap is not installed: `apt-get install bubblewrap` (or your system's equivalent)"
        except subprocess.TimeoutExpired:
            return "bubblewrap did not answer within 10 s"
    if done.returncode == 0:
        return None
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    if "SECCOMP" in reason:
        fix = "run it on a kernel with CONFIG_SECCOMP_FILTER"
    elif os.path.exists("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"):
        fix = "allow it with an AppArmor profile for bwrap, or `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    else:
        fix = "allow user namespaces: `sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000`"
    return f"bubblewrap does not work here ({reason}); {fix}"
