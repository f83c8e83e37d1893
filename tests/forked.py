"""Daemons that tests start by the dozen: each is a fork of one process that has loaded all that a daemon does.

Its imports are most of what a start costs. What begins a daemon is its own `main` all the same. That a new interpreter
can begin it hold the tests of other groups, the demo's, those that give it an environment, and HIVE_LONG=1.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from tests.daemons import Daemon
from tests.needs import ROOT

# A keeper waits for each daemon, and tells its end: who starts a daemon is not its parent, and asks for it by a socket.
_FORKS = """
import atexit, fcntl, gc, json, os, runpy, signal, socket, sys, time
import hive_core.daemon_cli, hive_core.config, hive_core.daemon, hive_core.logs
import hive_core.sockets.agent, hive_core.sockets.manager_tools

def keep(request, fds):
    asked = json.loads(request)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told = socket.socket(fileno=fds[0])
    if (daemon := os.fork()) == 0:
        code = 1
        try:
            code = serve(asked, fds)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    for fd in fds[1:]:
        os.close(fd)
    told.send(str(daemon).encode())
    end = os.waitid(os.P_PID, daemon, os.WEXITED | os.WNOWAIT)
    code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
    try:
        told.send(str(code).encode())
        told.recv(1)  # until then its number is its own
    except OSError:
        pass

def serve(asked, fds):
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in (nothing, *fds[1:])]
    wanted = [0, 1, 2, *asked["fds"]]
    os.closerange(0, 500)
    for fd, number in zip(high, wanted, strict=True):
        os.dup2(fd, number)
    os.closerange(500, 500 + 2 * len(high))
    os.environ.clear()
    os.environ.update(asked["environment"])
    time.tzset()
    os.umask(asked["umask"])
    os.chdir(asked["cwd"])
    sys.argv = ["hive_core", *asked["words"]]
    sys.exit(hive_core.daemon_cli.main())

gc.collect()
gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with socket.socket(fileno=0) as tests:
    while True:
        request, fds, _, _ = socket.recv_fds(tests, 1 << 18, 20)
        if not request:
            break
        if os.fork() == 0:
            keep(request, fds)
            os._exit(0)
        for fd in fds:
            os.close(fd)
"""


class ForkedDaemon:
    """As much of a Popen as a test of a daemon asks for."""

    def __init__(self, keeper: socket.socket) -> None:
        self._keeper = keeper
        weakref.finalize(self, keeper.close)
        self.pid = int(keeper.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with_end, _, _ = select.select([self._keeper], [], [], 0) if self.returncode is None else ([], [], [])
        return self._end() if with_end else self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is not None:
            return self.returncode
        if not select.select([self._keeper], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("hive-core serve", timeout or 0)
        return self._end()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self) -> int:
        # It stays to be read: a thread may wait while another kills, and both hear the end.
        self.returncode = int(self._keeper.recv(100, socket.MSG_PEEK))
        return self.returncode


def start(
    command: Sequence[str],
    *,
    stdout: IO[bytes],
    stderr: IO[bytes],
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    **more: Any,
) -> Any:
    """As subprocess.Popen for the command of a daemon: a fork, unless its environment makes it another program."""
    server = None if "HIVE_LONG" in os.environ else _server_for(_of_the_interpreter(env))
    if server is None:
        return subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, pass_fds=pass_fds, **more)
    umask = os.umask(0)
    os.umask(umask)
    words = command[command.index("hive_core") + 1 :]
    asked = {"words": words, "environment": dict(env), "fds": list(pass_fds), "umask": umask, "cwd": os.getcwd()}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        fds = [theirs.fileno(), stdout.fileno(), stderr.fileno(), *pass_fds]
        socket.send_fds(server, [json.dumps(asked).encode()], fds)
    return ForkedDaemon(ours)


@contextlib.contextmanager
def daemons_are_forks() -> Iterator[None]:
    """Daemons that a test starts are forks, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Daemon, "begin", staticmethod(start))
        yield


@contextlib.contextmanager
def forks_of(packages: Path) -> Iterator[None]:
    """Daemons that have these packages by PYTHONPATH are forks too; nobody changes them until the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    server, process = _serve(environment)
    key = frozenset(_of_the_interpreter(environment).items())
    _servers[key] = server
    try:
        yield
    finally:
        del _servers[key]
        server.close()
        process.wait()


def _of_the_interpreter(environment: Mapping[str, str]) -> dict[str, str]:
    """What of an environment a program looks at before its first line."""
    looked_at = ("PYTHON", "LC_", "LD_", "LANG")
    return {name: value for name, value in environment.items() if name.startswith(looked_at)}


_servers: dict[frozenset[tuple[str, str]], socket.socket] = {}  # by what of the environment they were begun with
_kept: list[subprocess.Popen[bytes]] = []  # what ends with us is nobody's to wait for


def _server_for(looked_at: dict[str, str]) -> socket.socket | None:
    """What forks daemons of such an environment; for our own it is begun when it is first asked for."""
    key = frozenset(looked_at.items())
    if key not in _servers and looked_at == _of_the_interpreter(os.environ):
        _servers[key], process = _serve({**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT))})
        _kept.append(process)
    return _servers.get(key)


def _serve(environment: Mapping[str, str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """It ends with us, who have the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        words = [sys.executable, "-P", "-c", _FORKS]
        return ours, subprocess.Popen(words, stdin=theirs, env=environment, cwd=Path("/"), start_new_session=True)
