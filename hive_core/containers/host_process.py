"""What every driver shares whose agents are processes of this host: their files, their fence, and how they are found.

An agent has a wrapper outside of its container, which lives exactly as long as the agent does: bwrap, say. An agent
that must end with the daemon watches a pipe, since a wrapper that is to die with its parent would watch the *thread*
that forked it. One that may outlive the daemon is found again by the pid and start time in its process file, and its
exit code is in its status file even when nobody watched.

The status file is locked before an agent is started, and the wrapper holds that lock by the descriptor it was started
with. So there is never a second copy, and one whose daemon was killed before it could write the process file is found
as the process that holds the lock. Nothing inside the container has the descriptor.

Before an agent is started its run file says which directories it is given, by their numbers too: one that has another
run directory than the daemon of later would wait for ever, and whatever has its state directory is of its container.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from hive_core.containers.bounds import AgentGroups
from hive_core.containers.cgroups import joining
from hive_core.containers.driver import Former
from hive_core.containers.inside import package_parents
from hive_core.containers.keeper import start_keeper
from hive_core.containers.keyring import leave_session_keyring
from hive_core.containers.mounts import AGENTS, RUN, STATE, AgentDirs
from hive_core.containers.mounts import shape as seen
from hive_core.containers.process_tree import (
    boot_id,
    first_in_namespace,
    folder_id,
    kill_that_see,
    start_time,
    usage_below,
)
from hive_core.containers.run_command import run_command
from hive_core.containers.running import Done, Exit, RunningProcess, Usage, Ways
from hive_core.containers.seccomp import filter_program
from hive_core.containers.status_file import claim, lock_holder, status_value
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, AgentName

log = logging.getLogger(__name__)
LINES_MOST = 500
LINES_LIMIT_BYTES = 64 << 10
# Written by whoever outlives the command: a line of the status file.
_WAIT = 'status=$1; shift; "$@"%s; code=$?; printf \'{"exit-code": %%d}\\n\' "$code" >> "$status"; exit "$code"'


@dataclass(frozen=True, slots=True)
class Launch:
    """How an agent's wrapper is started."""

    command: list[str]
    environment: dict[str, str]
    kept_fds: list[int] = field(default_factory=list)
    stdin_fd: int | None = None  # None: it has nothing to read; the status file's own: it is nowhere else
    error_fd: int | None = None  # None: what it says is the agent's print


