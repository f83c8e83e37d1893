"""Agents and the daemon outlive one another: adoption, missed exits, orphans, and `down` that leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli.client import Client
from hive_core.containers.cgroups import folders_of
from hive_core.protocol.harness import OLDEST_VERSION, PROTOCOL_VERSION
from hive_core.protocol.refusal import Refusal
from tests.daemons import WITHIN_S, Daemon, open_daemon
from tests.needs import ROOT
from tests.processes import children_of, look_until, pids_naming, wait_gone


def persona(rules: list[dict[str, Any]]) -> str:
    return "A rehearsed agent.\n```rehearsal\n" + json.dumps(rules) + "\n```\n"


def spawn(client: Client, name: str, rules: list[dict[str, Any]]) -> None:
    asked = client.call("request_spawn", agent=name, persona=persona(rules), reason="a test")
    digest = client.call("show", approval=asked["approval"])["digest"]
    assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"


def pid_of(daemon: Daemon, name: str) -> int:
    return int(json.loads((daemon.state / "processes" / f"{name}.json").read_text())["pid"])


def copies_of(daemon: Daemon, name: str) -> list[int]:
    """The agent as the host sees it, once for each copy that runs: bwrap, or without a sandbox the harness."""
    place = str(daemon.state / "agents" / name / "state")
    return [pid for pid in pids_naming(place) if leads_session(pid)]


def leads_session(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False


WELCOME = {"from": "system", "match": "Welcome", "do": []}
# A turn that lasts until a file appears in the agent's /state: the test decides when it goes on.
GATED = {
    "from": "operator",
    "match": "work",
    "do": [
        {"tool": "send", "args": {"to": "operator", "body": "begun"}},
        {"run": "while [ ! -e /state/go ]; do sleep 0.05; done"},
        {"tool": "send", "args": {"to": "operator", "body": "finished"}},
    ],
}


SAY_WHO = {"tool": "send", "args": {"to": "operator", "body": "it is me"}}


def open_swarm(*flags: str, **environment: str) -> contextlib.AbstractContextManager[Daemon]:
    return open_daemon("--default-program=rehearsal", *flags, **environment)


@pytest.mark.usefixtures("as_a_users")
def test_a_turn_goes_on_while_the_daemon_is_killed_and_counts_once() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        before = pid_of(daemon, "iris")
        daemon.kill()
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        client = daemon.start()
        daemon.wait_message(client, "finished")
        daemon.events(
            client,
            lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris" and e["data"]["state"] == "done",
            after=0,
        )
        assert pid_of(daemon, "iris") == before, "a second copy was started"
        bodies = [row["body"] for row in client.call("messages", agent="iris")["messages"]]
        assert bodies.count("finished") == 1
        assert bodies.count("begun") == 1
        ended = daemon.events(
            client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris" and e["data"]["turn"] >= 2
        )
        assert ended["data"]["state"] == "done"
        assert list(client.call("down") or []) is not None


def test_what_a_turn_does_while_the_daemon_is_away_arrives_whole_and_once() -> None:
    says = [{"say": f"line {number} {'x' * 100}"} for number in range(200)]
    ready = {"run": "touch /state/ready"}
    gated = {**GATED, "do": [*GATED["do"][:2], *says, ready, *GATED["do"][2:]]}
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, gated])
        seq = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")["seq"]
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        before, state = pid_of(daemon, "iris"), daemon.state / "agents" / "iris" / "state"
        daemon.kill()
        (state / "go").touch()
        look_until((state / "ready").exists)  # it sends now, and nobody is there
        client = daemon.start()
        daemon.wait_message(client, "finished")
        ended = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris", seq)
        assert ended["data"]["state"] == "done"
        assert copies_of(daemon, "iris") == [before]
        bodies = [row["body"] for row in client.call("messages", agent="iris")["messages"]]
        assert bodies.count("finished") == 1
        turn = client.call("turn", turn=ended["data"]["turn"])
        stream = client.call("turn_lines", turn=ended["data"]["turn"])["lines"]
        assert turn["given"]["message"]["body"] == "work"
        assert [line["n"] for line in stream] == list(range(turn["lines"]))
        assert [n for n in range(200) if not any(f"line {n} x" in line["line"] for line in stream)] == []


@pytest.mark.usefixtures("as_a_users")
def test_sigterm_ends_the_daemon_alone_and_interrupts_no_turn() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        before = pid_of(daemon, "iris")
        assert daemon.stop() == 0
        os.kill(before, 0)
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        client = daemon.start()
        daemon.wait_message(client, "finished")


def the_release_before(folder: Path) -> Path:
    """The last release whose harness speaks an older version: what was there before its successor's tables were."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "log", "-1", "--diff-filter=A", "--format=%H", "--", "hive_core/store/migrations/0006_turn_loop.sql"],
        capture_output=True,
        text=True,
    )
    if not (commit := found.stdout.strip()):
        pytest.skip("there is no history of this checkout, in which the release before is")
    packages = ["hive_core", "hive_agent", "hive_mind", "dashboard"]
    archive = subprocess.run([*git, "archive", f"{commit}^", *packages], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def test_a_harness_of_the_release_before_finishes_its_turn_and_one_of_this_release_takes_the_next(
    tmp_path: Path,
) -> None:
    with open_swarm() as daemon:
        client = daemon.start(PYTHONPATH=str(the_release_before(tmp_path)))
        spawn(client, "iris", [WELCOME, GATED, {"from": "operator", "do": [SAY_WHO]}])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        old = pid_of(daemon, "iris")
        daemon.kill()
        client = daemon.start(HIVE_RESTART_S="3600")  # who has crashed would not be back before the test is given up
        told = daemon.events(client, lambda e: e["kind"] == "harness_outdated" and e["agent"] == "iris")
        assert (told["data"]["version"], told["data"]["current"]) == (OLDEST_VERSION, PROTOCOL_VERSION)
        client.call("send", to="iris", body="who are you?")
        assert pid_of(daemon, "iris") == old
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        daemon.wait_message(client, "finished")
        since = told["seq"]
        done = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris", after=since)
        assert (done["data"]["turn"], done["data"]["state"]) == (told["data"]["turn"], "done")
        ended = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris", after=since)
        assert (ended["data"]["expected"], ended["data"]["code"]) == (True, 0)
        started = daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "iris", after=since)
        daemon.wait_message(client, "it is me")
        assert copies_of(daemon, "iris") == [started["data"]["pid"]]


