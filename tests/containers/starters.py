"""Daemons and helpers that tests start by the dozen: each is a fork of one process that has loaded all they need."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys

from tests.needs import ROOT

# Nothing in its command line is of a test, which looks for what names its directory.
_FORKS = """
import json, os, socket, sys
import tests.containers.drivers, tests.containers.helper_program

with socket.socket(fileno=0) as tests:
    while True:
        request, fds, _, _ = socket.recv_fds(tests, 1 << 16, 2)
        if not request:
            break
        program, environment, *words = json.loads(request)
        if (child := os.fork()) == 0:
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, fd in enumerate((nothing, *fds)):
                os.dup2(fd, number)
                os.close(fd)
            sys.argv = ["-c", *words]
            os.environ.clear()
            os.environ.update(environment)
            code = 1
            try:
                exec(program, {"__name__": "__main__"})
                sys.stdout.flush()
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
        for fd in fds:
            os.close(fd)
        tests.send(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
"""


@functools.cache
def _forking() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        # It ends with us, who have the other end.
        words = [sys.executable, "-c", _FORKS]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return ours, subprocess.Popen(words, stdin=theirs, env=environment, cwd=ROOT, start_new_session=True)


def run_forked(program: str, *words: str) -> tuple[int, str]:
    """Run a Python program, which finds the words behind sys.argv[0], to its end: (exit code, what it printed)."""
    forking, _ = _forking()
    with open(os.memfd_create("printed"), "r+b") as printed:
        socket.send_fds(forking, [json.dumps([program, dict(os.environ), *words]).encode()], [printed.fileno(), 2])
        code = int(json.loads(forking.recv(100)))
        printed.seek(0)
        return code, printed.read().decode()
