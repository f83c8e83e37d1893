"""A hive that runs is backed up, and comes back to life on a machine that has nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import Daemon
from tests.needs import ROOT
from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

# Answers by what it remembers: proof that its state came along.
REMEMBERS = [
    WELCOME,
    {"from": "operator", "match": "remember", "do": [{"run": "echo the-secret-word > /state/memory"}, {
        "tool": "send", "args": {"to": "operator", "body": "noted"}}]},
    {"from": "operator", "match": "recall", "do": [{"run": "cat /state/memory", "save": "memory"}, {
        "tool": "send", "args": {"to": "operator", "body": "it was {memory}"}}]},
]  # fmt: skip


def hive(home: Path, daemon: Daemon, *words: str) -> Any:
    """`hive` of a machine whose home is empty, told only where this hive is."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment |= {"HIVE_STATE_DIR": str(daemon.state), "HIVE_RUNTIME_DIR": str(daemon.runtime)}
    done = subprocess.run(
        [sys.executable, "-m", "hive_core.cli", *words, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return json.loads(done.stdout)


def test_a_hive_comes_back_on_an_empty_machine_and_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    with open_swarm() as old:
        client = old.start()
        spawn(client, "iris", REMEMBERS)
        client.call("send", to="iris", body="please remember this")
        old.wait_message(client, "noted")
        client.call("pause", agent="hm1nd")
        waits = client.call("send", to="hm1nd", body="for later")["message"]
        # It runs while this is made: nobody is asked to stand still.
        report = hive(tmp_path, old, "backup", str(tmp_path / "hive.tar"))
        assert report["agents"] == ["hm1nd", "iris"]
        before = client.call("messages")["messages"]
        client.call("down", patience_s=5)
        assert old.process.wait(60) == 0
        shutil.rmtree(old.folder / "state")
        shutil.rmtree(old.runtime, ignore_errors=True)
    with open_swarm() as new:
        (tmp_path / "home").mkdir()
        restored = hive(tmp_path / "home", new, "restore", str(tmp_path / "hive.tar"))
        assert restored["agents"] == ["hm1nd", "iris"]
        client = new.start()
        assert [row["id"] for row in client.call("messages")["messages"]][: len(before)] == [
            row["id"] for row in before
        ]
        assert client.call("explain", message=waits)["deliveries"][0]["state"] == "queued"
        assert {agent["name"]: agent["wanted"] for agent in client.call("list")["agents"]} == {
            "hm1nd": "paused",
            "iris": "up",
        }
        assert [row["id"] for row in client.call("search", text="remember this")["messages"]]
        client.call("send", to="iris", body="now recall it")
        assert "the-secret-word" in new.wait_message(client, "it was")["body"]
        # The gate goes on too: its repositories are whole, and a new agent gets a port and a place.
        spawn(client, "damocles", [WELCOME])
        new.wait_live(lambda agent: agent["name"] == "damocles" and agent["state"] == "idle")
        client.call("down", patience_s=5)
        assert new.process.wait(60) == 0


def test_a_hive_that_is_restored_paused_runs_nobody_before_the_operator_says_so(tmp_path: Path) -> None:
    with open_swarm() as old:
        client = old.start()
        spawn(client, "iris", REMEMBERS)
        old.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        hive(tmp_path, old, "backup", str(tmp_path / "hive.tar"))
        client.call("down", patience_s=5)
        assert old.process.wait(60) == 0
    with open_swarm() as new:
        hive(tmp_path, new, "restore", "--paused", str(tmp_path / "hive.tar"))
        client = new.start()
        client.call("send", to="iris", body="please remember this")
        new.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "paused")
        assert {agent["wanted"] for agent in client.call("list")["agents"]} == {"paused"}
        client.call("start", agent="iris")
        new.wait_message(client, "noted")
        client.call("down", patience_s=5)
        assert new.process.wait(60) == 0