def test_a_daemon_with_other_settings_of_containers_replaces_an_agent_at_its_turns_edge() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        old = pid_of(daemon, "iris")
        daemon.kill()
        daemon._flags = (*daemon._flags, "--orphan-grace-s=300")
        client = daemon.start()
        adopted = daemon.events(client, lambda e: e["kind"] == "agent_adopted" and e["agent"] == "iris")
        assert adopted["data"] == {"pid": old, "outdated": True}
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        daemon.wait_message(client, "finished")
        since = adopted["seq"]
        ended = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris", after=since)
        assert (ended["data"]["expected"], ended["data"]["code"]) == (True, 0)
        daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "iris", after=since)
        assert pid_of(daemon, "iris") != old


def harness_of(daemon: Daemon, name: str) -> int:
    """The pid of an agent's harness as the host sees it."""
    status = (daemon.state / "processes" / f"{name}.status").read_text().splitlines()
    return int(json.loads(status[-1])["child-pid"])


def test_a_harness_that_hangs_in_a_turn_is_ended_and_its_message_is_done_by_the_next_one() -> None:
    with open_swarm("--lease-silence-s=20") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        hung = pid_of(daemon, "iris")
        os.kill(harness_of(daemon, "iris"), signal.SIGSTOP)
        ended = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris")
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        why = "its harness said nothing for 20 s and lost its turn"
        assert (ended["data"]["hung"], ended["data"]["expected"]) == (why, False)
        daemon.wait_message(client, "finished")
        daemon.wait_message(client, f"container_crash: iris was ended: {why}", "hm1nd")
        wait_gone(hung)
        assert copies_of(daemon, "iris") == [pid_of(daemon, "iris")]


def test_an_exit_that_nobody_watched_is_told_by_the_next_daemon() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pid = pid_of(daemon, "iris")
        status = daemon.state / "processes" / "iris.status"
        inner = json.loads(status.read_text().splitlines()[0])["child-pid"]
        daemon.kill()
        os.kill(inner, signal.SIGKILL)
        wait_gone(pid)
        client = daemon.start()
        told = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris")
        assert told["data"]["when"] == "while the daemon was away"
        assert told["data"]["code"] == 137


