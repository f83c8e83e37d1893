"""A real hive of rehearsals that is upgraded: its agents are replaced, and none after one that does not come up."""

from __future__ import annotations

import shutil
from pathlib import Path

from hive_core.cli.checks import Machine, check_daemon
from hive_core.cli.client import Client
from hive_core.config import Config
from tests.daemons import Daemon
from tests.dying import packages
from tests.needs import ROOT
from tests.swarm.test_outlive import SAY_WHO, WELCOME, open_swarm, pid_of, spawn
from tests.swarm.test_tombstones import hive

NAMES = ("hm1nd", "iris", "rowan")
SAYS = {"from": "operator", "match": "who", "do": [SAY_WHO]}


def upgrade(daemon: Daemon, folder: Path, text: str) -> Client:
    """The daemon is ended, the program that runs in containers is changed, and the next daemon begins."""
    daemon.kill()
    with (folder / "hive_agent" / "serve_cli.py").open("a") as program_file:
        program_file.write(text)
    return daemon.start(PYTHONPATH=str(folder))


def settled(daemon: Daemon) -> None:
    daemon.wait_live(lambda agent: agent["name"] == "rowan" and agent["state"] == "idle")


def test_after_an_upgrade_every_agent_is_replaced_the_manager_last_and_a_broken_one_gets_no_further_than_one(
    tmp_path: Path,
) -> None:
    folder = packages(tmp_path)
    with open_swarm() as daemon:
        client = daemon.start(PYTHONPATH=str(folder))
        for name in NAMES[1:]:
            spawn(client, name, [WELCOME, SAYS])
        settled(daemon)
        old = {name: pid_of(daemon, name) for name in NAMES}
        before = client.call("status")["revision"]

        client = upgrade(daemon, folder, "# of a newer release\n")
        revision = client.call("status")["revision"]
        assert revision != before
        seq, order = 0, []
        for _ in NAMES:
            started = daemon.events(
                client, lambda e: e["kind"] == "agent_started" and e["data"]["pid"] not in old.values(), after=seq
            )
            seq = started["seq"]
            order.append(started["agent"])
        assert (set(order), order[-1]) == ({*NAMES}, "hm1nd")
        daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and agent["state"] == "idle")
        assert [agent["outdated"] for agent in client.call("list")["agents"]] == [False] * 3
        new = {name: pid_of(daemon, name) for name in NAMES}
        assert not set(new.values()) & set(old.values())

        client = upgrade(daemon, folder, "raise SystemExit('this release is broken')\n")
        failed = daemon.events(client, lambda e: e["kind"] == "update_failed")["agent"]
        (other,) = {"iris", "rowan"} - {failed}
        told = daemon.wait_message(client, f"update_failed: {failed} did not come up")["body"]
        assert "this release is broken" in told
        daemon.wait_message(client, "update_failed", recipient="hm1nd")
        assert [pid_of(daemon, name) for name in ("hm1nd", other)] == [new["hm1nd"], new[other]]
        assert client.call("status")["outdated"] == [other, "hm1nd"]
        client.call("send", to=other, body="who are you?")
        daemon.wait_message(client, "it is me")
        assert ", outdated" in hive(daemon, "list").stdout
        assert hive(daemon, "update").returncode == 2, "whom, is never implied"
        assert f"the update has stopped: {failed} did not come up" in hive(daemon).stdout
        config = Config(state_dir=daemon.state, runtime_dir=daemon.runtime)
        *_, finding = check_daemon("daemon", Machine(config))
        said = f"2 agents run as an older release started them ({other}, hm1nd): {failed} did not come up"
        assert (finding.check, finding.status, finding.message[: len(said)]) == ("updates", "warning", said)
        shutil.copy(ROOT / "hive_agent" / "serve_cli.py", folder / "hive_agent" / "serve_cli.py")
        done = hive(daemon, "update", failed)
        # It may have been started again by itself already, when its rest was over.
        assert (done.returncode, done.stdout.startswith((f"{failed}: replaced at", f"{failed} is as it would"))) == (
            0,
            True,
        )
        seen = set()
        while len(seen) < len(NAMES):
            ready = daemon.wait_live(
                lambda one: one["name"] not in seen and not one["outdated"] and one["state"] == "idle"
            )
            seen.add(ready["name"])
        everybody = hive(daemon, "update", "--all")
        assert everybody.stdout.startswith("every agent is as it would be started now (")
