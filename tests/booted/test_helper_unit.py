"""The daemon as a user without rights, and the helper that is root, as the units of nix/systemd on a booted machine.

Agents are started as the module of NixOS has it by default: in bubblewrap, by the helper.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.booted.hive import (
    BUBBLEWRAP,
    BY_DEFAULT,
    agents,
    ask_for_iris,
    idle,
    lasting,
    processes_of,
    runs_under,
    shown,
    write_config,
)
from tests.booted_host import BootedHost, booted_host
from tests.nix_pages import DROP_IN, HELPER_UNIT
from tests.processes import look_until

ADA = "ada"
LOOK = ("sh", "-c", "id -u; grep -c ^Cap.*0000000000000000 /proc/self/status")
NETWORK = ("readlink", "/proc/self/ns/net")
GIT = "/srv/git"  # where the operator keeps repositories
WORK = """cd /projects/site && git checkout -q -b iris/fix && git commit -q --allow-empty -m mine && git push -q 2>&1
cat .git/objects/info/alternates; git count-objects -v | grep in-pack"""
DAEMON, HELPER = "hyperhive.service", "hyperhive-root.service"
BOUNDS = ("agent_memory_bytes = 268435456", "agent_cpu_percent = 150", "agent_tasks = 300")
MORE = ("restart_s = 0.1", 'claude = "/usr/bin/true"', 'host_network = ["iris"]', *BOUNDS)
SETTINGS = (*(f'{key} = "{value}"' for key, value in BY_DEFAULT.items()), *MORE)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    with booted_host(Path(tmp_path_factory.mktemp("host"))) as host:
        host.hold_memory()
        host.install(write_config(host, *SETTINGS), f"[Service]\nRestartSec=100ms\nReadWritePaths=-{GIT}\n")
        host.install_helper()
        host.ok("systemctl", "start", DAEMON)
        ask_for_iris(host, ADA)
        yield host


def units(host: BootedHost) -> dict[str, set[str]]:
    """The agents' units, and what is in them for as long as the agent lives."""
    listed = host.ok("systemctl", "list-units", "--plain", "--no-legend", "--type=scope", "hyperhive-agent-*")
    names = [line.split()[0] for line in listed.splitlines()]
    return {name: lasting(host, name) for name in names}


def ready(host: BootedHost) -> bool:
    return idle(host, "hm1nd", "iris", user=ADA)


def run_in(host: BootedHost, name: str, *command: str) -> dict[str, object]:
    """How a command ended in an agent's container: {code, output}."""
    request = json.dumps({"verb": "exec", "name": name, "command": command})
    ask = (
        "import socket, sys; sock = socket.socket(socket.AF_UNIX); sock.connect('/run/hyperhive-root/helper.sock');"
        " sock.sendall(sys.argv[1].encode() + b'\\n'); print(sock.makefile().readline())"
    )
    answer: dict[str, object] = json.loads(host.ok("python3", "-c", ask, request))
    return answer


def status(host: BootedHost, pid: str) -> dict[str, str]:
    fields = dict(line.split(":\t", 1) for line in host.ok("cat", f"/proc/{pid}/status").splitlines())
    return {name: value.strip() for name, value in fields.items()}


def test_the_daemon_is_a_user_without_a_capability(host: BootedHost) -> None:
    fields = status(host, shown(host, DAEMON, "MainPID")["MainPID"])
    assert fields["Uid"].split()[0] == host.ok("id", "-u", "hyperhive").strip() != "0"
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}


def test_who_approved_is_told_by_the_uid_that_the_host_knows(host: BootedHost) -> None:
    card = json.loads(host.ok("hive", "show", "1", "--json", user=ADA))
    assert card["resolved_from"] == f"host.sock, uid {host.ok('id', '-u', ADA).strip()}"


