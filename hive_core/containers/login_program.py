"""`claude setup-token` in a sandbox of its own, on a terminal of ours: it prints a link, wants a code, prints a token.

The sandbox has the host's network and an empty home, and nothing of the hive but the program. Version 2.1.197 was seen
to print its link and to take a code; what it prints behind the provider's answer is read out of its code.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hive_core.containers.bubblewrap import login_command
from hive_core.containers.inside import HOME, in_memory
from hive_core.containers.process_tree import all_pids, parent_of
from hive_core.containers.seccomp import filter_program
from hive_core.credentials import TOKEN
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named

LINK_LIMIT = 4096
SCREEN_LIMIT_BYTES = 256 * 1024  # of what is printed, that is looked at
PRINTED_LIMIT_BYTES = 8 * 1024 * 1024
ECHO_WITHIN_S = 1.0
CODE_LIMIT = 1024
# Wide enough that no link and no token is broken into lines.
_SIZE = struct.pack("HHHH", 50, 2 * LINK_LIMIT, 0, 0)
_PASSED_ON = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
# Whatever else moves the cursor stands for a space: the program moves it between words.
_MOVE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-Z\\^-~]")
_LINK = re.compile(r"https://[!-~]+/oauth/authorize\?[!-~]+(?=\s)")
_TOKEN = re.compile(TOKEN.pattern + r"(?=\s)")
_ERROR = re.compile(r"OAuth error: ([^\r\n]+)[\r\n]")


class Screen:
    """What a login has printed so far. All of it is only looked at, never believed."""

    def __init__(self) -> None:
        self._raw = b""
        self.size = 0

    def feed(self, data: bytes) -> None:
        self.size += len(data)
        self._raw = (self._raw + data)[-SCREEN_LIMIT_BYTES:]

    def end(self) -> None:
        self.feed(b"\n")

    def _find(self, pattern: re.Pattern[str]) -> str | None:
        text = _MOVE.sub(" ", _COLOUR.sub("", self._raw.decode("utf-8", "replace")))
        found = pattern.search(text)
        return found[found.lastindex or 0].strip() if found else None

    @property
    def link(self) -> str | None:
        """Where the operator logs in, once it is printed whole."""
        link = self._find(_LINK)
        return link if link and len(link) <= LINK_LIMIT else None

    @property
    def token(self) -> str | None:
        return self._find(_TOKEN)

    @property
    def error(self) -> str | None:
        """The program's own word on why it cannot go on, without anything that looks like a secret."""
        error = self._find(_ERROR)
        return re.sub(r"sk-ant-\S+", "…", named(error))[:300] if error else None


class LoginProgram:
    """A login that runs; `read` tells what it printed, `type_code` answers it."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self._process = process
        self._terminal = terminal
        self._printed = trio.Event()
        self._left = False
        self.screen = Screen()

    async def read(self) -> bool:
        """Wait for more, and take it in. False at the end. Raises Refusal when it floods us."""
        await trio.lowlevel.wait_readable(self._terminal)
        try:
            data = os.read(self._terminal, 65536)
        except BlockingIOError:
            return True
        except OSError:  # EIO: whoever had the other side is gone
            data = b""
        if not data:
            self.screen.end()
            return False
        self.screen.feed(data)
        self._printed.set()
        if self.screen.size > PRINTED_LIMIT_BYTES:
            raise Refusal("unavailable", "cannot log in: the program's login prints without an end; try again")
        return True

    async def type_code(self, code: str) -> None:
        """Give it the code, as somebody would who pastes it and then presses enter."""
        self._printed = trio.Event()
        self._write(code.encode())
        with trio.move_on_after(ECHO_WITHIN_S):
            await self._printed.wait()
        self._write(b"\r")

    def leave(self) -> None:
        """Type no more, not the rest of a code either: the terminal's number may be another file's from now on."""
        self._left = True
        self._printed.set()

    def _write(self, data: bytes) -> None:
        if self._left:
            return
        with contextlib.suppress(OSError):  # it has left, which `read` tells
            os.write(self._terminal, data)


@asynccontextmanager
async def open_login_program(claude: Path) -> AsyncIterator[LoginProgram]:
    """Start the program's login; when the block is left its sandbox has ended. Raises OSError."""
    ours, theirs = os.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ours)
        os.set_blocking(ours, False)
        try:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, _SIZE)
            process = _start(claude, theirs)
        finally:
            os.close(theirs)
        login = LoginProgram(process, ours)
        try:
            yield login
        finally:
            login.leave()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_end, process)


def _start(claude: Path, terminal: int) -> subprocess.Popen[bytes]:
    """In the thread that asks, and not in a worker's, with which it would end."""
    program = filter_program()
    with in_memory(program or b"") as file:
        filter_fd = file.fileno() if program else None
        return subprocess.Popen(
            [*login_command(claude, filter_fd), "setup-token"],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=_environment(),
            cwd="/",
            pass_fds=[file.fileno()],
            start_new_session=True,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """End bwrap and what is inside, at whatever moment: killed while it starts, bwrap would leave that behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        for pid in [pid for pid in all_pids() if parent_of(pid) == process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # process 1 of its namespace: all the others end with it
        process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    """Built from nothing; how the host reaches the network goes along."""
    quiet = {"DISABLE_TELEMETRY": "1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
    path = os.pathsep.join(("/usr/local/bin", "/usr/bin", "/bin", "/run/current-system/sw/bin"))
    proxies = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"PATH": path, "LANG": "C.UTF-8", "HOME": HOME, "TERM": "xterm", "BROWSER": "true", **quiet, **proxies}
