"""How a command comes into a container that runs, and gives up there what the agent has not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence

from hive_core.containers import confined as confined_file

_ALL = ("user", "mount", "pid", "ipc", "net", "uts", "cgroup", "root", "wd")


def nsenter(first: int, kinds: Sequence[str] = _ALL) -> list[str]:
    """nsenter into namespaces of a process; by default into every one of an agent's, its root and its directory."""
    program = shutil.which("nsenter") or "nsenter"
    return [program, f"--target={first}", *(f"--{kind}" for kind in kinds)]


def confined(
    program: bytes | None, environment: Mapping[str, str], *options: str, flags: Sequence[str] = ("-I", "-S")
) -> list[str]:
    """What runs a command inside with an agent's rights; `options` are those of confined.py that come first.

    flags: the interpreter's; with -P alone it can become a command that is a module of Python's.
    """

    def words() -> Iterator[str]:
        yield from (sys.executable, *flags, str(confined_file.__file__), *options)
        if program:
            yield from ("--filter", program.hex())
        for name, value in environment.items():
            yield from ("--env", f"{name}={value}")
        yield "--"

    return list(words())
