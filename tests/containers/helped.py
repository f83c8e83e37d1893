"""Agents that a helper starts for who asks it, as tests start and watch them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hive_core.containers.bounds import AgentGroups
from hive_core.containers.helped import HelpedDriver, Helper
from hive_core.containers.helped_systems import PATIENCE_OF_S
from hive_core.containers.process import ProcessDriver
from tests.processes import PATIENCE_S, look_until
from tests.starters import run_forked

HELPED_STAND_IN = "helper-nixos-container"
HELPER_KINDS = ["helper-bwrap", "helper-nspawn", HELPED_STAND_IN]


_HELPER = """
import json, os, sys
from tests.containers.helper_program import main

if (pid := os.fork()) == 0:
    os.setsid()
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main(json.loads(sys.argv[2]))
    os._exit(0)
print(pid)
"""


class HelpedScripts(HelpedDriver):
    """The driver as it is; the helper's agents are scripts."""

    life_fd_inside = None
    script: str


class Helped(HelpedScripts):
    """The script is in a file that the helper reads."""

    def __init__(self, folder: Path, sandbox: str) -> None:
        super().__init__(Helper(folder / "helper.sock", folder, folder / "runtime"), sandbox, leftover_in(folder))
        self._script = folder / "script"

    @property
    def script(self) -> str:  # type: ignore[override]
        return self._script.read_text()

    @script.setter
    def script(self, text: str) -> None:
        fresh = self._script.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self._script)


def leftover_in(folder: Path) -> ProcessDriver:
    """What a daemon of before would have had, where there was none."""
    return ProcessDriver(folder / "before", sandbox="", claude=None, orphan_grace_s=600)


def helper_in(folder: Path, sandbox: str, cgroups: AgentGroups | None = None) -> Helper:
    """The helper of a folder, which is started when none runs."""
    if not answers(folder):
        start_helper(folder, sandbox, cgroups)
    return Helper(folder / "helper.sock", folder, folder / "runtime", sandbox, PATIENCE_OF_S)


def helped_in(folder: Path, kind: str, script: str, cgroups: AgentGroups | None = None) -> Helped:
    """A driver for the helper of a folder."""
    sandbox = kind.removeprefix("helper-")
    helper_in(folder, sandbox, cgroups)
    driver = Helped(folder, sandbox)
    driver.script = script
    return driver


def answers(folder: Path) -> bool:
    """Whether the helper of a folder says hello.

    A connection alone tells nothing: a helper that is killed while it forks leaves its listening socket to the child
    for a moment, and who connects to that is hung up on.
    """
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.settimeout(PATIENCE_S)
        sock.connect(str(folder / "helper.sock"))
        sock.sendall(b'{"verb": "hello"}\n')
        return bool(sock.recv(1))
    return False


def start_helper(
    folder: Path, sandbox: str, cgroups: AgentGroups | None = None, *, user: int = 0, state_dir: Path | None = None
) -> int:
    """Start the helper of a folder, which is nobody's child; returns its pid when it answers."""
    folders = {"state_dir": state_dir or folder, "runtime_dir": (state_dir or folder) / "runtime"}
    own = {"helper": folder / "helper.sock", "helper_state_dir": folder}
    settings: dict[str, Any] = {key: str(path) for key, path in {**folders, **own}.items()}
    settings |= {"sandbox": sandbox, "helper_user": str(user), "host_network": ["iris"]}
    if cgroups is not None:
        bounds = cgroups.bounds
        settings |= {"agent_memory_bytes": bounds.memory_bytes, "agent_cpu_percent": bounds.cpu_percent}
        settings |= {"agent_tasks": bounds.tasks}
    code, printed = run_forked(_HELPER, str(folder / "helper.log"), json.dumps(settings))
    assert code == 0
    pid = int(printed)
    (folder / "helper.pid").write_text(str(pid))
    look_until(lambda: answers(folder) or not os.path.exists(f"/proc/{pid}"))
    assert answers(folder), (folder / "helper.log").read_text()
    return pid


def ask(folder: Path, request: object) -> dict[str, Any]:
    """One request as it is, and the helper's answer."""
    return send(folder, (json.dumps(request) + "\n").encode())


def send(folder: Path, line: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(str(folder / "helper.sock"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(line)
        answer: dict[str, Any] = json.loads(sock.makefile("rb").readline())
    return answer


def error(answer: dict[str, Any]) -> str:
    return str(answer["error"]["message"])


def end_helper(folder: Path) -> None:
    """Kill the helper of a folder, where there is one."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((folder / "helper.pid").read_text()), signal.SIGKILL)
    (folder / "helper.pid").unlink(missing_ok=True)


def unmount_all(folder: Path) -> None:
    """Take away what is mounted below a folder: what a broken helper left there would be in the way of all tests."""
    for place in reversed(mounts_below(folder)):
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def mounts_below(folder: Path) -> list[str]:
    """Where something is mounted below a directory, as this namespace sees it."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [place for place in places if place.startswith(f"{folder}/")]


def log_of(folder: Path) -> str:
    """What the helper of a folder logged; nothing where there is none."""
    with contextlib.suppress(OSError):
        return (folder / "helper.log").read_text()
    return ""


@contextlib.contextmanager
def swapping(state: Path, elsewhere: Path) -> Iterator[None]:
    """All the time somebody swaps a directory of an agent's for a link that leads elsewhere, and back."""
    link = state.with_name("link")
    link.symlink_to(elsewhere)
    swap = (
        "import ctypes, sys\n"
        "libc, at, exchange = ctypes.CDLL(None), -100, 2\n"
        "while True: libc.renameat2(at, sys.argv[1].encode(), at, sys.argv[2].encode(), exchange)\n"
    )
    with subprocess.Popen([sys.executable, "-c", swap, str(state), str(link)]) as swapper:
        try:
            yield
        finally:
            swapper.kill()
