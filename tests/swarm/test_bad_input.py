"""A real hive on a machine where something is wrong with one agent: that agent is told of, and all others go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.daemons import Daemon
from tests.hanging_disk import hanging
from tests.swarm.test_outlive import SAY_WHO, WELCOME, open_swarm, pid_of, spawn
from tests.swarm.test_tombstones import idle

SAYS = {"from": "operator", "match": "who", "do": [SAY_WHO]}


def open_with(daemon: Daemon, *names: str) -> Client:
    """A hive with these agents, who are idle."""
    client = daemon.start()
    for name in names:
        spawn(client, name, [WELCOME, SAYS])
        idle(daemon, client, name)
    return client


def answers(daemon: Daemon, client: Client, name: str) -> None:
    """An agent is well: it takes a turn."""
    client.call("send", to=name, body="who are you?")
    asked = max(row["id"] for row in client.call("messages", agent=name)["messages"])
    sent = daemon.events(client, lambda e: e["kind"] == "message_sent" and e["data"]["message"] == asked)
    ended = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == name, after=sent["seq"])
    assert ended["data"]["state"] == "done"


def test_an_agent_whose_disk_hangs_is_told_of_and_holds_up_nobody() -> None:
    with open_swarm("--start-s=1", "--starts-at-once=1") as daemon:
        client = open_with(daemon, "iris", "rowan")
        client.call("kill", agent="iris")
        with hanging(daemon.state / "agents" / "iris" / "state"):
            client.call("start", agent="iris")
            seen = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["detail"] != "")
            assert seen["detail"] == "its start has not come back for 1 s; its disk may hang"
            client.call("kill", agent="rowan")
            client.call("start", agent="rowan")
            daemon.wait_live(lambda agent: agent["name"] == "rowan" and agent["state"] == "idle")
            with pytest.raises(
                Refusal, match="cannot end iris at once: its start has not come back; its disk may hang"
            ):
                client.call("kill", agent="iris")
            client.call("start", agent="iris")
            others = [pid_of(daemon, name) for name in ("hm1nd", "rowan")]
            daemon.kill()
            client = daemon.start()
            daemon.wait_live(lambda agent: agent["name"] == "rowan" and agent["state"] == "idle")
            seen = daemon.wait_live(lambda agent: agent["name"] == "iris" and "has not come back" in agent["detail"])
            assert [pid_of(daemon, name) for name in ("hm1nd", "rowan")] == others
            answers(daemon, client, "rowan")
        daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        answers(daemon, client, "iris")


def spoil(processes: Path, name: str, what: str) -> Path:
    """Do something to a file of an agent's process: which one."""
    suffix, _, how = what.partition(" ")
    file = processes / f"{name}.{suffix}"
    file.unlink(missing_ok=True)
    if how == "directory":
        file.mkdir()
    elif how == "garbage":
        file.write_bytes(b"[1, {\xff" * 1000)
    elif how == "link":
        file.symlink_to("/nowhere/at/all")
    else:
        file.write_bytes((processes / f"rowan.{suffix}").read_bytes())
    return file


def test_files_of_agents_processes_that_somebody_spoilt_trouble_these_agents_alone() -> None:
    deeds = ["json directory", "json garbage", "json copy", "status directory", "status link", "status copy"]
    deeds += ["run directory", "run garbage", "run copy", "log directory", "log link"]
    names = [f"agent{number}" for number in range(len(deeds))]
    with open_swarm() as daemon:
        client = open_with(daemon, "rowan", *names)
        for name in names:
            client.call("kill", agent=name)
        files = {name: spoil(daemon.state / "processes", name, what) for name, what in zip(names, deeds, strict=True)}
        daemon.kill()
        client = daemon.start()
        before = pid_of(daemon, "rowan")
        for name in names:
            client.call("start", agent=name)
        troubled = set()
        for name, file in files.items():
            seen = daemon.wait_live(
                lambda agent, name=name, file=file: (
                    agent["name"] == name  # type: ignore[misc]
                    and (agent["state"] == "idle" or str(file) in agent["detail"])
                )
            )
            if seen["state"] != "idle":
                troubled.add(file.name.partition(".")[2])
                assert seen["detail"].endswith("a directory stands where a file is needed; move it away") or (
                    "there is no such file or directory; create it" in seen["detail"]
                ), seen["detail"]
            if file.is_dir():
                file.rmdir()
            elif file.is_symlink():
                file.unlink()
        assert troubled == {"json", "status", "run", "log"}
        for name in names:
            client.call("start", agent=name)
        for name in ("rowan", *names):
            answers(daemon, client, name)
        assert pid_of(daemon, "rowan") == before
        assert len({pid_of(daemon, name) for name in ("hm1nd", "rowan", *names)}) == len(names) + 2


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """A disk of its own, for as long as the block runs."""
    folder.mkdir(mode=0o700)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "small", str(folder)], check=False)
    if mounted.returncode != 0:
        assert os.environ.get("HIVE_REQUIRE") != "ci", "mounting needs root"
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path, name: str) -> Path:
    """Take all that is left of a disk: the file that has it."""
    file = folder / name
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as filler:
        while filler.write(b"x" * 4096):
            pass
    return file


def test_a_full_disk_while_agents_start_crash_or_are_destroyed_costs_none_of_them_anything() -> None:
    with open_swarm() as daemon, small_disk(daemon.state, 160):
        client = open_with(daemon, "iris", "rowan", "sorrel")
        others = [pid_of(daemon, name) for name in ("hm1nd", "sorrel")]
        client.call("kill", agent="iris")
        fillers = [fill(daemon.state, "filler")]
        with contextlib.suppress(Refusal):
            for number in range(50):  # until what the hive has put by for this is used up, too
                client.call("pause", agent="iris")
                client.call("kill", agent="iris")
                fillers.append(fill(daemon.state, f"filler-{number}"))
        for verb, name in (("start", "iris"), ("destroy", "sorrel")):
            with pytest.raises(Refusal, match="no space is left on the disk of the hive's state_dir; make room there"):
                client.call(verb, agent=name)
        os.kill(pid_of(daemon, "rowan"), signal.SIGKILL)
        daemon.wait_live(lambda agent: agent["name"] == "rowan" and agent["state"] == "crashed")
        assert client.call("tombstones")["tombstones"] == []
        assert [pid_of(daemon, name) for name in ("hm1nd", "sorrel")] == others
        for filler in fillers:
            filler.unlink()
        daemon.wait_live(lambda agent: agent["name"] == "rowan" and agent["state"] == "idle")
        client.call("start", agent="iris")
        for name in ("iris", "rowan"):
            answers(daemon, client, name)
        assert client.call("destroy", agent="sorrel", now=True)["state"] == "kept"
