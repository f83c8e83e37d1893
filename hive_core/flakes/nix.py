"""nix, run on what agents wrote: in a sandbox without network, for so long, in so much memory, building nothing.

Pure evaluation keeps an expression from the host's files, environment and clock; the sandbox keeps nix itself from
them, should that fail. What it says is bounded, and becomes one sentence.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from hive_core.containers.bubblewrap import system_binds
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named

OUTPUT_LIMIT_BYTES = 1024 * 1024
SAID_LIMIT_BYTES = 64 * 1024
REASON_LIMIT = 300
_DAEMON = "/nix/var/nix/daemon-socket"
_OPTIONS = {
    "experimental-features": "nix-command flakes",
    "pure-eval": "true",
    "allow-import-from-derivation": "false",
    "accept-flake-config": "false",
    "flake-registry": "",
    "substituters": "",
    "builders": "",
    "build-users-group": "",
    "max-jobs": "0",
    "eval-cache": "false",
    "warn-dirty": "false",
}


@dataclass(frozen=True, slots=True)
class NixLimits:
    time_s: float = 60.0
    memory_mib: int = 4096


class NixFailed(Exception):
    """A run that did not end well: what nix said, or which limit ended it."""

    def __init__(self, said: str, limits: NixLimits, over: str = "") -> None:
        super().__init__(said)
        self.said = said
        self.limits = limits
        self.over = over  # "time", "memory", "output" or "stack": what it used up


class Nix:
    """The `nix` command of this machine."""

    def __init__(self, home: Path, limits: NixLimits | None = None, store: Path | None = None) -> None:
        """home: a folder for its caches. store: one of its own in the place of the machine's, for where no daemon of
        nix serves that one."""
        self.limits = limits or NixLimits()
        self._home = home
        self._store = store

    async def run(self, words: Sequence[str], *, readable: Sequence[Path] = (), writable: Sequence[Path] = ()) -> bytes:
        """`nix WORDS`, which sees of the host its system, its store, and these folders. Gives what it printed.

        Raises NixFailed, and Refusal("unavailable") where nix or bubblewrap is missing.
        """
        for folder in (self._home, *([self._store] if self._store else [])):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [*self._sandbox(readable, writable), *self._bounded(), "nix", *words]
        process = _start(command, self.environment())
        printed, said = bytearray(), bytearray()
        ended_by: list[str] = []
        try:
            with trio.move_on_after(self.limits.time_s) as time:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_read_whole, process, printed, ended_by)
                    nursery.start_soon(_read_end, process, said)
        finally:
            _kill(process)
            process.wait()
        if time.cancelled_caught:
            ended_by.append("time")
        words_said = said.decode("utf-8", "replace")
        if not ended_by and process.returncode == 0:
            return bytes(printed)
        over = ended_by[0] if ended_by else _used_up(process.returncode, words_said)
        raise NixFailed(words_said, self.limits, over)

    def environment(self) -> dict[str, str]:
        """All that nix and the git it calls are told."""
        config = "\n".join(f"{name} = {value}" for name, value in _OPTIONS.items())
        return {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(self._home),
            "USER": "hyperhive",
            "XDG_CACHE_HOME": str(self._home),
            "NIX_CONFIG": config,
            "NIX_CONF_DIR": str(self._home),
            "NIX_REMOTE": f"local?root={self._store}" if self._store else "daemon",
            "GC_INITIAL_HEAP_SIZE": "32M",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C.UTF-8",
        }

    def _sandbox(self, readable: Sequence[Path], writable: Sequence[Path]) -> Iterator[str]:
        bwrap = shutil.which("bwrap")
        if bwrap is None or shutil.which("nix") is None:
            missing = "nix" if bwrap else "bubblewrap"
            raise Refusal("unavailable", f"cannot evaluate what agents wrote: {missing} is not installed; install it")
        yield from (bwrap, "--unshare-all", "--unshare-user", "--cap-drop", "ALL", "--die-with-parent")
        yield from ("--tmpfs", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp")
        yield from system_binds()
        if self._store is None:
            yield from ("--ro-bind-try", _DAEMON, _DAEMON)
        for folder in readable:
            yield from ("--ro-bind-try", str(folder), str(folder))
        for folder in (self._home, *([self._store] if self._store else []), *writable):
            yield from ("--bind", str(folder), str(folder))
        yield from ("--chdir", "/", "--")

    def _bounded(self) -> list[str]:
        """A shell that bounds what follows."""
        kib, seconds = self.limits.memory_mib * 1024, int(self.limits.time_s) + 1
        return ["/bin/sh", "-c", f'ulimit -v {kib} && ulimit -t {seconds} && ulimit -c 0 && exec "$@"', "sh"]


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Started from this thread, the loop's: --die-with-parent ends everything with the *thread* that started it."""
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """All of it, by its group: bwrap's child does not yet hang on bwrap in its first moments."""
    if process.returncode is None:  # not waited for, so its number is still its own
        os.killpg(process.pid, signal.SIGKILL)