def test_an_orphan_ends_by_itself_when_no_daemon_comes_back() -> None:
    with open_swarm("--orphan-grace-s=1") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        for name in ("iris", "hm1nd"):  # who is told of iris; in a turn an orphan stays until that ends
            daemon.events(client, lambda e, name=name: e["kind"] == "turn_ended" and e["agent"] == name)  # type: ignore[misc]
        pids = [pid_of(daemon, name) for name in ("iris", "hm1nd")]
        daemon.kill()
        wait_gone(*pids)


@pytest.mark.usefixtures("as_a_users")
def test_agents_tied_to_the_daemon_end_with_it_even_when_it_is_killed() -> None:
    with open_swarm("--end-agents-with-daemon") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pids = [pid_of(daemon, name) for name in ("iris", "hm1nd")]
        daemon.kill()
        wait_gone(*pids)


@pytest.mark.usefixtures("as_a_users")
def test_nothing_survives_down_and_a_turn_is_finished_first() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        pids = [pid_of(daemon, name) for name in ("iris", "hm1nd")]
        groups = [folder for folder in folders_of(daemon.state) if folder.exists()]
        for folder in groups:
            (folder / "argus").mkdir()  # as of an agent whose last process was not gone when its end was seen
        other = daemon.client()
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        steps = list(other.stream("down"))
        assert steps[-1]["ends"]["iris"] == "finished"
        assert daemon.process.wait(WITHIN_S) == 0
        wait_gone(*pids)
        assert [folder for folder in groups if folder.exists()] == []


def test_down_ends_by_force_what_does_not_end_in_time() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, {"from": "operator", "do": [{"run": "touch /state/in"}, {"hang": True}]}])
        client.call("send", to="iris", body="never end")
        look_until((daemon.state / "agents" / "iris" / "state" / "in").exists)
        pid = pid_of(daemon, "iris")
        steps = list(daemon.client().stream("down", patience_s=0.2))
        assert steps[-1]["ends"]["iris"] == "killed"
        wait_gone(pid)


def test_a_harness_that_dies_in_its_turn_is_started_again_and_the_message_comes_back() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        status = Path(daemon.state / "processes" / "iris.status")
        os.kill(json.loads(status.read_text().splitlines()[0])["child-pid"], signal.SIGKILL)
        lost = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["data"]["state"] == "lost")
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        done = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["data"]["state"] == "done", lost["seq"])
        assert done["agent"] == "iris"
        crash = daemon.wait_message(client, "container_crash: iris", recipient="hm1nd")
        assert crash["sender"] == "system"


def test_a_paused_agent_takes_no_turn_until_it_is_started() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(
            client,
            "iris",
            [WELCOME, {"from": "operator", "do": [{"tool": "send", "args": {"to": "operator", "body": "back"}}]}],
        )
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        client.call("pause", agent="iris")
        client.call("send", to="iris", body="are you there?")
        # hm1nd gets mail later and works on it: time in which iris would have begun.
        client.call("send", to="hm1nd", body="and you?")
        after = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "hm1nd")["seq"]
        turns = [e for e in client.stream("events", after=0) if e["kind"] == "turn_started" and e["agent"] == "iris"]
        assert len(turns) == 1
        client.call("start", agent="iris")
        daemon.events(client, lambda e: e["kind"] == "turn_started" and e["agent"] == "iris", after=after - 1)
        daemon.wait_message(client, "back")


def test_a_killed_agent_stays_down_until_it_is_started() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pid = pid_of(daemon, "iris")
        client.call("kill", agent="iris")
        wait_gone(pid)
        daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "down")
        seq = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris")["seq"]
        client.call("start", agent="iris")
        daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "iris", after=seq)


def test_down_right_after_a_restart_ends_the_agents_of_the_daemon_before() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pids = [pid_of(daemon, name) for name in ("iris", "hm1nd")]
        daemon.kill()
        steps = list(daemon.start().stream("down"))
        assert set(steps[-1]["ends"]) == {"hm1nd", "iris"}
        wait_gone(*pids)


def test_an_agent_that_was_to_be_down_is_ended_when_it_is_found_running() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pid = pid_of(daemon, "iris")
        daemon.kill()
        with contextlib.closing(sqlite3.connect(daemon.state / "hive.sqlite")) as db, db:
            db.execute("UPDATE agents SET wanted = 'down' WHERE name = 'iris'")
        daemon.start()
        wait_gone(pid)