def test_each_agent_is_a_unit_of_its_own_of_the_daemons_user(host: BootedHost) -> None:
    assert {agent["sandbox"] for agent in agents(host, ADA).values()} == {"bwrap"}
    found = units(host)
    assert len(found) == 2
    for unit, lines in found.items():
        assert shown(host, unit, "Slice") == {"Slice": "hyperhive-agents.slice"}
        wrapper = next(words[0] for words in map(str.split, lines) if words[1:] and words[1].endswith("bwrap"))
        fields = status(host, wrapper)
        assert fields["Uid"].split()[0] == host.ok("id", "-u", "hyperhive").strip()
        assert (fields["CapBnd"], fields["NoNewPrivs"]) == ("0" * 16, "1")


def test_its_unit_has_the_bounds_of_an_agent(host: BootedHost) -> None:
    wanted = {"MemoryMax": "268435456", "CPUQuotaPerSecUSec": "1.500000s", "TasksMax": "300"}
    for unit in units(host):
        assert shown(host, unit, *wanted) == wanted


def test_an_agent_that_takes_more_memory_than_its_bound_is_held_to_it(host: BootedHost) -> None:
    if not host.holds_memory:
        pytest.skip("this machine has no control group for memory that another systemd could be given")
    before, take = units(host), "import sys; print(len(bytearray(int(sys.argv[1]) << 20)) >> 20)"
    assert run_in(host, "iris", "python3", "-c", take, "64") == {"code": 0, "output": "64\n"}
    assert run_in(host, "iris", "python3", "-c", take, "512")["code"] == -9
    assert units(host) == before
    assert ready(host)


def test_the_helper_answers_nobody_but_the_daemons_user(host: BootedHost) -> None:
    assert host.ok("stat", "-c", "%U %a", "/run/hyperhive-root/helper.sock") == "hyperhive 600\n"


def test_a_command_runs_in_a_container_under_the_helpers_hardening_and_has_no_right(host: BootedHost) -> None:
    assert run_in(host, "iris", *LOOK) == {"code": 0, "output": "0\n5\n"}


def proxies(host: BootedHost) -> set[str]:
    return {line for line in processes_of(host, DAEMON) if line.endswith("-m hive_core.egress")}


def test_the_proxy_runs_under_the_daemons_hardening_and_its_own(host: BootedHost) -> None:
    ask = (
        "import socket; sock = socket.socket(socket.AF_UNIX); sock.connect('/run/hive/egress.sock');"
        " sock.sendall(b'CONNECT example.org:443 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(sock.recv(4096))"
    )
    # The first connection starts it.
    assert "403 cannot connect: example.org:443 is not in egress" in str(run_in(host, "iris", "python3", "-c", ask))
    (proxy,) = proxies(host)
    fields = status(host, proxy.split()[0])
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


def test_nothing_of_an_agent_is_in_the_units_of_the_two(host: BootedHost) -> None:
    assert len(processes_of(host, DAEMON) - proxies(host)) == 1, processes_of(host, DAEMON)
    assert len(processes_of(host, HELPER)) == 1, processes_of(host, HELPER)


@pytest.mark.parametrize("unit", [DAEMON, HELPER])
def test_agents_live_on_when_one_of_the_two_is_restarted(host: BootedHost, unit: str) -> None:
    before = units(host)
    host.ok("systemctl", "restart", unit)
    look_until(lambda: ready(host))
    assert units(host) == before


def test_a_daemon_tells_which_unit_it_adopted_though_its_wrapper_is_roots(host: BootedHost) -> None:
    host.ok("systemctl", "restart", DAEMON)
    look_until(lambda: ready(host))
    events = [json.loads(line) for line in host.ok("hive", "events", "--json", user=ADA).splitlines()]
    last = {event["agent"]: event["data"] for event in events if event["kind"] == "agent_adopted"}
    told = {data.get("unit"): data.get("invocation") for data in last.values()}
    assert told == {unit: shown(host, unit, "InvocationID")["InvocationID"] for unit in units(host)}


@pytest.mark.parametrize("unit", [DAEMON, HELPER])
def test_agents_live_on_when_one_of_the_two_is_killed(host: BootedHost, unit: str) -> None:
    before, main = units(host), shown(host, unit, "MainPID")["MainPID"]
    host.ok("systemctl", "kill", "--signal=SIGKILL", unit)
    look_until(lambda: shown(host, unit, "MainPID")["MainPID"] not in (main, "0"))
    look_until(lambda: ready(host))
    assert units(host) == before


