"""`hive doctor` where everything is there: bubblewrap, the real Claude Code, and a credential that nobody is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_agent.check import command_lines, flags_of
from hive_agent.claude_command import tried_version
from hive_agent.runner import Seat
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude

SECRET = "sk-ant-api03-the-real-one-stays-on-the-host"


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:
        yield Path(folder)


def doctor(state: Path, runtime: Path, home: Path) -> tuple[int, dict[str, Any]]:
    environment = {
        **{
            name: value for name, value in os.environ.items() if not name.startswith(("HIVE_", "ANTHROPIC_", "CLAUDE_"))
        },
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "HIVE_STATE_DIR": str(state),
        "HIVE_RUNTIME_DIR": str(runtime),
        "HIVE_DASHBOARD_PORT": "0",
        "HIVE_CLAUDE": str(find_claude()),
        "ANTHROPIC_API_KEY": SECRET,
    }
    command = [sys.executable, "-P", "-m", "hive_core.cli", "doctor", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert SECRET not in done.stdout
    told = json.loads(done.stdout)
    assert told["ok"] is (done.returncode == 0)
    return done.returncode, {one["check"]: (one["status"], one["message"]) for one in told["checks"]}


def test_a_machine_in_order_is_in_order_and_nothing_is_left_on_it(home: Path) -> None:
    code, found = doctor(home / "s", home / "r", home)
    assert code == 0
    # A disk may have little space, and that is not this test's affair.
    assert {status for check, (status, _) in found.items() if check != "state directory"} == {"ok"}, found
    assert found["claude"][1].endswith(f", {tried_version()} (the version that was tried)")
    seat = Seat("iris", "/run/hive", "/state", "/root", "/root/.claude", "/usr/bin:/bin", "/opt/claude", True, 4000)
    ours = {flag for line in command_lines(seat) for flag in flags_of(line)}
    assert found["claude's flags"][1] == f"it takes all {len(ours)} that are used"
    assert list(home.iterdir()) == []


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with open_daemon(f"--claude={find_claude()}", ANTHROPIC_API_KEY=SECRET) as daemon:
        yield daemon


def test_a_hive_that_runs_is_looked_at_and_left_alone(daemon: Daemon, home: Path) -> None:
    client = daemon.start()
    daemon.wait_live(lambda agent: agent["state"] == "idle")  # hm1nd: what of it the status tells is known then
    before = client.call("status")
    code, found = doctor(daemon.state, daemon.runtime, home)
    assert code == 0, found
    assert found["daemon"] == ("ok", f"{before['version']} runs, {before['dashboard']}")
    assert found["credential"] == ("ok", "ANTHROPIC_API_KEY")
    assert client.call("status") == before
