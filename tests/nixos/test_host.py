"""README's commands on a NixOS host, by its operator: nothing of the host is where other systems have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

WITHIN_S = 120


@pytest.fixture
def folder() -> Iterator[Path]:
    # Not tmp_path: a socket's path has to fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="hive-t-") as place:
        yield Path(place)


def hive(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HIVE_")}
    places = {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "XDG_CONFIG_HOME": str(folder),
        "HIVE_STATE_DIR": str(folder / "state"),
        "HIVE_RUNTIME_DIR": str(folder / "run"),
        "HIVE_DASHBOARD_PORT": "0",
    }
    command = [sys.executable, "-P", "-m", "hive_core.cli", *words]
    return subprocess.run(command, env={**kept, **places}, capture_output=True, text=True, timeout=WITHIN_S)


def test_the_demo_plays_to_its_end_in_sandboxes_and_leaves_nothing(folder: Path) -> None:
    done = hive(folder, "demo", "--once", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["ok"] is True
    assert set(result["agents"]) == {"hm1nd", "iris", "damocles", "argus"}
    assert list(folder.iterdir()) == []


def test_up_finds_the_sandbox_and_down_ends_everything(folder: Path) -> None:
    up = hive(folder, "up", "--json")
    try:
        assert up.returncode == 0, up.stderr
        status = json.loads(up.stdout)
        assert (status["started"], status["sandbox"]) == (True, "bwrap")
        assert [agent["name"] for agent in json.loads(hive(folder, "list", "--json").stdout)["agents"]] == ["hm1nd"]
    finally:
        down = hive(folder, "down", "--json")
    assert down.returncode == 0, down.stderr
    assert json.loads(down.stdout)["ok"] is True
    assert hive(folder, "list").returncode == 3
