"""`hive doctor`: what it says. What it looks at stands in checks, which needs every library and is imported last."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Literal

from hive_core.cli import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

Status = Literal["ok", "warning", "trouble"]
OLDEST_PYTHON = (3, 11)
GIT_PATIENCE_S = 10.0
_COLOURS = {"ok": "green", "warning": "amber", "trouble": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; of a warning or a trouble the message ends with the way out."""

    check: str
    status: Status
    message: str


class Progress:
    """What is being looked at, on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()

    def __call__(self, what: str) -> None:
        self._print(f"looking at {what} …")

    def end(self) -> None:
        self._print("")

    def _print(self, text: str) -> None:
        if self._shown:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def doctor(arguments: Namespace) -> int:
    """Look at everything; 0 when nothing is in trouble, else 1."""
    progress = Progress()
    found = []
    try:
        for finding in _look(progress):
            progress.end()
            found.append(finding)
            if not arguments.json:
                print(_line(finding), flush=True)
    finally:
        progress.end()
    ok = all(finding.status != "trouble" for finding in found)
    if arguments.json:
        print(json.dumps({"ok": ok, "checks": [asdict(finding) for finding in found]}, ensure_ascii=False))
    return 0 if ok else 1


def _line(finding: Finding) -> str:
    status = show.paint(f"{finding.status:8}", _COLOURS[finding.status])
    return f"{status} {finding.check:18} {show.safe(' '.join(finding.message.split()))}"


def _look(progress: Progress) -> Iterator[Finding]:
    progress("python and git")
    first = [check_python(sys.version_info[:2]), check_git()]
    yield from first
    if all(finding.status == "ok" for finding in first):
        progress("the libraries")
        libraries = check_libraries()
        yield libraries
        if libraries.status == "ok":
            from hive_core.cli.checks import look

            yield from look(progress)


def check_python(version: tuple[int, int]) -> Finding:
    """Whether it is new enough."""
    oldest, called = ".".join(map(str, OLDEST_PYTHON)), platform.python_version()
    if version < OLDEST_PYTHON:
        return Finding("python", "trouble", f"{called} is too old; install {oldest} or newer, then `bin/setup run`")
    return Finding("python", "ok", called)


def check_git() -> Finding:
    """Whether it runs. Without it a library of ours cannot be loaded, and the daemon does not start."""
    try:
        done = subprocess.run(
            ["git", "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GIT_PATIENCE_S
        )
    except FileNotFoundError:
        return Finding("git", "trouble", "not installed: `apt-get install git` (or your system's equivalent)")
    except subprocess.TimeoutExpired:
        return Finding("git", "trouble", f"it did not answer within {GIT_PATIENCE_S:.0f} s; install it anew")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Finding("git", "trouble", f"it does not run ({last}); install it anew")
    return Finding("git", "ok", done.stdout.strip().removeprefix("git version "))


def check_libraries() -> Finding:
    """Whether all can be loaded; without them nothing else can be looked at."""
    try:
        import hive_core.cli.checks  # noqa: F401
    except ImportError as exc:
        return Finding("libraries", "trouble", f"{exc} ({sys.executable}); `bin/setup run` installs them all")
    return Finding("libraries", "ok", "all can be loaded")
