"""Processes as /proc shows them, whatever they call themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from hive_core.containers.process_tree import first_in_namespace, parent_of, start_time, usage_below

Starts = Callable[[bytes], int]
_NAMED = """\
import sys
with open("/proc/self/comm", "wb") as name: name.write(bytes.fromhex(sys.argv[1]))
print("named", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def starts() -> Iterator[Starts]:
    """Starts a process of a name; gives its pid."""
    with ExitStack() as stack:

        def start(name: bytes) -> int:
            command = [sys.executable, "-I", "-S", "-c", _NAMED, name.hex()]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            assert process.stdin is not None
            assert process.stdout is not None
            stack.callback(process.stdin.close)
            assert process.stdout.readline() == b"named\n"
            return process.pid

        yield start


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a) S 1 2 (b", b"\r\x0b\x85\xe2\x80\xa8"])
def test_a_process_is_seen_whatever_bytes_its_name_is_of(starts: Starts, name: bytes) -> None:
    pid = starts(name)
    assert parent_of(pid) == os.getpid()
    assert start_time(pid) is not None
    assert usage_below(pid)[0] == 1
    assert first_in_namespace(pid) is None


def test_no_name_makes_a_process_the_first_of_a_namespace(starts: Starts) -> None:
    assert first_in_namespace(starts(b"x\rNSpid: 1 1")) is None
    assert first_in_namespace(starts(b"x\x0bNSpid: 1 1")) is None
