"""The real Claude Code is pinned, and another build of it comes by an approval: an agent proves it, others follow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.containers.drivers import need
from tests.daemons import KEY, Daemon, open_daemon
from tests.needs import find_claude


def build(path: Path, number: int) -> None:
    """Another build of it, which differs in bytes of its head that say nothing, or (0) one that does not start."""
    shutil.copyfile(str(find_claude()), f"{path}.new")
    with open(f"{path}.new", "r+b") as opened:
        opened.seek(9 if number else 64)
        opened.write(bytes([number] if number else 64))
    Path(f"{path}.new").chmod(0o755)
    Path(f"{path}.new").rename(path)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    need("bwrap")
    build(tmp_path / "claude", 1)
    with open_daemon(HIVE_CLAUDE=str(tmp_path / "claude"), ANTHROPIC_API_KEY=KEY) as daemon:
        daemon.start()
        yield daemon


def test_another_build_is_proven_by_one_agent_before_all_run_it(daemon: Daemon, tmp_path: Path) -> None:
    client = daemon.client()
    daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and agent["state"] == "idle")
    first = client.call("status")
    assert first["claude"].startswith(str(daemon.state / "programs" / "claude-2."))
    assert first["claude_pin"]["approval"] is None

    # One that does not start is taken back.
    build(tmp_path / "claude", 0)
    number = client.call("request_claude")["approval"]
    card = client.call("show", approval=number)
    assert "cannot start" in json.dumps(card["effect"]) or "does not tell its version" in json.dumps(card["effect"])
    done = client.call("approve", approval=number, digest=card["digest"])
    assert done["state"] == "failed"
    assert client.call("status")["claude"] == first["claude"]
    daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and agent["state"] == "idle")

    # What is installed when the daemon starts waits for the operator.
    daemon.stop()
    build(tmp_path / "claude", 2)
    client = daemon.start()
    daemon.events(client, lambda event: event["kind"] == "approval_requested" and event["actor"] == "system")
    (card,) = [client.call("show", approval=one["id"]) for one in client.call("status")["pending"]]
    told = json.dumps(card["effect"])
    assert "it takes all" in told
    assert client.call("status")["claude"] == first["claude"]
    done = client.call("approve", approval=card["id"], digest=card["digest"])
    assert (done["state"], done["proof"]) == ("done", "healthy (hm1nd tried it)")
    now = client.call("status")
    assert now["claude"] != first["claude"]
    assert now["claude_pin"]["approval"] == card["id"]
