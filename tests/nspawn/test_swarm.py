"""Whole hives whose agents are in containers of systemd-nspawn's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hive_core.containers.process_tree import first_in_namespace
from tests.daemons import WITHIN_S, Daemon
from tests.needs import ROOT
from tests.processes import look_until, pids_naming, wait_gone
from tests.swarm.test_files import read_a_file
from tests.swarm.test_outlive import GATED, SAY_WHO, WELCOME, open_swarm, pid_of, spawn
from tests.swarm.test_projects import two_agents_work_on_one_project
from tests.swarm.test_snapshots import remove_and_restore


def test_agents_exchange_messages_outlive_their_daemon_and_are_adopted_by_the_next_one() -> None:
    pass_on = {"from": "operator", "match": "greet", "do": [{"tool": "send", "args": {"to": "argus", "body": "hello"}}]}
    answer = {"from": "iris", "match": "hello", "do": [SAY_WHO]}
    with open_swarm("--sandbox=nspawn") as daemon:
        client = daemon.start()
        spawn(client, "iris", [WELCOME, pass_on, GATED])
        spawn(client, "argus", [WELCOME, answer])
        client.call("send", to="iris", body="greet")
        assert daemon.wait_message(client, "it is me")["sender"] == "argus"
        assert {agent["sandbox"] for agent in client.call("list")["agents"]} == {"nspawn"}
        uids = {name: uid_of(daemon, name) for name in ("hm1nd", "iris", "argus")}
        assert len({*uids.values(), 0}) == 4, "each has uids of its own"

        harness = Path(f"/proc/{first_in_namespace(pid_of(daemon, 'iris'))}/status").read_text().split()
        rights = {
            name: harness[harness.index(f"{name}:") + 1] for name in ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
        }
        assert rights == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}

        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        before = {name: pid_of(daemon, name) for name in uids}
        daemon.kill()
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        client = daemon.start()
        daemon.wait_message(client, "finished")
        bodies = [row["body"] for row in client.call("messages", agent="iris")["messages"]]
        assert [bodies.count("begun"), bodies.count("finished")] == [1, 1]
        assert {name: pid_of(daemon, name) for name in uids} == before
        kinds = [event["kind"] for event in client.stream("events")]
        assert [kinds.count("agent_adopted"), kinds.count("agent_started")] == [3, 3]
        assert {name: uid_of(daemon, name) for name in uids} == uids

        for name in ("kill", "start"):
            client.call(name, agent="argus")
        client.call("send", to="iris", body="greet")
        daemon.events(client, lambda e: e["kind"] == "agent_started" and e["agent"] == "argus", after=kinds_end(client))
        # An agent has begun when its wrapper has; its container is a little later.
        assert look_until(lambda: uid_of(daemon, "argus")) == uids["argus"]

        left = pids_naming(str(daemon.state))
        list(client.stream("down"))
        assert daemon.process.wait(WITHIN_S) == 0
        wait_gone(*left)
        assert pids_naming(str(daemon.state / "agents")) == []


def kinds_end(client: Any) -> int:
    """The number of the event that tells that argus was ended."""
    ended = [event["seq"] for event in client.stream("events") if event["kind"] == "agent_ended"]
    return int(ended[-1])


def uid_of(daemon: Daemon, name: str) -> int | None:
    """The host's uid of an agent's first process; None while there is none."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{first_in_namespace(pid_of(daemon, name))}").st_uid
    return None


def test_an_agent_with_uids_of_its_own_reads_the_file_of_a_message(tmp_path: Path) -> None:
    read_a_file(tmp_path, "--sandbox=nspawn")


def test_containers_without_uids_of_their_own_are_told_wherever_agents_are_shown(tmp_path: Path) -> None:
    refuse = "case \"$*\" in *rootidmap*) echo 'Invalid argument' >&2; exit 1; esac"
    path = write_program(tmp_path, f'{refuse}; exec REAL "$@"')
    with open_swarm("--sandbox=nspawn", PATH=path) as daemon:
        client = daemon.start()
        daemon.wait_live(lambda agent: agent["state"] == "idle")
        assert client.call("list")["agents"][0]["sandbox"] == "nspawn-host-uids"
        assert "agents have no uids of their own (Invalid argument)" in client.call("status")["sandbox_weakness"]
        assert uid_of(daemon, "hm1nd") == 0


def write_program(folder: Path, script: str) -> str:
    """A PATH on which systemd-nspawn is a shell's script; REAL is the real one."""
    program = folder / "systemd-nspawn"
    program.write_text(f"#!/bin/sh\n{script.replace('REAL', str(shutil.which('systemd-nspawn')))}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_where_it_does_not_work_no_real_program_is_started_and_the_reason_is_told(tmp_path: Path) -> None:
    path = write_program(tmp_path, 'exec setpriv --reuid=65534 REAL "$@"')
    flags = ("--sandbox=nspawn", "--default-program=claude", f"--claude={shutil.which('true')}")
    with open_swarm(*flags, ANTHROPIC_API_KEY="sk-none", PATH=path) as daemon:
        daemon.start()
        manager = daemon.wait_live(lambda agent: agent["name"] == "hm1nd" and bool(agent["detail"]))
        assert manager["state"] == "down"
        assert "systemd-nspawn does not work here (Need to be root.)" in manager["detail"]
        assert "set sandbox to bwrap" in manager["detail"]


def test_the_doctor_tells_which_sandboxes_work_here(tmp_path: Path) -> None:
    def sandbox(**environment: str) -> tuple[str, str]:
        given = {**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), **environment}
        given |= {"HIVE_CLAUDE": "/dev/null"}  # what is known of a program that works takes long
        given |= {"HIVE_STATE_DIR": str(tmp_path / "state"), "HIVE_RUNTIME_DIR": f"/run/hive-t-{os.getpid()}"}
        command = [sys.executable, "-m", "hive_core.cli", "doctor", "--json"]
        done = subprocess.run(command, env=given, capture_output=True, text=True, cwd=ROOT)
        (found,) = [each for each in json.loads(done.stdout)["checks"] if each["check"] == "sandbox"]
        return found["status"], found["message"]

    assert sandbox() == ("ok", 'bubblewrap, with a filter of system calls; sandbox = "nspawn" works too')
    words = "systemd-nspawn, with a filter of system calls; bubblewrap works too"
    assert sandbox(HIVE_SANDBOX="nspawn") == ("ok", words)
    path = write_program(
        tmp_path, 'case "$*" in *rootidmap*) echo "Invalid argument" >&2; exit 1; esac; exec REAL "$@"'
    )
    status, message = sandbox(HIVE_SANDBOX="nspawn", PATH=path)
    assert (status, message[:63]) == ("warning", "systemd-nspawn; agents have no uids of their own (Invalid argum")
    path = write_program(tmp_path, 'echo "Need to be root." >&2; exit 1')
    assert sandbox(HIVE_SANDBOX="nspawn", PATH=path)[0] == "trouble"
    assert "would not do all here" in sandbox(PATH=path)[1]


def test_the_state_of_an_agent_that_removed_everything_comes_back_by_one_command() -> None:
    remove_and_restore("nspawn")


def test_two_agents_work_on_one_project() -> None:
    two_agents_work_on_one_project("nspawn")
