"""What `hive-agent check` says of a program, with stand-ins for Claude Code that lack what a later one may lack."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import hive_agent.check
from hive_agent import claude_command
from hive_agent.check import Check, command_lines, flags_of
from hive_agent.claude_command import tried_version
from hive_agent.runner import Seat
from tests.processes import pids_naming

SEAT = Seat("iris", "/run/hive", "/state", "/root", "/root/.claude", "/usr/bin:/bin", "/opt/claude", True, 4000)
OURS = {flag for line in command_lines(SEAT) for flag in flags_of(line)}
LOST = {"type": "result", "is_error": True, "errors": ["No conversation found with session ID: x"]}
PROGRAM = """#!{python}
import sys
words = sys.argv[1:]
if words == ["--version"]:
    print("9.0.0 (Claude Code)")
elif words == ["--help"]:
    print("Options:")
    for flag in {listed!r}:
        print(f"  {{flag}} <value>   what it does, unlike --mentioned-elsewhere")
else:
    for word in words:
        if word.startswith("--") and word not in {taken!r}:
            sys.exit(f"error: unknown option '{{word}}'")
    if sys.stdin.read():
        sys.exit("it was given something")
    if "--resume" in words:
        print({lost!r})
        sys.exit(1)
    sys.exit({end!r})
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., Path]:
    def make(
        *, lacks: Iterable[str] = (), hides: Iterable[str] = (), lost: str = json.dumps(LOST), end: str | int = 0
    ) -> Path:
        taken = sorted(OURS - set(lacks))
        listed = [flag for flag in taken if flag not in hides]
        path = tmp_path / "claude"
        path.write_text(PROGRAM.format(python=sys.executable, listed=listed, taken=taken, lost=lost, end=end))
        path.chmod(0o700)
        return path

    return make


async def findings(program: Path) -> dict[str, tuple[str, str]]:
    check = Check(str(program), str(program.parent), 4000)
    await check.run()
    return {finding["check"]: (finding["status"], finding["message"]) for finding in check.findings}


def test_every_flag_that_stands_in_the_code_is_on_a_line_that_is_tried() -> None:
    written = re.findall(r'"(--[\w-]+)"', inspect.getsource(claude_command))
    # The value of --mcp-config is a command line, with flags of the bridge's own.
    assert set(written) - {"--socket", "--harness"} == OURS


async def test_another_version_that_takes_every_flag_is_in_order(stand_in: Callable[..., Path]) -> None:
    path = stand_in()
    assert await findings(path) == {
        "claude": ("ok", f"{path}, 9.0.0 (tried was {tried_version()})"),
        "claude's flags": ("ok", f"it takes all {len(OURS)} that are used"),
    }


@pytest.mark.parametrize("gone", [["--tools"], ["--resume"], ["--session-id"], ["--allowedTools", "--effort"]])
async def test_each_flag_that_is_gone_is_named_with_the_version_that_was_tried(
    stand_in: Callable[..., Path], gone: list[str]
) -> None:
    status, message = (await findings(stand_in(lacks=gone)))["claude's flags"]
    assert status == "trouble"
    assert {word.strip(",") for word in message.split() if word.startswith("--")} == set(gone)
    assert message.endswith(f"install the version that was tried, {tried_version()}")


async def test_a_flag_that_the_help_no_longer_lists_is_a_warning_while_it_is_taken(
    stand_in: Callable[..., Path],
) -> None:
    status, message = (await findings(stand_in(hides=["--tools"])))["claude's flags"]
    assert status == "warning"
    assert message.startswith("it takes --tools, which --help no longer lists")


async def test_a_program_that_refuses_a_value_tells_why_in_its_own_words(stand_in: Callable[..., Path]) -> None:
    path = stand_in(end="error: option '--effort <level>' argument 'low' is invalid.")
    status, message = (await findings(path))["claude's flags"]
    assert status == "trouble"
    assert message.startswith("it does not start with our flags: error: option '--effort <level>' argument 'low' is")


async def test_a_program_that_tells_of_a_lost_session_in_other_words_is_trouble(stand_in: Callable[..., Path]) -> None:
    path = stand_in(lost=json.dumps({**LOST, "errors": ["I know nothing of it"]}))
    status, message = (await findings(path))["claude's flags"]
    assert (status, message[:53]) == ("trouble", "it does not say in known words that a session is lost")


@pytest.mark.parametrize(("asked", "check"), [("--version", "claude"), ("--help", "claude's flags")])
async def test_a_program_that_hangs_is_trouble_and_is_ended(
    stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, asked: str, check: str
) -> None:
    monkeypatch.setattr(hive_agent.check, "PATIENCE_S", 4.0)  # the other one is to end within it
    whole = stand_in()
    path = whole.with_name("hanging")
    path.write_text(f'#!/bin/sh\n[ "$1" = {asked} ] && sleep 600\nexec {whole} "$@"\n')
    path.chmod(0o700)
    found = await findings(path)
    status, message = found[check]
    assert (status, list(found)[-1]) == ("trouble", check)
    assert "it did not end within " in message
    assert pids_naming(str(path)) == []


@pytest.mark.parametrize(
    ("mode", "content", "why"),
    [
        (0o600, "#!/bin/sh\n", "Permission denied"),
        (0o700, "no program", "Exec format error"),
        (0o700, "#!/bin/sh\necho no licence >&2\nexit 1\n", "does not tell its version: no licence"),
        (0o700, "#!/bin/sh\n", "does not tell its version"),
    ],
)
async def test_a_program_that_does_not_run_is_trouble(tmp_path: Path, mode: int, content: str, why: str) -> None:
    path = tmp_path / "claude"
    path.write_text(content)
    path.chmod(mode)
    status, message = (await findings(path))["claude"]
    assert status == "trouble"
    assert why in message
    assert str(path) in message


def test_the_command_prints_its_findings_as_one_object_and_its_exit_code_tells_of_trouble(
    stand_in: Callable[..., Path],
) -> None:
    for lacks, code, last in (((), 0, "ok"), (("--model",), 1, "trouble")):
        command = [sys.executable, "-P", "-m", "hive_agent.cli", "check", str(stand_in(lacks=lacks))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (code, "")
        assert [finding["status"] for finding in json.loads(done.stdout)] == ["ok", last]