def test_an_agent_is_ended_and_started_through_helpers_that_came_later(host: BootedHost) -> None:
    before = units(host)
    host.ok("hive", "kill", "iris", user=ADA)
    look_until(lambda: len(units(host)) == 1)
    host.ok("hive", "start", "iris", user=ADA)
    look_until(lambda: ready(host))
    assert set(units(host)) == set(before)


def deploy(host: BootedHost, change: str) -> None:
    """What a shell changes in iris's proposed repository is asked for, approved, and runs."""
    change = (
        f"cd /var/lib/hyperhive/proposed/iris/config && {change} && git -c user.name=x -c user.email=x@x commit -qam x"
    )
    host.ok(*AS_THE_DAEMON.split(), "sh", "-c", change)
    asked = json.loads(host.ok("hive", "apply", "iris", "HEAD", "--json", user=ADA))["approval"]
    digest = json.loads(host.ok("hive", "show", str(asked), "--json", user=ADA))["digest"]
    host.ok("hive", "approve", str(asked), "--digest", digest, user=ADA)
    look_until(lambda: ready(host))


def test_an_agent_works_on_a_repository_of_the_host_that_the_hardened_unit_may_write(host: BootedHost) -> None:
    host.ok("sh", "-c", f"git init -q --bare -b main {GIT}/site.git && chown -R hyperhive {GIT}")
    commit = "git commit-tree -m first $(git hash-object -t tree -w --stdin < /dev/null)"
    first = f"git update-ref refs/heads/main $(GIT_AUTHOR_NAME=x GIT_COMMITTER_NAME=x {commit})"
    host.ok(*AS_THE_DAEMON.split(), "sh", "-c", f"cd {GIT}/site.git && export EMAIL=x@x && {first}")
    host.ok("systemctl", "restart", DAEMON)
    look_until(lambda: ready(host))
    host.ok("hive", "project", "add", "site", f"{GIT}/site.git", user=ADA)
    steps = [{"run": WORK, "save": "said"}, {"tool": "send", "args": {"to": "operator", "body": "worked: {said}"}}]
    script = json.dumps([{"from": "operator", "match": "work", "do": steps}])
    host.write("/etc/hyperhive/iris.md", f"You work.\n\n```rehearsal\n{script}\n```\n")
    listed = 'projects = [{ name = "site" }]'
    deploy(host, f"cp /etc/hyperhive/iris.md CLAUDE.md && echo '{listed}' >> agent.toml")
    host.ok("hive", "send", "iris", "work", user=ADA)

    def heard() -> list[str]:
        mail = json.loads(host.ok("hive", "inbox", "--json", user=ADA))["messages"]
        return [one["body"] for one in mail if one["body"].startswith("worked: ")]

    assert [said.split("\n") for said in look_until(heard)] == [["worked: /mirrors/site/objects", "in-pack: 0"]]
    refs = host.ok("git", "-c", "safe.directory=*", "-C", f"{GIT}/site.git", "for-each-ref", "--format=%(refname)")
    assert refs.split() == ["refs/heads/main", "refs/hive/iris/iris/fix"]


def test_an_agent_gets_the_hosts_network_from_a_helper_whose_unit_has_none(host: BootedHost) -> None:
    of_host = host.ok("readlink", "/proc/1/ns/net")
    assert host.ok("readlink", f"/proc/{shown(host, HELPER, 'MainPID')['MainPID']}/ns/net") != of_host
    assert run_in(host, "iris", *NETWORK)["output"] != of_host
    deploy(host, "echo 'network = \"host\"' >> agent.toml")
    assert run_in(host, "iris", *NETWORK) == {"code": 0, "output": of_host}
    assert run_in(host, "hm1nd", *NETWORK)["output"] != of_host
    # The units' filter lets the harness give up the abstract sockets of the host, where the kernel can do that.
    can = ctypes.CDLL(None).syscall(444, None, ctypes.c_ulong(0), 1) >= 6  # landlock_create_ruleset(2)
    assert ("abstract sockets" in host.ok("hive", "logs", "iris", user=ADA)) == (not can)


