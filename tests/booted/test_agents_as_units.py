"""A root daemon where systemd runs: its agents are nspawn containers, each a transient unit of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.containers.host_names import host_name
from hive_core.protocol.words import AgentName
from tests.booted.hive import agents, ask_for_iris, idle, lasting, processes_of, shown, write_config
from tests.booted_host import BootedHost, booted_host
from tests.processes import look_until

STATE = "/var/lib/hyperhive"
SETTINGS = (
    'sandbox = "nspawn"',
    "agent_memory_bytes = 1073741824",
    "agent_cpu_percent = 150",
    "agent_tasks = 300",
    "restart_s = 0.1",
)
# As somebody would write it who runs the daemon as root. systemd ends with it all that is in its group.
UNIT = """\
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/local/bin/hive-core serve
KillMode=control-group
Restart=on-failure
RestartSec=0.1
StateDirectory=hyperhive
RuntimeDirectory=hyperhive
RuntimeDirectoryPreserve=yes
"""
SERVICE = "hyperhive.service"


def unit_name(name: str) -> str:
    return f"hyperhive-agent-{host_name(AgentName(name), Path(STATE))}.scope"


MANAGER, IRIS = unit_name("hm1nd"), unit_name("iris")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    with booted_host(Path(tmp_path_factory.mktemp("host"))) as host:
        host.write("/etc/hyperhive/config.toml", write_config(host, *SETTINGS))
        host.write(f"/etc/systemd/system/{SERVICE}", UNIT)
        host.ok("systemctl", "daemon-reload")
        host.ok("systemctl", "start", SERVICE)
        ask_for_iris(host)
        yield host


def events(host: BootedHost, kind: str) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in host.ok("hive", "events", "--json").splitlines()]
    return [event for event in told if event["kind"] == kind]


def restart(host: BootedHost) -> None:
    host.ok("systemctl", "restart", SERVICE)
    look_until(lambda: idle(host, "hm1nd", "iris"))


def test_agents_are_in_containers_with_uids_of_their_own(host: BootedHost) -> None:
    assert {agent["sandbox"] for agent in agents(host).values()} == {"nspawn"}
    users = host.ok("sh", "-c", "ps -o uid= -p $(grep -lzx -e '--[r]un' /proc/[0-9]*/cmdline | cut -d/ -f3)").split()
    own = {int(user) for user in users} - {0}  # root's are the wrappers outside
    assert len(own) == 2
    assert min(own) >= 65536


def test_each_agent_is_a_unit_with_its_bounds(host: BootedHost) -> None:
    told = shown(
        host, IRIS, "ActiveState", "Slice", "Delegate", "MemoryMax", "CPUQuotaPerSecUSec", "TasksMax", "Description"
    )
    assert told == {
        "ActiveState": "active",
        "Slice": "hyperhive-agents.slice",
        "Delegate": "yes",
        "MemoryMax": "1073741824",
        "CPUQuotaPerSecUSec": "1.500000s",
        "TasksMax": "300",
        "Description": f"hyperhive agent iris of {STATE}",
    }
    listed = host.ok("systemctl", "list-units", "--plain", "--no-legend", "--type=scope", "hyperhive-agent-*")
    assert {line.split()[0] for line in listed.splitlines()} == {MANAGER, IRIS}


def test_all_of_an_agent_is_in_its_unit_and_nothing_of_it_in_the_daemons(host: BootedHost) -> None:
    found = processes_of(host, IRIS)
    for part in ("hive-agent", "systemd-nspawn", "--run /run/hive", "printed.py"):
        assert any(part in line for line in found), (part, found)
    assert not any("nspawn" in line or "printed.py" in line for line in processes_of(host, SERVICE))


def test_a_container_is_called_as_the_agents_container_and_its_hive(host: BootedHost) -> None:
    assert agents(host)["iris"]["container"] == "h-iris"
    assert any(re.search(r"--machine=h-iris-[0-9a-f]{6} ", line) for line in processes_of(host, IRIS))


@pytest.mark.parametrize("mode", ["control-group", "mixed", "process"])
def test_agents_outlive_the_daemons_unit_with_any_kill_mode(host: BootedHost, mode: str) -> None:
    host.write(f"/etc/systemd/system/{SERVICE}.d/mode.conf", f"[Service]\nKillMode={mode}\n")
    host.ok("systemctl", "daemon-reload")
    before = lasting(host, IRIS, MANAGER)
    invocation = shown(host, IRIS, "InvocationID")["InvocationID"]
    restart(host)
    assert lasting(host, IRIS, MANAGER) == before
    adopted = [event for event in events(host, "agent_adopted") if event["agent"] == "iris"][-1]
    assert (adopted["data"]["unit"], adopted["data"]["invocation"]) == (IRIS, invocation)


def test_agents_outlive_a_daemon_that_is_killed(host: BootedHost) -> None:
    before = lasting(host, IRIS, MANAGER)
    main = shown(host, SERVICE, "MainPID")["MainPID"]
    host.ok("systemctl", "kill", "--signal=SIGKILL", SERVICE)
    look_until(lambda: shown(host, SERVICE, "MainPID", "ActiveState") != {"MainPID": main, "ActiveState": "active"})
    look_until(lambda: idle(host, "hm1nd", "iris"))
    assert lasting(host, IRIS, MANAGER) == before


@pytest.mark.parametrize(
    "end",
    [
        lambda host: host.ok("systemctl", "kill", "--signal=SIGKILL", IRIS),
        lambda host: host.ok("systemctl", "stop", IRIS),
    ],
    ids=["kill", "stop"],
)
def test_one_whose_unit_is_ended_has_crashed_and_is_started_in_a_new_one(
    host: BootedHost, end: Callable[[BootedHost], None]
) -> None:
    before = shown(host, IRIS, "InvocationID")
    others = lasting(host, MANAGER)
    end(host)
    look_until(lambda: shown(host, IRIS, "InvocationID") not in ({"InvocationID": ""}, before))
    look_until(lambda: idle(host, "iris"))
    assert lasting(host, MANAGER) == others


def stop_iris(host: BootedHost) -> None:
    host.ok("hive", "kill", "iris")
    look_until(lambda: agents(host)["iris"]["state"] == "down")
    look_until(lambda: shown(host, IRIS, "LoadState", "ActiveState")["ActiveState"] == "inactive")


def test_one_that_is_killed_leaves_no_unit(host: BootedHost) -> None:
    stop_iris(host)
    assert shown(host, IRIS, "LoadState") == {"LoadState": "not-found"}
    host.ok("hive", "start", "iris")
    look_until(lambda: idle(host, "iris"))


def test_another_unit_of_that_name_is_left_alone_and_that_agent_says_what_is_wrong(host: BootedHost) -> None:
    stop_iris(host)
    host.ok("sh", "-c", f"systemd-run --quiet --scope --unit={IRIS} sleep 1000 < /dev/null > /dev/null 2>&1 &")
    look_until(lambda: shown(host, IRIS, "ActiveState")["ActiveState"] == "active")
    foreign = processes_of(host, IRIS)
    host.run("hive", "start", "iris")
    told = rf"a unit of its name is not ours \(.*\); `systemctl stop {re.escape(IRIS)}`"
    look_until(lambda: re.search(told, str(agents(host)["iris"]["detail"])))
    assert processes_of(host, IRIS) == foreign
    assert idle(host, "hm1nd")
    host.ok("systemctl", "stop", IRIS)
    host.run("hive", "start", "iris")
    look_until(lambda: idle(host, "iris"))


def test_what_is_left_of_its_own_unit_is_cleared_away(host: BootedHost) -> None:
    stop_iris(host)
    options = ["--quiet", "--scope", f"--unit={IRIS}", f"--description=hyperhive agent iris of {STATE}"]
    host.run("systemd-run", *options, "--property=RuntimeMaxSec=100ms", "sleep", "1000")
    look_until(lambda: shown(host, IRIS, "ActiveState")["ActiveState"] == "failed")
    host.ok("hive", "start", "iris")
    look_until(lambda: idle(host, "iris"))


def test_processes_that_are_left_in_its_own_unit_are_ended(host: BootedHost) -> None:
    stop_iris(host)
    options = f"--quiet --scope --unit={IRIS} '--description=hyperhive agent iris of {STATE}'"
    host.ok("sh", "-c", f"systemd-run {options} sh -c 'trap : TERM; sleep 1000; sleep 1000' > /dev/null 2>&1 &")
    look_until(lambda: shown(host, IRIS, "ActiveState")["ActiveState"] == "active")
    host.ok("hive", "start", "iris")
    look_until(lambda: idle(host, "iris"))
    assert not any("sleep 1000" in line for line in processes_of(host, IRIS))


def test_that_the_kernel_killed_for_memory_is_told_from_what_systemd_says_of_the_unit(host: BootedHost) -> None:
    """No kernel of this machine ends one for its memory (its control groups are not v2), so the message is written."""
    invocation = shown(host, IRIS, "InvocationID")["InvocationID"]
    fields = ["MESSAGE_ID=fe6faa94e7774663a0da52717891d8ef", f"INVOCATION_ID={invocation}", "MESSAGE=killed"]
    host.ok("logger", "--journald", given="\n".join(fields) + "\n")
    host.ok("journalctl", "--sync")
    host.ok("systemctl", "kill", "--signal=SIGKILL", IRIS)
    look_until(lambda: shown(host, IRIS, "InvocationID") not in ({"InvocationID": ""}, {"InvocationID": invocation}))
    look_until(lambda: idle(host, "iris"))
    told = "the kernel killed 1 of its processes: together they held more than agent_memory_bytes, 1,073,741,824"
    assert told in host.ok("cat", f"{STATE}/processes/iris.log")


def test_doctor_says_that_agents_are_units(host: BootedHost) -> None:
    assert "each a unit in hyperhive-agents.slice" in host.run("hive", "doctor").stdout