class HostProcessDriver:
    """A driver but for what is around an agent: `_launch` says that.

    cgroups: what bounds its agents; None bounds them not at all.
    life_fd: the read end of a pipe whose write end only this daemon holds; None lets agents outlive it.
    former: what ends what an agent runs in otherwise, where the hive's sandbox was another.
    """

    sandbox: str
    former: Former | None = None

    def __init__(
        self,
        state_dir: Path,
        *,
        claude: Path | None,
        orphan_grace_s: float,
        life_fd: int | None = None,
        cgroups: AgentGroups | None = None,
    ) -> None:
        self._cgroups = cgroups
        self._files = state_dir / "processes"
        self._claude = claude
        self._tried: dict[AgentName, Path | None] = {}
        self._orphan_grace_s = orphan_grace_s
        self._life_fd = life_fd
        self._filter = filter_program()
        # Of who is known here a wrapper may be on its way into its group, which a daemon began that has died.
        self._sweep("*.*")

    @property
    def life_fd_inside(self) -> int | None:
        """The number that the life pipe has in the container."""
        return self._life_fd

    def tidy(self) -> None:
        """Leave no control group behind but those of agents that run on. None of them may be starting."""
        self._sweep("*.json")

    def _sweep(self, known: str) -> None:
        if self._cgroups is not None:
            self._cgroups.sweep({file.name.partition(".")[0] for file in self._files.glob(known)})

    def _launch(self, name: AgentName, dirs: AgentDirs, status_fd: int, opened: contextlib.ExitStack) -> Launch:
        """The wrapper's command; it writes into `status_fd` how the agent ended. `opened` closes what it needs."""
        raise NotImplementedError

    def _waiting(self, name: AgentName, command: Sequence[str], stdin: str = "") -> list[str]:
        """A wrapper that starts a command, with another stdin than its own, and writes down how it ended."""
        return ["/bin/sh", "-c", _WAIT % stdin, "hive-agent", str(self._file(name, "status")), *command]

    def _first_inside(self, name: AgentName) -> int | None:
        """The host's number of the agent's first process in its container; None when there is none (yet)."""
        wrapper = self._remembered(name)
        return None if wrapper is None else first_in_namespace(wrapper)

    def _end_left(self, name: AgentName) -> None:
        """End what may be left of an agent whose wrapper has ended."""
        raise NotImplementedError

    def _entering(self, dirs: AgentDirs, first: int) -> list[str]:
        """What a command is given to, so that it runs beside an agent's first process and has no other rights."""
        raise NotImplementedError

    def use_claude(self, claude: Path | None, only: AgentName | None = None) -> None:
        """The program of agents that are started from now on; of `only` one, until the next that is for all."""
        if only is None:
            self._claude = claude
            self._tried.clear()
        else:
            self._tried[only] = claude

    def _claude_of(self, name: AgentName) -> Path | None:
        return self._tried.get(name, self._claude)

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        """Names the shape that the agent's container has when it is started now; the same in every daemon like this."""
        bounds = None if self._cgroups is None else f"{self._cgroups.kind} {self._cgroups.bounds}"
        claude = self._claude_of(name)
        programs = [str(claude), _file_id(claude), sys.executable, *package_parents()]
        shape = [self.sandbox, *programs, self._orphan_grace_s, self._life_fd is not None, bounds, *seen(dirs)]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:16]

    async def start(self, name: AgentName, dirs: AgentDirs) -> RunningProcess:
        """Start the agent's harness. Raises OSError when the program cannot be run, or the agent runs already."""
        self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A directory of the agent's may be on a disk that hangs: that holds up nobody else.
        told = await trio.to_thread.run_sync(self._prepare, name, dirs, limiter=trio.CapacityLimiter(1))
        status = self._file(name, "status")
        with status.open("ab", buffering=0) as status_file:
            claim(status_file)
            self._file(name, "run").write_text(json.dumps(told))
            own = trio.CapacityLimiter(1)
            process, keeper = await trio.to_thread.run_sync(self._start, name, dirs, status_file.fileno(), limiter=own)
        running = RunningProcess(process.pid, process, status, self._ways(name), keeper)
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
        output, keeper = start_keeper(self._file(name, "log"))
        try:
            with output, contextlib.ExitStack() as opened:
                launch = self._launch(name, dirs, status_fd, opened)
                keep = [
                    *({status_fd} - {launch.stdin_fd}),
                    *launch.kept_fds,
                    *([] if self._life_fd is None else [self._life_fd]),
                ]
                groups, command = self._cgroups, launch.command
                process = subprocess.Popen(
                    command if groups is None else groups.entering(name, command, keeper.pid),
                    stdin=subprocess.DEVNULL if launch.stdin_fd is None else launch.stdin_fd,
                    stdout=output.fileno(),
                    stderr=output.fileno() if launch.error_fd is None else launch.error_fd,
                    env=launch.environment,
                    cwd="/",
                    pass_fds=keep,
                    start_new_session=True,
                )
                return process, keeper
        except BaseException:
            keeper.wait()  # nobody prints: it ends
            raise

    async def find(self, name: AgentName, dirs: AgentDirs) -> RunningProcess | None:
        """The agent that an earlier daemon left running, or None.

        One that was given another run directory can never reach us, and one in another kind of container is not as it
        is wanted: it is ended, and counts as not running.
        """
        if self.former is not None:
            await self.former.end(name, dirs)
        if (running := await self.look(name)) is None:
            return None
        if (difference := self.difference(name, dirs.run)) is None:
            return running
        log.warning("ended %s (pid %d): it was started %s", name, running.pid, difference, extra={"agent": name})
        running.end()
        await self._end_seen(name)
        return None

    async def look(self, name: AgentName) -> RunningProcess | None:
        """The agent that was left running, as it is. What is left of one whose wrapper has ended is ended."""
        status = self._file(name, "status")
        pid = self._remembered(name)
        if pid is None and (holder := lock_holder(status)) is not None and self._may_be_ours(holder):
            pid = holder
            # What could not be written makes it no less ours: the next daemon finds it by the lock again.
            with contextlib.suppress(OSError):
                self._remember(name, pid)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                return RunningProcess(pid, None, status, self._ways(name))
        self._end_left(name)
        return None

    def _may_be_ours(self, holder: int) -> bool:
        """Whether a process that holds an agent's lock can be its wrapper."""
        return True

    def _ways(self, name: AgentName) -> Ways:
        return Ways(partial(self._first_inside, name), partial(self._end_left, name))

    def _prepare(self, name: AgentName, dirs: AgentDirs) -> dict[str, Any]:
        """Make what an agent is given, and sure that nobody has it already; what is to be written down of it."""
        is_new = not dirs.state.exists()
        dirs.make()
        if not is_new and not self._file(name, "status").exists():
            # Somebody removed what was written down of it: one that runs is found by what it sees.
            kill_that_see(folder_id(dirs.state), STATE)
        return self._told(dirs)

    def _told(self, dirs: AgentDirs) -> dict[str, Any]:
        """What the next daemon has to know of how an agent is started."""
        numbers = {"id": folder_id(dirs.run), "state": folder_id(dirs.state)}
        return {"run": os.path.realpath(dirs.run), "sandbox": self.sandbox, **numbers}

    def _state_id(self, name: AgentName) -> tuple[int, int] | None:
        """The numbers of the state directory that the agent was given; None when nobody wrote them down."""
        try:
            device, number = json.loads(self._file(name, "run").read_text())["state"]
            return int(device), int(number)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def difference(self, name: AgentName, run: Path) -> str | None:
        """How the agent was started otherwise than this daemon would; None too when nobody wrote it down."""
        try:
            told = json.loads(self._file(name, "run").read_text())
            path, number, sandbox = told["run"], told["id"], told.get("sandbox", self.sandbox)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if sandbox != self.sandbox:
            return f"with sandbox {sandbox}, and this daemon has {self.sandbox}"
        with contextlib.suppress(OSError):
            if list(folder_id(run)) == number:
                return None
        return f"with its sockets in {path}, and this daemon has them in {os.path.realpath(run)}"

    async def missed_exit(self, name: AgentName) -> Exit | None:
        """How the agent ended while no daemon watched, told once; None when there is nothing to tell."""
        identity = self._file(name, "json")
        if not identity.exists():
            return None
        boot = self._remembered_boot(name)
        await self._end_seen(name)
        code = status_value(self._file(name, "status"), "exit-code")
        return Exit(code, with_machine=code is None and boot not in (None, boot_id()))

    async def forget(self, name: AgentName) -> None:
        """The end of the agent was seen and told."""
        await self._end_seen(name)

    async def _end_seen(self, name: AgentName) -> None:
        self._file(name, "json").unlink(missing_ok=True)
        # What was left of it is ended, and the number of its state directory may be another agent's from now on.
        self._file(name, "run").unlink(missing_ok=True)
        if self._cgroups is None:
            return
        if killed := await trio.to_thread.run_sync(self._cgroups.remove, name):
            most = f"agent_memory_bytes, {self._cgroups.bounds.memory_bytes:,}"
            told = f"hive: the kernel killed {killed} of its processes: together they held more than {most}\n"
            with contextlib.suppress(OSError), self._file(name, "log").open("a") as printed_file:
                printed_file.write(told)

    async def usage(self, name: AgentName) -> Usage:
        """What the agent takes of the host now; nothing when it does not run."""
        first = self._first_inside(name)
        return Usage(0, 0) if first is None else Usage(*usage_below(first))

    async def exec(self, name: AgentName, dirs: AgentDirs, command: Sequence[str], patience_s: float = 60.0) -> Done:
        """Run a command in the agent's container, with no more rights than the agent has.

        Raises Refusal when the agent does not run, or the command takes longer than `patience_s`: it was killed.
        """
        if (first := self._first_inside(name)) is None:
            raise Refusal("conflict", "cannot run a command in the container: the agent does not run; start it first")
        entering = [*self._entering(dirs, first), *command]
        return await run_command(entering if self._cgroups is None else joining(first, entering), patience_s)

    async def destroy(self, name: AgentName) -> None:
        """Forget that there ever was such an agent, which has ended; its directories stay. Nothing when it is gone."""
        await self._end_seen(name)
        for suffix in ("run", "log", "status", "nspawn"):
            self._file(name, suffix).unlink(missing_ok=True)
        if self.former is not None:
            await self.former.forget(name)

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        """The end of what the harness printed, at most `limit` bytes of it, for whoever asks why it ended."""
        return self._printed(name, limit).decode("utf-8", "replace").strip()

    async def logs(self, name: AgentName, lines: int = 50) -> list[str]:
        """The last lines that the harness printed, the oldest first; at most LINES_MOST, and LINES_LIMIT_BYTES."""
        end = self._printed(name, LINES_LIMIT_BYTES)
        found = end.decode("utf-8", "replace").splitlines()
        if len(end) == LINES_LIMIT_BYTES and len(found) > 1:
            found = found[1:]  # its beginning is lost
        return found[-max(1, min(lines, LINES_MOST)) :]

    def _printed(self, name: AgentName, limit: int) -> bytes:
        try:
            with self._file(name, "log").open("rb") as printed_file:
                printed_file.seek(max(0, printed_file.seek(0, os.SEEK_END) - limit))
                return printed_file.read(limit)
        except OSError:
            return b""

    def _file(self, name: AgentName, suffix: str) -> Path:
        return self._files / f"{name}.{suffix}"

    def _remember(self, name: AgentName, pid: int) -> None:
        identity = {"agent": name, "pid": pid, "started": start_time(pid), "boot": boot_id()}
        fresh = self._files / f".{name}.json"
        fresh.write_text(json.dumps(identity))
        fresh.rename(self._file(name, "json"))

    def _remembered(self, name: AgentName) -> int | None:
        """The pid in the process file, when it still is the agent's."""
        try:
            identity = json.loads(self._file(name, "json").read_text())
            pid, whose = int(identity["pid"]), identity.get("agent", name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if whose != name:  # a file that was put here from elsewhere
            return None
        started = start_time(pid)
        if started is None or (started, boot_id()) != (identity.get("started"), identity.get("boot")):
            return None
        return pid

    def _remembered_boot(self, name: AgentName) -> str | None:
        """The boot of the kernel under which the agent was started; None where nobody wrote it down."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(self._file(name, "json").read_text())["boot"])
        return None

    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        """The harness and its arguments, as it is to be run in the container."""
        inside = self.sandbox != "none"
        module = "hive_mind.cli" if name == MANAGER else "hive_agent.cli"
        command = [sys.executable, "-P", "-m", module, "serve"]
        command += ["--run", RUN if inside else str(dirs.run)]
        command += ["--state", STATE if inside else str(dirs.state)]
        if dirs.proposed is not None:
            command += ["--configs", AGENTS if inside else str(dirs.proposed)]
        if not inside:
            command += ["--claude-dir", str(dirs.claude)]
            command += ["--projects", str(dirs.projects), "--mirrors", str(dirs.mirrors)]
            command += ["--extras", str(dirs.extras)]
        command += ["--network", "host"] if dirs.network == "host" else []
        command += ["--sandbox", self.sandbox, "--orphan-grace", str(self._orphan_grace_s)]
        if (claude := self._claude_of(name)) is not None:
            command += ["--claude", str(claude)]
        if self.life_fd_inside is not None:
            command += ["--life-fd", str(self.life_fd_inside)]
        return command


def _file_id(path: Path | None) -> list[int] | None:
    """Tells apart what is in a file, such as a program that is renewed in its place."""
    if path is None:
        return None
    with contextlib.suppress(OSError):
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    return None
