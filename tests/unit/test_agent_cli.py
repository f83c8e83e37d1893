"""`hive-agent` with arguments and surroundings that cannot be: one line, no trace, the right exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.needs import ROOT


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `agent` stands for the command."""
    line = f'agent() {{ {sys.executable} -P -m hive_agent "$@"; }}; {line}'
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)


def the_one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hive-")
    assert ": cannot " in line
    assert "Errno" not in line
    return line


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--orphan-grace nan", "'nan' is not a number of seconds, such as 600"),
        ("--orphan-grace -1", "'-1' is not a number of seconds"),
        ("--orphan-grace soon", "'soon' is not a number of seconds"),
        ("--life-fd 77", "'77' is not the number of a pipe or socket that is open here"),
        ("--life-fd 0 < /dev/null", "'0' is not the number of a pipe"),
        ("--life-fd=-1", "'-1' is not the number of a pipe"),
        ("--life-fd x", "'x' is not the number of a pipe"),
        (f"--run /{'x' * 120}", "its sockets' paths would have 27 bytes more than the 107 that they may have"),
        ("--frob", "unrecognized arguments: --frob; `hive-agent serve --help` says more"),
    ],
    ids=lambda value: value[:20],
)
def test_a_flag_of_serve_that_cannot_be_is_one_line(flags: str, cause: str) -> None:
    assert cause in the_one_line(shell(f"agent serve {flags}"), 2)


@pytest.mark.parametrize("name", ["hive-agent", "hive-ag3nt", "hive-mind", "hive-m1nd"])
def test_each_name_of_the_command_gives_its_own_in_its_help(tmp_path: Path, name: str) -> None:
    package = "hive_agent" if name in ("hive-agent", "hive-ag3nt") else "hive_mind"
    (tmp_path / name).write_text(f"#!{sys.executable}\nimport sys\nfrom {package}.cli import main\nsys.exit(main())\n")
    (tmp_path / name).chmod(0o700)
    for words in ("--help", "serve --help"):
        done = shell(f"{tmp_path}/{name} {words}")
        assert done.stdout.startswith(f"usage: {name} serve [")
    assert the_one_line(shell(f"{tmp_path}/{name} serve --frob"), 2).startswith(f"{name} serve: cannot ")
    assert shell(f"{tmp_path}/{name} mcp").stderr == f"usage: {name} mcp --socket PATH [--harness ADDRESS]\n"


def test_a_command_that_is_started_as_a_module_goes_by_its_own_name() -> None:
    for module, name in (("hive_agent", "hive-agent"), ("hive_mind", "hive-mind"), ("hive_mind.cli", "hive-mind")):
        said = shell(f"{sys.executable} -P -m {module} serve --help").stdout
        assert said.startswith(f"usage: {name} serve [")


@pytest.mark.parametrize(
    "words",
    ["mcp --socket /nowhere", "rehearse --print --verbose --output-format stream-json"],
    ids=["mcp", "rehearse"],
)
def test_a_closed_standard_input_is_one_line(words: str) -> None:
    assert "standard input is closed" in the_one_line(shell(f"agent {words} <&-"), 1)


def test_a_rehearsal_that_can_keep_no_session_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = shell(
        "echo hi | agent rehearse --print --verbose --input-format stream-json --output-format stream-json",
        CLAUDE_CONFIG_DIR=f"{tmp_path}/file",
    )
    assert f"{tmp_path}/file" in (said := the_one_line(done, 1))
    assert "a file stands where a directory is needed; move it away" in said
