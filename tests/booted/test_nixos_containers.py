"""NixOS containers as units of a real systemd: its drop-ins, its runs, its journal. nixos-container itself, and what is
in the containers, are the stand-in's (tests/containers/standin).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.booted_host import SOURCE, VENV, BootedHost, booted_host
from tests.needs import missing
from tests.processes import look_until

# As NixOS writes it, but for the start script.
TEMPLATE = f"""\
[Unit]
Description=Container '%i'

[Service]
Type=notify
Environment=PYTHONPATH={SOURCE} INSTANCE=%i
EnvironmentFile=-/etc/nixos-containers/%i.conf
ExecStart={VENV}/bin/python -P -m tests.containers.standin.start %i
ExecReload=/usr/bin/touch /run/reloaded
SyslogIdentifier=container %i
Restart=on-failure
RestartForceExitStatus=133
SuccessExitStatus=133
TimeoutStartSec=1min
Slice=machine.slice
Delegate=true
KillMode=mixed
KillSignal=TERM
"""
UNIT = "container@h-iris.service"
# Each call is a daemon of its own: `python daemon.py VERB [SCRIPT [ONESHOT]]`.
DAEMON = """\
import json, sys, trio
from pathlib import Path
from hive_core.containers.bounds import Bounds
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.nixos_build import NixosContainerDriver, SystemBuilds
from hive_core.containers.nixos_host import NixosHost
from hive_core.containers.ranges import pick_range
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from tests.containers.standin.host import StandInHost

IRIS, STATE = AgentName("iris"), Path("/var/lib/hyperhive")
STATE.mkdir(exist_ok=True)
stand_in = StandInHost(Path("/"), Path("/var/lib/standin/bin"), booted=True)

async def base_of(name):
    return pick_range(name, ())

async def main(verb, script="", oneshot=""):
    host = NixosHost(programs="/var/lib/standin/bin")
    builds = SystemBuilds(STATE, build_s=60, host=host)
    driver = NixosContainerDriver(
        STATE, builds, base_of=base_of, claude=None, bounds=Bounds(2**30, 150, 300), host=host
    )
    dirs = agent_dirs(STATE, Path("/run/hyperhive"), IRIS)
    if verb == "switch":
        try:
            await driver.switch(IRIS, stand_in.system(script, {"once": oneshot} if oneshot else {}))
        except Refusal as refusal:
            return refusal.message
    if verb == "start":
        running = await driver.start(IRIS, dirs)
        return [running.pid, running.invocation]
    if verb in ("find", "stop", "kill", "wait"):
        running = await driver.find(IRIS, dirs)
        if running is None:
            return None
        if verb == "find":
            return [running.pid, running.invocation]
        if verb != "wait":
            getattr(running, verb)()
        return (await running.wait()).code
    if verb == "missed":
        exit_ = await driver.missed_exit(IRIS)
        return exit_ and exit_.code
    if verb == "said":
        return [await driver.last_words(IRIS), await driver.logs(IRIS)]
    if verb == "exec":
        done = await driver.exec(IRIS, dirs, ["/bin/sh", "-c", script])
        return [done.code, done.output]
    if verb == "destroy":
        await driver.destroy(IRIS)

print(json.dumps(trio.run(main, *sys.argv[1:])))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    if why := missing("nix"):
        pytest.skip(why)
    with booted_host(Path(tmp_path_factory.mktemp("host")), "tests") as host:
        host.write("/etc/systemd/system/container@.service", TEMPLATE)
        host.write("/var/lib/standin/daemon.py", DAEMON)
        host.ok("systemctl", "daemon-reload")
        yield host


def daemon(host: BootedHost, *words: str) -> Any:
    """What one daemon that does one thing says."""
    return json.loads(
        host.ok("env", f"PYTHONPATH={SOURCE}", f"{VENV}/bin/python", "-P", "/var/lib/standin/daemon.py", *words)
    )


def shown(host: BootedHost, *properties: str) -> dict[str, str]:
    said = host.ok("systemctl", "show", f"--property={','.join(properties)}", UNIT)
    return dict(line.split("=", 1) for line in said.splitlines())


def test_an_agents_container_is_a_unit_that_is_bounded_adopted_and_ended(host: BootedHost) -> None:
    daemon(host, "switch", "echo first words; exec sleep 1000")
    pid, invocation = daemon(host, "start")
    properties = "ActiveState", "MainPID", "InvocationID", "Slice", "Restart"
    properties += "MemoryMax", "CPUQuotaPerSecUSec", "TasksMax"
    assert shown(host, *properties) == {
        "ActiveState": "active",
        "MainPID": str(pid),
        "InvocationID": invocation,
        "Slice": "hyperhive-agents.slice",
        "Restart": "no",
        "MemoryMax": str(2**30),
        "CPUQuotaPerSecUSec": "1.500000s",
        "TasksMax": "300",
    }
    assert daemon(host, "find") == [pid, invocation]
    assert daemon(host, "exec", "pwd; id -u") == [0, "/state\n0\n"]
    look_until(lambda: daemon(host, "said") == ["first words", ["first words"]])
    assert daemon(host, "kill") is None
    assert shown(host, "ActiveState", "NRestarts") == {"ActiveState": "failed", "NRestarts": "0"}
    assert daemon(host, "said") == ["first words", ["first words"]]
    assert "systemd-nspawn" not in host.ok("ps", "-eo", "comm")


def test_a_harness_that_is_asked_to_stop_ends_its_container_with_its_exit_code(host: BootedHost) -> None:
    daemon(host, "switch", "trap 'echo goes; exit 5' TERM; echo here; while :; do sleep 0.05; done")
    daemon(host, "start")
    look_until(lambda: "here" in daemon(host, "said")[0])  # it knows by then what to do when it is asked
    assert daemon(host, "stop") == 5
    assert daemon(host, "said")[0].endswith("goes")


def test_an_end_that_no_daemon_watched_is_told_by_the_unit_itself(host: BootedHost) -> None:
    daemon(host, "switch", "sleep 1; exit 9")
    daemon(host, "start")
    look_until(lambda: shown(host, "ActiveState") == {"ActiveState": "failed"})
    host.ok("systemctl", "reset-failed", UNIT)  # and systemd itself has forgotten it
    assert daemon(host, "find") is None
    assert daemon(host, "missed") == 9
    assert daemon(host, "missed") is None


def test_a_switch_leaves_the_unit_as_it_is_and_one_that_fails_is_undone(host: BootedHost) -> None:
    daemon(host, "switch", "exec sleep 1000")
    pid, invocation = daemon(host, "start")
    assert daemon(host, "switch", "exec sleep 1001", "echo done > /run/once") is None
    assert daemon(host, "exec", "cat /run/once") == [0, "done\n"]
    refused = daemon(host, "switch", "exec sleep 1002", "exit 1")
    assert refused.startswith("cannot switch iris (code 4): a unit of the new system failed: ")
    assert refused.endswith("it has the system before again")
    assert daemon(host, "find") == [pid, invocation]
    daemon(host, "kill")
    daemon(host, "destroy")
    assert host.run("ls", "/etc/nixos-containers").stdout == ""
    assert shown(host, "DropInPaths") == {"DropInPaths": ""}
