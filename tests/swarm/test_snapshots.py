"""A whole hive whose agent removes everything, and whose /state one command brings back."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.daemons import Daemon
from tests.needs import ROOT
from tests.swarm.test_outlive import WELCOME, open_swarm, pid_of, spawn

SAY = {"tool": "send", "args": {"to": "operator", "body": "done"}}
NOTE = {"from": "operator", "match": "note", "do": [{"run": "mkdir /state/deep; echo whole > /state/deep/note"}, SAY]}
WRECK = {
    "from": "operator",
    "match": "wreck",
    "do": [{"run": "rm -rf --no-preserve-root / 2>/dev/null; rm -rf /state/* /state/.[a-z]*"}, SAY],
}
TELL = {"from": "operator", "match": "tell", "do": [{"run": "cp /state/deep/note /shared/told"}, SAY]}


def hive(daemon: Daemon, *words: str) -> str:
    """What the operator's command prints."""
    environment = {"PYTHONPATH": str(ROOT), "HIVE_RUNTIME_DIR": str(daemon.runtime), "PATH": os.defpath}
    command = [sys.executable, "-m", "hive_core.cli", *words]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_state_of_an_agent_that_removed_everything_comes_back_by_one_command() -> None:
    remove_and_restore("bwrap")


def remove_and_restore(sandbox: str) -> None:
    with open_swarm(f"--sandbox={sandbox}") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, NOTE, WRECK, TELL])
        note = daemon.state / "agents" / "iris" / "state" / "deep" / "note"

        def take_turn(word: str) -> None:
            number = client.call("send", to="iris", body=word)["message"]
            begun = daemon.events(client, lambda e: e["kind"] == "turn_started" and e["data"].get("message") == number)
            daemon.events(
                client, lambda e: e["kind"] == "turn_ended" and e["data"]["turn"] == begun["data"]["turn"], begun["seq"]
            )

        take_turn("note")
        assert note.read_text() == "whole\n"
        assert "operator asked for it" in hive(daemon, "snapshot", "iris")
        take_turn("wreck")
        assert not note.exists()
        before = pid_of(daemon, "iris")
        said = hive(daemon, "restore-state", "iris")
        assert "what was there is kept: `hive restore-state iris" in said
        assert note.read_text() == "whole\n"
        restored = daemon.events(client, lambda e: e["kind"] == "state_restored")
        daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "iris", restored["seq"])
        assert pid_of(daemon, "iris") != before
        take_turn("tell")
        assert (daemon.state / "shared" / "told").read_text() == "whole\n"
        assert "before" in hive(daemon, "snapshots", "iris")
