"""The daemon as the unit of nix/systemd, on a machine that booted systemd: its hardening, its user, its restarts.

It has no helper here, as with `services.hyperhive.helper.enable = false`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.booted.hive import BUBBLEWRAP, BY_DEFAULT, agents, ask_for_iris, idle, processes_of, runs_under, write_config
from tests.booted_host import BootedHost, booted_host
from tests.nix_pages import UNIT
from tests.processes import look_until

ADA = "ada"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    with booted_host(Path(tmp_path_factory.mktemp("host"))) as host:
        host.install(write_config(host), "[Service]\nWatchdogSec=8\n")
        host.ok("systemctl", "start", "hyperhive.service")
        yield host


def harnesses(host: BootedHost) -> set[str]:
    """The processes of agents."""
    return set(host.run("sh", "-c", "grep -lzx -e '--[r]un' /proc/[0-9]*/cmdline").stdout.split())


def restarts(host: BootedHost) -> int:
    """How often systemd has started the daemon again by itself."""
    return int(host.ok("systemctl", "show", "--value", "--property=NRestarts", "hyperhive.service"))


def files_of(host: BootedHost, unit: str) -> set[str]:
    """The same for all processes of a unit."""
    return {f"/proc/{line.split()[0]}/cmdline" for line in processes_of(host, unit)}


@pytest.fixture(scope="module")
def swarm(host: BootedHost) -> BootedHost:
    """The same with an agent that was asked for and approved."""
    ask_for_iris(host, ADA)
    return host


def test_it_is_ready_as_a_user_without_capabilities(host: BootedHost) -> None:
    shown = host.ok("systemctl", "show", "hyperhive.service", "--property=ActiveState,MainPID,NRestarts")
    properties = dict(line.split("=", 1) for line in shown.splitlines())
    assert (properties["ActiveState"], properties["NRestarts"]) == ("active", "0")
    status = host.ok("cat", f"/proc/{properties['MainPID']}/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["Uid"].split()[0] == host.ok("id", "-u", "hyperhive").strip() != "0"
    assert {fields[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")


def test_members_of_hive_admin_command_it_and_nobody_else(host: BootedHost) -> None:
    assert "hm1nd" in agents(host, ADA)
    refused = host.run("hive", "list", user="eve")
    assert refused.returncode == 4
    assert "/run/hyperhive/host.sock is not yours to open; ask who runs it" in refused.stderr


@pytest.mark.parametrize("user", ["", ADA])
def test_doctor_finds_nothing_wrong_with_what_belongs_to_the_daemons_user(host: BootedHost, user: str) -> None:
    said = host.run("hive", "doctor", user=user).stdout
    for check in ("state directory", "runtime directory", "sqlite"):
        assert f"\nok       {check:<18} " in said, said


def test_its_agents_have_sandboxes_in_its_own_unit(swarm: BootedHost) -> None:
    assert {agent["sandbox"] for agent in agents(swarm, ADA).values()} == {"bwrap"}
    assert harnesses(swarm) <= files_of(swarm, "hyperhive.service")


def test_agents_live_on_when_it_is_restarted(swarm: BootedHost) -> None:
    before = harnesses(swarm)
    assert before
    swarm.ok("systemctl", "restart", "hyperhive.service")
    look_until(lambda: idle(swarm, "hm1nd", "iris", user=ADA))
    assert harnesses(swarm) == before


def test_one_that_hangs_is_restarted_by_the_watchdog_and_its_agents_live_on(swarm: BootedHost) -> None:
    before, known = harnesses(swarm), restarts(swarm)
    swarm.ok("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "hyperhive.service")
    look_until(lambda: restarts(swarm) > known)
    look_until(lambda: idle(swarm, "hm1nd", "iris", user=ADA))
    assert harnesses(swarm) == before


# -- the hardening ----------------------------------------------------------------------------------------------------


def test_bubblewrap_works_under_the_hardening(host: BootedHost) -> None:
    assert runs_under(host, UNIT, BUBBLEWRAP)


# ProtectKernelLogs does so too on a machine of its own; systemd-nspawn keeps a second, whole /proc, which hides that.
@pytest.mark.parametrize(
    "line",
    [
        "RestrictNamespaces=yes",
        "ProtectKernelTunables=yes",
        "ProcSubset=pid",
        "ProtectHostname=yes",
        "SystemCallFilter=~sethostname",
        "SystemCallFilter=~@mount",
    ],
)
def test_each_line_that_is_left_out_would_keep_bubblewrap_from_its_sandbox(host: BootedHost, line: str) -> None:
    assert not runs_under(host, UNIT, BUBBLEWRAP, line)


# -- the helper -------------------------------------------------------------------------------------------------------


def start_anew(host: BootedHost, *settings: str) -> set[str]:
    """Restart the daemon with these settings; the harnesses, as soon as each agent has another than before."""
    before = harnesses(host)
    host.write("/etc/hyperhive/config.toml", write_config(host, *settings))
    host.ok("systemctl", "restart", "hyperhive.service")
    look_until(lambda: idle(host, "hm1nd", "iris", user=ADA) and harnesses(host).isdisjoint(before))
    return harnesses(host)


def test_a_hive_that_is_given_the_helper_and_loses_it_again_has_each_agent_once(swarm: BootedHost) -> None:
    """The last one here: it changes the hive."""
    swarm.install_helper()
    found = start_anew(swarm, *(f'{key} = "{value}"' for key, value in BY_DEFAULT.items()))
    assert not found & files_of(swarm, "hyperhive.service"), "the proxy of agents is in there beside the daemon"
    assert len(files_of(swarm, "hyperhive-root.service")) == 1
    shown = swarm.ok("systemctl", "list-units", "--plain", "--no-legend", "--type=scope", "hyperhive-agent-*")
    units = [line.split()[0] for line in shown.splitlines()]
    assert len(units) == 2
    assert found <= {file for unit in units for file in files_of(swarm, unit)}

    swarm.remove_helper()
    assert start_anew(swarm) <= files_of(swarm, "hyperhive.service")
