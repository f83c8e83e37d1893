"""The peer of a turn: the same program with the same flags, bridge and sandbox, fed on its stdin."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hive_agent.claude_command import environment, session_flags, user_line
from hive_agent.runner import Seat
from hive_core.containers.bubblewrap import bwrap_command
from hive_core.containers.inside import HOME, in_memory
from hive_core.containers.mounts import AGENTS, AgentDirs, agent_dirs
from hive_core.containers.seccomp import filter_program
from hive_core.protocol.words import AgentName
from tests.bench import bare_program
from tests.daemons import Daemon

PATH = "/usr/local/bin:/usr/bin:/bin"


class Bare:
    """One sandbox in which the program runs, its working directory and sessions its own; one process at a time."""

    def __init__(self, helper: subprocess.Popen[bytes], seat: Seat, flags: Sequence[str]) -> None:
        self._helper = helper
        self._environment = environment(seat, "api_key")
        self._command = [str(seat.claude), *flags]
        self._session: str | None = None
        self._warm = False

    def cold_turn(self, prompt: str) -> dict[str, Any]:
        """A process of its own for this turn, in the session of the last one: begun_at, ended_at and session."""
        return self._turn(prompt, True)

    def warm_turn(self, prompt: str) -> dict[str, Any]:
        return self._turn(prompt, False)

    def _turn(self, prompt: str, end: bool) -> dict[str, Any]:
        order: dict[str, Any] = {"line": user_line(prompt).decode(), "end": end}
        if not self._warm:
            order |= {"argv": [*self._command, *session_flags(self._session)], "env": self._environment}
        self._warm = not end
        assert self._helper.stdin is not None
        assert self._helper.stdout is not None
        self._helper.stdin.write(json.dumps(order).encode() + b"\n")
        self._helper.stdin.flush()
        answer: dict[str, Any] = json.loads(self._helper.stdout.readline())
        assert answer["error"] is None, answer
        self._session = answer["session"]
        return answer


def bare_seat(agent: str, claude: Path, model_port: int) -> Seat:
    return Seat(agent, "/run/hive", "/state", HOME, f"{HOME}/.claude", PATH, str(claude), True, model_port)


@contextmanager
def open_bare(daemon: Daemon, name: str, seat: Seat, flags: Sequence[str]) -> Iterator[Bare]:
    """With the tools of an agent that the daemon has. It reaches the model without the harness and the relay."""
    folder = daemon.folder / name
    own = agent_dirs(folder, daemon.runtime, AgentName(seat.agent)).mounts
    dirs = AgentDirs(tuple(mount for mount in own if mount.target != AGENTS))
    dirs.make()
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(open(os.devnull, "wb")).fileno()
        filter_file = stack.enter_context(in_memory(filter_program() or b""))
        filter_fd = filter_file.fileno() if filter_program() else None
        command = bwrap_command(dirs, Path(str(seat.claude)), status, filter_fd)
        command[-1:] = ["--share-net", "--ro-bind", str(bare_program.__file__), "/bare_program.py", "--"]
        helper = subprocess.Popen(
            [*command, sys.executable, "-I", "-S", "/bare_program.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": PATH},
            pass_fds=[status, filter_file.fileno()],
        )
        try:
            yield Bare(helper, seat, flags)
        finally:
            assert helper.stdin is not None
            helper.stdin.close()
            helper.wait()
