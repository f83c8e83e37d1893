"""git, run in repositories of our own and nowhere else, by nobody's configuration and within limits.

What a repository of ours holds was written by agents, so each run is bounded in time, memory, files and output; and
what it says becomes one line.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from hive_core.protocol.visible import named

ERRORS_LIMIT_BYTES = 64 * 1024
REASON_LIMIT = 300
LOOK_S = 0.25
_PIECE_BYTES = 64 * 1024
_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ATTR_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ASKPASS": "true",
    "GIT_NO_LAZY_FETCH": "1",
    # An object is what its id says, to whoever looks: what is shown, what nix takes, what is deployed.
    "GIT_NO_REPLACE_OBJECTS": "1",
    "HOME": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "GIT_AUTHOR_NAME": "hyperhive",
    "GIT_AUTHOR_EMAIL": "hive@localhost",
    "GIT_COMMITTER_NAME": "hyperhive",
    "GIT_COMMITTER_EMAIL": "hive@localhost",
}
_CONFIG = {
    "core.hooksPath": os.devnull,
    "core.attributesFile": os.devnull,
    "core.fsmonitor": "false",
    "core.symlinks": "false",
    "core.packedGitLimit": "128m",
    "core.packedGitWindowSize": "32m",  # of a pack, else 1 GiB of it at once: all memory there is
    "core.bigFileThreshold": "16m",  # a larger object passes through in pieces
    "pack.threads": "1",
    "pack.windowMemory": "64m",
    "pack.deltaCacheSize": "64m",
    "protocol.allow": "never",
    "protocol.file.allow": "always",
    "fetch.fsckObjects": "true",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "tag.gpgSign": "false",
    "commit.gpgSign": "false",
}


@dataclass(frozen=True, slots=True)
class GitLimits:
    """time_s: of a clock on the wall; its processes have as much time of the processor each. file_bytes: of one file
    that it writes."""

    time_s: float = 30.0
    memory_bytes: int = 1024**3
    file_bytes: int = 64 * 1024**2
    output_bytes: int = 32 * 1024**2


LIMITS = GitLimits()


class GitFailed(Exception):
    """A run that did not end well: what git said, as one short line, or which limit ended it.

    over     "time" or "output" when it was that limit, else ""
    code     what it ended with, when it ended by itself
    printed  what it had printed by then, and said on its other output
    """

    def __init__(self, reason: str, over: str = "", code: int | None = None, printed: str = "") -> None:
        super().__init__(reason)
        self.over = over
        self.code = code
        self.printed = printed


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run has besides, or otherwise.

    config       which everybody on the host can read
    environment  variables
    look         called now and then; what it raises ends the run
    """

    config: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    look: Callable[[], None] | None = None


PLAIN = Setting()


def command_of(
    repository: Path, words: Sequence[str], limits: GitLimits, setting: Setting = PLAIN
) -> tuple[list[str], dict[str, str]]:
    """The arguments and the whole environment of `git WORDS` in a bare repository, for who starts it otherwise."""
    options = [word for key, value in {**_CONFIG, **setting.config}.items() for word in ("-c", f"{key}={value}")]
    command = [*_bounded(limits), "git", f"--git-dir={repository}", *options, *words]
    return command, {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), **_ENVIRONMENT, **setting.environment}


