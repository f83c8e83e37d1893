"""Where bubblewrap does not work: the rehearsal starts all the same, a real program only when somebody insists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemons import open_daemon


@pytest.fixture
def path_without_bwrap(tmp_path: Path) -> str:
    """A PATH that leads to git and the usual tools, not to bwrap."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("git", "sh", "sed", "date", "sleep", "env"):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)


def test_the_demo_plays_without_a_sandbox(path_without_bwrap: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hive_core.cli", "demo", "--once", "--json"],
        env={**os.environ, "PATH": path_without_bwrap},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["models"]["iris"] == "haiku"


def test_a_real_program_is_not_started_and_the_reason_names_the_fix(path_without_bwrap: str) -> None:
    with open_daemon(ANTHROPIC_API_KEY="sk-none", PATH=path_without_bwrap) as daemon:
        client = daemon.start()
        daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and bool(agent["detail"]))
        (manager,) = client.call("list")["agents"]
        assert manager["state"] == "down"
        assert "bubblewrap is not installed: `apt-get install bubblewrap`" in manager["detail"]
        assert "--unsafe-no-sandbox" in manager["detail"]


def test_insisting_is_shown_wherever_agents_are_shown(path_without_bwrap: str) -> None:
    claude = shutil.which("true")
    flags = ("--unsafe-no-sandbox", f"--claude={claude}", "--end-agents-with-daemon")
    with open_daemon(*flags, ANTHROPIC_API_KEY="sk-none", PATH=path_without_bwrap) as daemon:
        client = daemon.start()
        daemon.wait_live(lambda agent: agent["state"] == "idle")
        result = client.call("list")
        assert result["unsafe"] is True
        assert result["agents"][0]["sandbox"] == "none"
        shown = subprocess.run(
            [sys.executable, "-m", "hive_core.cli", "list"],
            env={**os.environ, "HIVE_RUNTIME_DIR": str(daemon.runtime)},
            capture_output=True,
            text=True,
        )
        assert "agents run without a sandbox (--unsafe-no-sandbox)" in shown.stdout


def test_where_containers_cannot_be_built_agents_wait_with_the_reason_and_nothing_is_deployed() -> None:
    flags = ("--default-program", "rehearsal", "--sandbox", "nixos-container", "--end-agents-with-daemon")
    with open_daemon(*flags) as daemon:
        client = daemon.start()
        waits = daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and bool(agent["detail"]))
        assert waits["state"] == "down"
        assert "sandbox" in waits["detail"]
        number = client.call("request_spawn", agent="iris", persona="You read.", reason="a reader")["approval"]
        failed = client.call("approve", approval=number, digest=client.call("show", approval=number)["digest"])
        assert (failed["state"], failed["note"]) == ("failed", f"cannot build iris: {waits['detail']}")
        assert [agent["name"] for agent in client.call("list")["agents"]] == ["hm1nd"]