def test_killing_bwrap_itself_ends_what_it_watched() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        seq = daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")["seq"]
        status = daemon.state / "processes" / "iris.status"
        inner = json.loads(status.read_text().splitlines()[0])["child-pid"]
        os.kill(pid_of(daemon, "iris"), signal.SIGKILL)
        wait_gone(inner)
        daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "iris", after=seq)


# The daemon reads this as it starts. Once somebody has made the file `armed`, it is killed by what it does next to the
# agent's process file: the agent runs by then, and nothing tells of it.
STRIKE = """
import os, signal, sys

ARMED = os.path.join(os.path.dirname(__file__), "armed")

def strike(event, arguments):
    if event == {event!r} and {file!r} in [os.path.basename(str(argument)) for argument in arguments[:2]]:
        if os.path.exists(ARMED):
            os.remove(ARMED)
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(strike)
"""


@pytest.mark.parametrize("flags", [(), ("--unsafe-no-sandbox",)], ids=["bwrap", "none"])
@pytest.mark.parametrize(
    ("event", "file"), [("open", ".iris.json"), ("os.rename", "iris.json")], ids=["not written", "not renamed"]
)
def test_an_agent_whose_daemon_was_killed_before_it_noted_the_start_is_adopted_and_ends_with_down(
    tmp_path: Path, flags: tuple[str, ...], event: str, file: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STRIKE.format(event=event, file=file))
    with open_swarm(*flags, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}") as daemon:
        client = daemon.start()
        say = {"from": "operator", "do": [SAY_WHO]}
        spawn(client, "iris", [WELCOME, say])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        client.call("kill", agent="iris")
        seq = daemon.events(client, lambda e: e["kind"] == "agent_ended" and e["agent"] == "iris")["seq"]
        (tmp_path / "armed").touch()
        with contextlib.suppress(Refusal, OSError):
            client.call("start", agent="iris")
        assert daemon.process.wait(WITHIN_S) == -signal.SIGKILL
        assert not (daemon.state / "processes" / "iris.json").exists()
        # The kernel shows the arguments of a program a little after it has begun, and those of bwrap twice: its child
        # leads a session, too, until it runs what is inside.
        (orphan,) = look_until(lambda: found if len(found := copies_of(daemon, "iris")) == 1 else [])
        client = daemon.start()
        known = ("agent_adopted", "agent_started")
        seen = daemon.events(client, lambda e: e["kind"] in known and e["agent"] == "iris", after=seq)
        assert copies_of(daemon, "iris") == [orphan]
        assert (seen["kind"], seen["data"]["pid"]) == ("agent_adopted", orphan)
        client.call("send", to="iris", body="who is there?")
        daemon.wait_message(client, "it is me")
        inside = children_of(orphan)
        steps = list(client.stream("down"))
        assert steps[-1]["ends"]["iris"] == "finished"
        wait_gone(orphan, *inside)
        assert copies_of(daemon, "iris") == []


def test_one_agents_broken_directory_keeps_no_other_agent_down() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        list(client.stream("down"))
        daemon.process.wait(WITHIN_S)
        place = daemon.runtime / "agents" / "iris" / "mcp.sock"
        place.unlink()
        place.mkdir()
        daemon.start()
        daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and agent["state"] == "idle")
        broken = daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "crashed")
        assert "something that is not a socket is there" in broken["detail"]


def test_down_ends_also_an_agent_whose_sockets_cannot_be_opened_any_more() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME])
        daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["agent"] == "iris")
        pid = pid_of(daemon, "iris")
        daemon.kill()
        place = daemon.runtime / "agents" / "iris" / "mcp.sock"
        place.unlink()
        place.mkdir()
        client = daemon.start()
        daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "crashed")
        assert list(client.stream("down"))[-1]["ends"]["iris"] == "killed"
        wait_gone(pid)


def test_a_manager_that_breaks_its_own_repository_keeps_nobody_down() -> None:
    with open_swarm() as daemon:
        daemon.start()
        daemon.stop()
        proposed = daemon.state / "proposed" / "hm1nd"
        proposed.rename(daemon.folder / "moved")
        proposed.symlink_to("/nonexistent")
        assert [agent["name"] for agent in daemon.start().call("list")["agents"]] == ["hm1nd"]
