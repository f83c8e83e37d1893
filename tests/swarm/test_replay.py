"""`hive turns`, `hive turn show` and `hive turn replay`, of turns that real agents took."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing

from tests.daemons import Daemon
from tests.needs import ROOT
from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

WORK = {
    "from": "operator",
    "do": [
        {"run": "echo look"},
        {"tool": "send", "args": {"to": "operator", "body": "done with {body}"}},
        {"say": "That was it."},
    ],
}


def hive(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HIVE_RUNTIME_DIR": str(daemon.runtime), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hive_core.cli", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_a_turn_is_shown_whole_and_replayed_and_what_would_differ_is_told() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, WORK])
        client.call("send", to="iris", body="the login module")
        daemon.wait_message(client, "done with")
        daemon.wait_live(lambda agent: (agent["name"], agent["state"]) == ("iris", "idle"))
        listed = json.loads(hive(daemon, "turns", "iris", "--json").stdout)["turns"]
        assert [row["state"] for row in listed] == ["done", "done"]
        number = str(listed[0]["turn"])  # the manager's have numbers of the same row
        shown = hive(daemon, "turn", "show", number).stdout
        for words in (
            "  | the login module",
            'tool: Bash {"command": "echo look"}',
            "answer: look",
            "text: That was it.",
            "ended: done",
            "to operator: done with the login module",
        ):
            assert words in shown, shown
        again = hive(daemon, "turn", "replay", number)
        assert (again.returncode, again.stdout, again.stderr) == (0, f"turn {number} would go the same way now\n", "")
        with closing(sqlite3.connect(daemon.state / "hive.sqlite")) as database:
            assert database.execute("SELECT count(*) FROM turns WHERE agent = 'iris'").fetchone() == (2,)
            database.execute("UPDATE turns SET state = 'failed', error = 'it broke' WHERE id = ?", (number,))
            database.commit()
        other = hive(daemon, "turn", "replay", number, "--json")
        told = json.loads(other.stdout)
        assert other.returncode == 1
        assert [one["what"] for one in told["differences"]] == ["outcome", "error"]
        assert hive(daemon, "turn", "replay", "99").returncode != 0
