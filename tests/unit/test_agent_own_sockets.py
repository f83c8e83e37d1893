"""A harness in the host's network leaves the abstract sockets of the host alone, with all that it starts."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys

import pytest

from tests.needs import ROOT

TRIES = """
import socket, subprocess, sys
from hive_agent.own_sockets import leave_foreign_sockets

connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(chr(0) + sys.argv[1])"

def connects(name):
    done = subprocess.run([sys.executable, "-c", connect, name], capture_output=True, text=True)
    return done.stderr.strip().rpartition("\\n")[2] or "connected"

print(connects(sys.argv[1]))
print(leave_foreign_sockets())
print(connects(sys.argv[1]))
with socket.socket(socket.AF_UNIX) as own, socket.create_server(("127.0.0.1", 0)) as server:
    own.bind("\\0own" + sys.argv[1])
    own.listen()
    print(connects("own" + sys.argv[1]))
    socket.create_connection(server.getsockname()).close()
"""


def test_an_abstract_socket_of_the_host_is_refused_from_then_on_and_an_own_one_is_not() -> None:
    name = f"hive-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(f"\0{name}")
        foreign.listen()
        command = [sys.executable, "-c", TRIES, name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, could, after, own = done.stdout.splitlines()
    if could == "False":
        pytest.skip("this kernel cannot tell abstract sockets apart (Linux 6.12 can)")
    assert (before, after, own) == ("connected", "PermissionError: [Errno 1] Operation not permitted", "connected")
