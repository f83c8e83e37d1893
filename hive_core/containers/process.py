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
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import trio

from hive_core.containers import printed
from hive_core.containers.bubblewrap import HOME, AgentDirs, bwrap_command, in_memory, package_parents
from hive_core.containers.keyring import leave_session_keyring
from hive_core.containers.process_tree import boot_id, start_time
from hive_core.containers.running import Exit, Running
from hive_core.containers.seccomp import filter_program
from hive_core.containers.status_file import claim, end_inside, lock_holder, status_value
from hive_core.protocol.words import MANAGER, AgentName

log = logging.getLogger(__name__)


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
            claim(status_file)
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
                filter_fd = opened.enter_context(in_memory(self._filter)).fileno() if self._filter else None
                keep += [filter_fd] if filter_fd is not None else []
                command = [*bwrap_command(dirs, self._claude, status_fd, filter_fd), *command]
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
        identity = {"pid": pid, "started": start_time(pid), "boot": boot_id()}
        fresh = self._logs / f".{name}.json"
        fresh.write_text(json.dumps(identity))
        fresh.rename(self._logs / f"{name}.json")

    def find(self, name: AgentName, dirs: AgentDirs) -> Running | None:
        """The agent that an earlier daemon left running, or None.

        One that was given another run directory can never reach us: it is ended, and counts as not running.
        """
        status = self._logs / f"{name}.status"
        pid = self._remembered(name)
        if pid is None and (pid := lock_holder(status)) is not None:
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
        end_inside(status, dirs.state)
        return None

    def _remembered(self, name: AgentName) -> int | None:
        """The pid in the process file, when it still is the agent's."""
        try:
            identity = json.loads((self._logs / f"{name}.json").read_text())
            pid = int(identity["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        started = start_time(pid)
        if started is None or (started, boot_id()) != (identity.get("started"), identity.get("boot")):
            return None
        return pid

    def missed_exit(self, name: AgentName) -> Exit | None:
        """How the agent ended while no daemon watched, told once; None when there is nothing to tell."""
        identity = self._logs / f"{name}.json"
        if not identity.exists():
            return None
        identity.unlink()
        return Exit(status_value(self._logs / f"{name}.status", "exit-code"))

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
        return harness_environment(HOME if self._sandbox == "bwrap" else str(dirs.state))


def harness_environment(home: str) -> dict[str, str]:
    """The environment of whatever runs our packages for an agent, built from nothing."""
    path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"))
    return {"PATH": path, "LANG": "C.UTF-8", "PYTHONPATH": os.pathsep.join(package_parents()), "HOME": home}


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