async def _read_whole(process: subprocess.Popen[bytes], into: bytearray, ended_by: list[str]) -> None:
    assert process.stdout is not None
    async with trio.lowlevel.FdStream(os.dup(process.stdout.fileno())) as stream:
        process.stdout.close()
        async for data in stream:
            into += data
            if len(into) > OUTPUT_LIMIT_BYTES:
                ended_by.append("output")
                _kill(process)
                return


async def _read_end(process: subprocess.Popen[bytes], into: bytearray) -> None:
    assert process.stderr is not None
    async with trio.lowlevel.FdStream(os.dup(process.stderr.fileno())) as stream:
        process.stderr.close()
        async for data in stream:
            into += data
            del into[:-SAID_LIMIT_BYTES]


def _used_up(code: int | None, said: str) -> str:
    # bwrap tells of a signal as the shell does.
    if code in (-signal.SIGXCPU, 128 + signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGKILL):
        return "time"
    if re.search(r"out of memory|bad_alloc|Too many heap sections|Failed to expand heap|cannot allocate", said, re.I):
        return "memory"
    if "stack overflow" in said or code in (-signal.SIGSEGV, 128 + signal.SIGSEGV):
        return "stack"
    if code in (-signal.SIGABRT, 128 + signal.SIGABRT):
        return "memory"
    return ""


# What nix says → what it means for whoever wrote the expression; {0} is what the pattern found.
_MEANINGS = (
    (r"Failed assertions:\s*\n\s*- ([^\n]+)", "{0}"),
    (
        r"access to (?:absolute )?path '([^']+)' is forbidden",
        "it reads {0} of the host, and it sees its own repository alone; put the file there",
    ),
    (
        r"getting status of '(/(?!nix/)[^']*)'",
        "it reads {0} of the host, and it sees its own repository alone; put the file there",
    ),
    (
        r"'?allow-import-from-derivation'? is disabled",
        "it imports what would first have to be built; write it into the repository instead",
    ),
    (
        r"(?:unable to download|Couldn't resolve host|Could not resolve host)[^\n]*",
        "it fetches from the network while it is evaluated; put what it needs into the repository",
    ),
    (r"infinite recursion encountered[^\n]*", "it refers to itself without end; break the circle"),
)
_PLACE = re.compile(r"(?:\bat |^)(?:\S*/)?([\w.-]+\.(?:nix|toml):\d+(?::\d+)?)", re.M)


def explained(failed: NixFailed) -> str:
    """What went wrong, as one clause with its limit or place, for whoever wrote the expression."""
    limits = failed.limits
    clauses = {
        "time": f"it took longer than {limits.time_s:g} s; does it go round in circles?",
        "memory": f"it took more than {limits.memory_mib:,} MiB of memory; make it smaller",
        "output": f"it gave more than {OUTPUT_LIMIT_BYTES:,} bytes; make it smaller",
        "stack": "it calls itself too deep, or without end; break the circle",
    }
    if failed.over:
        return clauses[failed.over]
    said = re.sub(r"\x1b\[[0-9;]*m", "", failed.said)
    for pattern, meaning in _MEANINGS:
        if match := re.search(pattern, said):
            return meaning.format(*(named(group) for group in match.groups()))
    errors = [line.strip().removeprefix("error:").strip() for line in said.splitlines() if "error:" in line]
    if fatal := [line.strip() for line in said.splitlines() if line.startswith("fatal:")]:  # of git, which nix calls
        errors = [f"git said {fatal[0]}"]
    reason = named(" ".join((errors[-1] if errors and errors[-1] else said.strip()).split()))[:REASON_LIMIT]
    place = _PLACE.search(said)
    where = f" ({place[1]})" if place and place[1] not in reason else ""
    return f"{reason or 'nix gave no reason'}{where}"