def test_without_the_helper_the_agents_go_on_and_work(host: BootedHost) -> None:
    host.ok("systemctl", "stop", HELPER)
    host.ok("hive", "send", "iris", "Hello.", user=ADA)
    look_until(lambda: json.loads(host.ok("hive", "turns", "iris", "--json", user=ADA)))
    host.ok("systemctl", "start", HELPER)
    look_until(lambda: ready(host))


# -- the hardening ----------------------------------------------------------------------------------------------------

NSPAWN = (
    "systemd-nspawn --quiet --settings=no --register=no --keep-unit --directory=/ --volatile=yes --machine=hive-tried"
    " --private-network --private-users=1000000:65536 --private-users-ownership=off --console=pipe -- true"
)
NEEDED = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "MKNOD", "SETGID", "SETUID", "SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE")
AS_THE_DAEMON = "setpriv --reuid=hyperhive --regid=hive-admin --clear-groups --bounding-set=-all --no-new-privs "


@pytest.mark.parametrize("command", [NSPAWN, AS_THE_DAEMON + BUBBLEWRAP], ids=["nspawn", "bwrap"])
def test_containers_can_be_made_under_the_helpers_hardening(host: BootedHost, command: str) -> None:
    assert runs_under(host, HELPER_UNIT, command, "Delegate=yes")


@pytest.mark.parametrize(
    "line",
    [
        "RestrictNamespaces=yes",
        "ProtectControlGroups=yes",
        "PrivateDevices=yes",
        "PrivateUsers=yes",
        "SystemCallFilter=~@mount",
        *(f"CapabilityBoundingSet=~CAP_{name}" for name in NEEDED),
    ],
)
def test_each_line_that_is_left_out_would_keep_nspawn_from_its_container(host: BootedHost, line: str) -> None:
    assert not runs_under(host, HELPER_UNIT, NSPAWN, "Delegate=yes", line)


@pytest.mark.parametrize(
    "line",
    [
        "ProtectKernelTunables=yes",
        "ProcSubset=pid",
        "ProtectHostname=yes",
        "SystemCallFilter=~sethostname",
        "RestrictAddressFamilies=~AF_NETLINK",
    ],
)
def test_each_line_that_is_left_out_would_keep_bubblewrap_from_its_sandbox(host: BootedHost, line: str) -> None:
    assert not runs_under(host, HELPER_UNIT, AS_THE_DAEMON + BUBBLEWRAP, line)


def test_the_daemons_own_hardening_leaves_no_way_to_a_sandbox(host: BootedHost) -> None:
    assert not runs_under(host, DROP_IN, BUBBLEWRAP)
    refused = host.run("hive", "login", user=ADA)
    why = "cannot log in: it needs a sandbox, and with the helper the daemon's unit is hardened so far that it can make"
    assert why in refused.stderr
    assert "; run `claude setup-token` as yourself, here or elsewhere, and give its token to" in refused.stderr


def test_a_hive_that_changes_to_nspawn_has_agents_with_uids_of_their_own(host: BootedHost) -> None:
    """The last one here: it changes the hive."""
    before = units(host)
    host.write("/etc/hyperhive/config.toml", write_config(host, 'sandbox = "nspawn"', *SETTINGS[1:]))
    host.ok("systemctl", "restart", HELPER, DAEMON)
    look_until(lambda: ready(host) and {agent["sandbox"] for agent in agents(host, ADA).values()} == {"nspawn"})
    found = units(host)
    assert set(found) == set(before)
    pids = {line.split()[0] for lines in found.values() for line in lines if " serve --run /run/hive" in line}
    users = {int(status(host, pid)["Uid"].split()[0]) for pid in pids if pid.isdecimal()} - {0}  # root's: wrappers
    assert len(users) == 2
    assert min(users) >= 65536
    assert run_in(host, "iris", *LOOK) == {"code": 0, "output": "0\n5\n"}
    assert run_in(host, "iris", *NETWORK) == {"code": 0, "output": host.ok("readlink", "/proc/1/ns/net")}
