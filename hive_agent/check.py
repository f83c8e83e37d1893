"""`hive-agent check`: whether the Claude Code that is installed takes what we ask of it.

The program itself is asked, in a home of its own and without anybody to talk to: for its version, for its help, and to
start with each of our command lines on an empty input, which ends it before a turn begins.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from hive_agent.claude_command import environment, flags, passing_session_flags, session_flags, tried_version
from hive_agent.claude_errors import describe_exit, shortened
from hive_agent.claude_stream import Report
from hive_agent.descendants import adopt_orphans
from hive_agent.program import Command, Line, Program
from hive_agent.runner import Seat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Settings

PATIENCE_S = 40.0  # of one start: the first of a program of 250 MB on a slow, loaded machine takes many seconds
SAID_LIMIT = 2000  # lines; --help has some two hundred
# Every setting that puts a flag on the command line.
SETTINGS: Settings = {
    "program": "claude",
    "model": "sonnet",
    "effort": "low",
    "tools": ["Read"],
    "prompt": "You are.",
    "extras": {"digest": "none", "skills": ["one"], "plugins": ["two"], "offered": []},
}
NO_SESSION = "00000000-0000-4000-8000-000000000000"
_REFUSED = re.compile(r"unknown option '?(--[\w-]+)", re.IGNORECASE)
_LISTED = re.compile(r"^ +(-.*?)(?:  |$)")


def command_lines(seat: Seat) -> tuple[list[str], list[str], list[str]]:
    """The arguments of a first turn inside a sandbox, of a look at whether the program comes up, and of a later turn
    without a sandbox: all flags there are, between them."""
    bare = Seat(**{**{name: getattr(seat, name) for name in Seat.__slots__}, "sandboxed": False})
    first, passing = ([*flags(seat, SETTINGS), *more] for more in (session_flags(None), passing_session_flags()))
    return first, passing, [*flags(bare, SETTINGS), *session_flags(NO_SESSION)]


def flags_of(arguments: list[str]) -> list[str]:
    return [word for word in arguments if word.startswith("--")]


@dataclass
class _Said:
    """What one run of the program printed, and its exit code, None when it had to be killed."""

    stdout: list[Line] = field(default_factory=list)
    stderr: list[Line] = field(default_factory=list)
    code: int | None = None

    @property
    def text(self) -> str:
        return _text(self.stdout)

    @property
    def failure(self) -> str:
        if self.code is None:
            return f"it did not end within {PATIENCE_S:.0f} s, and was killed"
        last = _text(self.stderr).strip().splitlines() or [describe_exit(self.code)]
        return shortened(last[-1])


def _text(lines: list[Line]) -> str:
    return "\n".join(line.decode("utf-8", "replace") if isinstance(line, bytes) else line.message for line in lines)


class _Trouble(Exception):
    """The check that is at work ends with this sentence."""


class Check:
    """One look at a program. It fills `findings`, each a {"check", "status", "message"} as `hive doctor` tells it."""

    def __init__(self, claude: str, folder: str, model_port: int) -> None:
        path = os.environ.get("PATH", os.defpath)
        self._claude = claude
        self._seat = Seat("doctor", folder, folder, folder, f"{folder}/.claude", path, claude, True, model_port)
        self._told = ""  # the version that it tells
        self.findings: list[dict[str, str]] = []

    async def run(self) -> None:
        for name, look in (("claude", self._version), ("claude's flags", self._flags)):
            try:
                status, message = await look()
            except _Trouble as trouble:
                status, message = "trouble", f"{trouble}; install the version that was tried, {tried_version()}"
            told = {"version": self._told} if name == "claude" and self._told else {}
            self.findings.append({"check": name, "status": status, "message": message, **told})
            if status == "trouble":
                return

    async def _version(self) -> tuple[str, str]:
        said = await self._ask(["--version"])
        version = said.text.split()[0] if said.code == 0 and said.text.split() else None
        if version is None:
            raise _Trouble(f"{self._claude} does not tell its version: {said.failure}")
        self._told, tried = version, tried_version()
        remark = "the version that was tried" if version == tried else f"tried was {tried}"
        return "ok", f"{self._claude}, {version} ({remark})"

    async def _flags(self) -> tuple[str, str]:
        said = await self._ask(["--help"])
        listed = {
            flag for line in said.text.splitlines() if (found := _LISTED.match(line)) for flag in flags_in(found[1])
        }
        first, passing, later = command_lines(self._seat)
        ours = list(dict.fromkeys(flags_of([*first, *passing, *later])))
        gone: list[str] = []
        began = await self._start(first, gone)
        await self._start(passing, gone)
        resumed = await self._start(later, gone)
        if gone:
            raise _Trouble(f"it does not know {', '.join(gone)} any more")
        if began.code != 0:
            raise _Trouble(f"it does not start with our flags: {began.failure}")
        report = Report()
        for line in resumed.stdout:
            report.read_stdout(line)
        if not report.session_lost:
            raise _Trouble(f"it does not say in known words that a session is lost: {resumed.failure}")
        if unlisted := [flag for flag in ours if flag not in listed]:
            told = "--help no longer lists, so a later version may not"
            return "warning", f"it takes {', '.join(unlisted)}, which {told}; tried with {tried_version()}"
        return "ok", f"it takes all {len(ours)} that are used"

    async def _start(self, arguments: list[str], gone: list[str]) -> _Said:
        """Start it on an empty input, again without each flag that it refuses; those are added to `gone`."""
        while True:
            said = await self._ask(without(arguments, gone))
            refused = _REFUSED.search(_text(said.stderr))
            if said.code in (0, None) or refused is None or refused[1] in gone or refused[1] not in arguments:
                return said
            gone.append(refused[1])

    async def _ask(self, arguments: list[str]) -> _Said:
        seat = self._seat
        # No daemon serves the tools, so there is nothing to wait for.
        env = {**environment(seat, "api_key"), "MCP_CONNECT_TIMEOUT_MS": "1", "MCP_TIMEOUT": "1"}
        try:
            program = await Program.start(Command([self._claude, *arguments], env, seat.state_dir))
        except OSError as exc:
            raise _Trouble(f"cannot start {self._claude}: {exc.strerror}") from None
        said = _Said()
        said.code = await program.finish(_keep(said.stdout), _keep(said.stderr), PATIENCE_S)
        if said.code is None:
            raise _Trouble(f"{self._claude}: {said.failure}")
        return said


def _keep(lines: list[Line]) -> Callable[[Line], None]:
    def keep(line: Line) -> None:
        if len(lines) < SAID_LIMIT:
            lines.append(line)

    return keep


def flags_in(text: str) -> list[str]:
    return re.findall(r"--[A-Za-z][\w-]*", text)


def without(arguments: list[str], gone: list[str]) -> list[str]:
    """The arguments without some flags and their values."""
    kept, keep = [], True
    for word in arguments:
        keep = word not in gone if word.startswith("--") else keep
        if keep:
            kept.append(word)
    return kept


def main(claude: str) -> int:
    """Print the findings as one JSON list; 0 unless something is in trouble."""
    adopt_orphans()
    # The address of the model: it is ours, and nobody listens there.
    with tempfile.TemporaryDirectory(prefix="hive-") as folder, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        check = Check(claude, folder, nobody.getsockname()[1])
        trio.run(check.run)
    print(json.dumps(check.findings))
    return int(any(finding["status"] == "trouble" for finding in check.findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
