"""A whole hive whose agents are started by the real `hive-root serve`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hive_core.cli.client import Client
from hive_core.containers.process_tree import first_in_namespace
from tests.daemons import WITHIN_S, Daemon
from tests.needs import ROOT
from tests.processes import look_until, pids_naming, wait_gone
from tests.swarm.test_outlive import GATED, SAY_WHO, WELCOME, open_swarm, spawn
from tests.swarm.test_tombstones import hive


class Helped:
    """A hive's own helper, and the configuration that it and the daemon read."""

    def __init__(self, daemon: Daemon) -> None:
        self.own = daemon.folder / "own"
        self._socket = daemon.folder / "root" / "helper.sock"
        self._log = daemon.folder / "helper.log"
        self._config = daemon.folder / "hyperhive" / "config.toml"
        self._config.parent.mkdir()
        self._process: subprocess.Popen[bytes] | None = None
        settings = {"state_dir": daemon.state, "runtime_dir": daemon.runtime, "sandbox": "nspawn", "helper_user": "0"}
        settings |= {"helper": self._socket, "helper_state_dir": self.own}
        self._config.write_text("".join(f'{key} = "{value}"\n' for key, value in settings.items()))

    def start(self) -> None:
        command = [sys.executable, "-m", "hive_core.helper", "serve", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        look_until(lambda: process.poll() is not None or b"ready: " in self._log.read_bytes())
        assert process.poll() is None, self._log.read_text()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._log.write_bytes(b"")

    def stop(self) -> int:
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(WITHIN_S)

    def pid_of(self, name: str) -> int:
        return int(json.loads((self.own / "processes" / f"{name}.json").read_text())["pid"])


def last_number(client: Client) -> int:
    return int([event["seq"] for event in client.stream("events")][-1])


@contextlib.contextmanager
def open_helped() -> Iterator[tuple[Daemon, Helped]]:
    with open_swarm() as daemon:
        helper = Helped(daemon)
        try:
            yield daemon, helper
        finally:
            helper.kill()
            for pid in pids_naming(str(daemon.folder)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_hive_goes_on_while_its_helper_is_away_and_the_next_one_finds_its_agents() -> None:
    with open_helped() as (daemon, helper):
        helper.start()
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED, {"from": "operator", "match": "who", "do": [SAY_WHO]}])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        assert {agent["sandbox"] for agent in client.call("list")["agents"]} == {"nspawn"}
        before = {name: helper.pid_of(name) for name in ("hm1nd", "iris")}

        helper.kill()
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        daemon.wait_message(client, "finished")

        # A daemon that comes back meanwhile cannot find its agents; they go on.
        daemon.kill()
        client = daemon.start()
        told = daemon.wait_live(lambda agent: agent["name"] == "iris" and "cannot reach the helper" in agent["detail"])
        assert "systemctl start hyperhive-root" in told["detail"]
        assert [event["kind"] for event in client.stream("events")].count("agent_started") == 2

        helper.start()
        daemon.events(client, lambda event: event["kind"] == "agent_adopted" and event["agent"] == "iris")
        assert {name: helper.pid_of(name) for name in before} == before
        client.call("send", to="iris", body="who")
        daemon.wait_message(client, "it is me")
        daemon.wait_live(lambda agent: agent["name"] == "iris" and (agent["state"], agent["detail"]) == ("idle", ""))

        # What ends while there is no helper is seen, and started again by the next one; that is the only crash.
        known = last_number(client)
        helper.kill()
        harness = first_in_namespace(before["iris"])
        assert harness is not None
        os.kill(harness, signal.SIGKILL)
        daemon.wait_live(lambda agent: agent["name"] == "iris" and "cannot reach the helper" in agent["detail"])
        helper.start()
        daemon.events(client, lambda event: event["kind"] == "agent_started", after=known)
        assert helper.pid_of("iris") != before["iris"]
        bodies = [row["body"] for row in client.call("messages", agent="iris")["messages"]]
        assert [bodies.count(body) for body in ("begun", "finished", "it is me")] == [1, 1, 1]

        assert helper.stop() == 0, "agents outlive a helper that is asked to end, too"
        assert os.path.exists(f"/proc/{helper.pid_of('iris')}")
        helper.start()
        list(client.stream("down"))
        assert daemon.process.wait(WITHIN_S) == 0
        wait_gone(*pids_naming(f"{helper.own}/stage"))


def test_a_destruction_is_accepted_while_the_helper_is_away_and_carried_out_when_it_is_back() -> None:
    with open_helped() as (daemon, helper):
        helper.start()
        client = daemon.start()
        spawn(client, "iris", [WELCOME, GATED])
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        pid = helper.pid_of("iris")
        assert hive(daemon, "up").stdout.splitlines()[1] == "sandbox: systemd-nspawn"

        helper.kill()
        _, found = hive(daemon, "up").stdout.splitlines()[:2]
        assert found.startswith("sandbox: systemd-nspawn, and no agent can be started now: cannot reach the helper on ")
        assert "`systemctl start hyperhive-root`" in found
        for _ in range(2):
            said = hive(daemon, "destroy", "iris", "--now").stdout
            assert said.startswith("iris is destroyed as soon as that can be done: cannot reach the helper on "), said
        assert "cannot reach the helper" in hive(daemon, "tombstones").stdout
        assert os.path.exists(f"/proc/{pid}")

        known = last_number(client)
        helper.start()
        daemon.events(client, lambda event: event["kind"] == "agent_destroyed", after=known)
        wait_gone(pid)
        (kept,) = client.call("tombstones")["tombstones"]
        assert (kept["state"], kept["trouble"]) == ("kept", None)
        assert not list((helper.own / "processes").glob("iris.*"))


def test_the_doctor_has_a_line_for_the_helper(tmp_path: Path) -> None:
    with open_helped() as (daemon, helper):

        def line() -> tuple[str, str]:
            environment = {**os.environ, "XDG_CONFIG_HOME": str(daemon.folder), "HOME": str(tmp_path)}
            environment |= {"HIVE_CLAUDE": "/dev/null"}  # what is known of a program that works takes long
            command = [sys.executable, "-m", "hive_core.cli", "doctor", "--json"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
            (found,) = [each for each in json.loads(done.stdout)["checks"] if each["check"] == "helper"]
            return found["status"], found["message"]

        status, message = line()
        assert (status, message[:24]) == ("trouble", "cannot reach the helper ")
        helper.start()
        status, message = line()
        assert (status, message[:44]) == ("ok", "it starts agents in nspawn for uid 0, asked ")