def run_git(
    repository: Path, *words: str, stdin: bytes = b"", limits: GitLimits | None = None, setting: Setting = PLAIN
) -> bytes:
    """`git WORDS` in a bare repository; gives what it printed. Blocks: for worker threads. Raises GitFailed, OSError.

    It leaves no process behind, however it ends.
    """
    limits = limits or LIMITS
    command, environment = command_of(repository, words, limits, setting)
    process = subprocess.Popen(
        command,
        cwd="/",
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        ends_at = time.monotonic() + limits.time_s
        printed, said, over = _talk(process, stdin, limits, ends_at, setting.look)
        if not over:
            process.wait(max(ends_at - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        over = "time"
    finally:
        if process.returncode is None:  # not waited for, so its number is still its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                _close(pipe)
    if over == "time":
        raise GitFailed(f"git took longer than {limits.time_s:g} s", over)
    if over:
        raise GitFailed(f"git said more than {limits.output_bytes:,} bytes", over)
    if process.returncode:
        reason = _reason(process.returncode, said.decode("utf-8", "replace"), limits)
        both = b"\n".join((printed[:ERRORS_LIMIT_BYTES], said))
        raise GitFailed(reason, code=process.returncode, printed=both.decode("utf-8", "replace"))
    return bytes(printed)


def _bounded(limits: GitLimits) -> list[str]:
    """A shell that bounds what follows, and all that it starts."""
    bounds = [
        f"ulimit -v {limits.memory_bytes // 1024}",
        f"ulimit -t {int(limits.time_s) + 1}",
        f"ulimit -f {limits.file_bytes // 512}",
        "ulimit -c 0",
    ]
    return ["/bin/sh", "-c", _FIRST_TO_GO + " && ".join([*bounds, 'exec "$@"']), "sh"]


# Where the host has no memory left, git ends and is run again: not the daemon, nor an agent.
_FIRST_TO_GO = "{ echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; "


def _talk(
    process: subprocess.Popen[bytes],
    stdin: bytes,
    limits: GitLimits,
    ends_at: float,
    look: Callable[[], None] | None = None,
) -> tuple[bytearray, bytearray, str]:
    """Write `stdin`, read both outputs to their ends; and which limit came first, if one did."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    printed, said = bytearray(), bytearray()
    rest = memoryview(stdin)
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ, printed)
        pipes.register(process.stderr, selectors.EVENT_READ, said)
        os.set_blocking(process.stdin.fileno(), False)
        pipes.register(process.stdin, selectors.EVENT_WRITE)
        while pipes.get_map():
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                return printed, said, "time"
            if look is not None:
                look()
                left_s = min(left_s, LOOK_S)
            for key, _ in pipes.select(left_s):
                if key.fileobj is process.stdin:
                    rest = _write_some(process.stdin, rest)
                    if not rest:
                        pipes.unregister(process.stdin)
                        _close(process.stdin)
                    continue
                piece = os.read(key.fd, _PIECE_BYTES)
                if not piece:
                    pipes.unregister(key.fileobj)
                elif key.data is printed or len(said) < ERRORS_LIMIT_BYTES:
                    key.data.extend(piece)
            if len(printed) > limits.output_bytes:
                return printed, said, "output"
    return printed, said, ""


def _write_some(pipe: IO[bytes], rest: memoryview) -> memoryview:
    try:
        return rest[os.write(pipe.fileno(), rest[:_PIECE_BYTES]) :] if rest else rest
    except BlockingIOError:
        return rest
    except BrokenPipeError:  # it ended early, and its exit code says how
        return rest[:0]


def _close(pipe: IO[bytes]) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def _reason(code: int, said: str, limits: GitLimits) -> str:
    """What git said, as one short line that can be shown."""
    # A process that git started for its work may be the one that came to a limit.
    signals = {int(number) for number in re.findall(r"died of signal (\d+)", said)} | {-code, code - 128}
    if signal.SIGXFSZ in signals or "File too large" in said:
        return f"it would write a file of more than {limits.file_bytes:,} bytes"
    if signal.SIGXCPU in signals:
        return f"git took longer than {limits.time_s:g} s"
    if re.search(r"out of memory|Cannot allocate memory|malloc failed|cannot mmap|mmap failed", said, re.I):
        return f"git took more than {limits.memory_bytes // 2**20:,} MiB of memory"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"git ended with {code}"]
    fatal = [line for line in lines if line.startswith(("fatal:", "error:"))]
    if fatal[:1] == ["fatal: fetch-pack: invalid index-pack output"]:
        # The program that writes the pack died without a word: by a limit, and of its files there is one.
        return f"it would write a pack of more than {limits.file_bytes:,} bytes"
    return named((fatal or lines)[0])[:REASON_LIMIT]
