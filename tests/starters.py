"""Programs that tests run by the dozen: each is a fork of one process that has loaded what they need."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from tests.needs import ROOT

# Nothing in its command line is of a test, which looks for what names its directory.
_FORKS = """
import importlib, json, os, socket, sys
for module in sys.argv[1:]:
    importlib.import_module(module)

with socket.socket(fileno=0) as tests:
    while True:
        request, fds, _, _ = socket.recv_fds(tests, 1 << 18, 2)
        if not request:
            break
        program, environment, cwd, *words = json.loads(request)
        if (child := os.fork()) == 0:
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, fd in enumerate((nothing, *fds)):
                os.dup2(fd, number)
                os.close(fd)
            sys.argv = ["-c", *words]
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(cwd)
            code = 1
            try:
                exec(program, {"__name__": "__main__"})
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        for fd in fds:
            os.close(fd)
        tests.send(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
"""


_OF_CONTAINERS = ("tests.containers.drivers", "tests.containers.helper_program")


@functools.cache
def _forking(modules: tuple[str, ...]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # It ends with us, who have the other end.
        words = [sys.executable, "-c", _FORKS, *modules]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return ours, subprocess.Popen(words, stdin=theirs, env=environment, cwd=ROOT, start_new_session=True)


def run_forked(
    program: str,
    *words: str,
    modules: tuple[str, ...] = _OF_CONTAINERS,
    env: Mapping[str, str] = os.environ,
    cwd: Path = ROOT,
    stderr: IO[str] | None = None,
) -> tuple[int, str]:
    """Run a Python program, which finds the words behind sys.argv[0], to its end: (exit code, what it printed).

    modules   what has been loaded before
    """
    forking, _ = _forking(modules)
    with open(os.memfd_create("printed"), "r+b") as printed:
        errors = 2 if stderr is None else stderr.fileno()
        request = json.dumps([program, dict(env), str(cwd), *words]).encode()
        socket.send_fds(forking, [request], [printed.fileno(), errors])
        code = int(json.loads(forking.recv(100)))
        printed.seek(0)
        return code, printed.read().decode()
