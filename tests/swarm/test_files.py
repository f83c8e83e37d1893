"""A file on its way through a whole hive: from the operator's disk into a sandbox, whoever is killed meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

READ = {
    "from": "operator",
    "do": [
        {"run": "cat /state/inbox/{message_id}/notes.txt; ls -l /state/inbox/{message_id}", "save": "found"},
        {"tool": "send", "args": {"to": "operator", "body": "found: {found}"}},
    ],
}


def test_an_agent_reads_in_its_sandbox_the_file_of_a_message_that_a_daemon_before_took(tmp_path: Path) -> None:
    read_a_file(tmp_path)


def read_a_file(folder: Path, *flags: str) -> None:
    """Send one to an agent that waits, kill the daemon, and have the agent read it under the next one."""
    (folder / "notes.txt").write_text("remember the milk")
    with open_swarm(*flags) as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, READ])
        daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        client.call("pause", agent="iris")
        descriptor = os.open(folder / "notes.txt", os.O_RDONLY)
        sent = client.call("send", [descriptor], to="iris", body="read", files=[{"name": "notes.txt"}])
        os.close(descriptor)
        daemon.kill()
        (folder / "notes.txt").unlink()
        client = daemon.start()
        client.call("start", agent="iris")
        found = daemon.wait_message(client, "found: remember the milk")
        assert "-rw-------" in found["body"]
        assert client.call("explain", message=sent["message"])["deliveries"][0]["missing"] == {}
