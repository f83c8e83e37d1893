"""NixOS containers of a daemon without rights, through the helper as its unit: on a machine that booted systemd, whose
containers are units of it. nixos-container itself, and what is in the containers, are the stand-in's.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.containers.mounts import agent_dirs
from hive_core.protocol.words import AgentName
from tests import nix_pages
from tests.booted.hive import runs_under, shown
from tests.booted.test_nixos_containers import TEMPLATE, UNIT
from tests.booted_host import SOURCE, VENV, BootedHost, booted_host
from tests.needs import missing
from tests.nix_pages import HELPER_UNIT
from tests.nix_pages import UNIT as DAEMON_UNIT
from tests.processes import look_until

HELPER, DAEMON_USER = "hyperhive-root.service", "hyperhive:hive-admin"
STATE, STAGE = "/var/lib/hyperhive", "/var/lib/hyperhive-root/stage"
CONFIG = """\
state_dir = "/var/lib/hyperhive"
runtime_dir = "/run/hyperhive"
sandbox = "nixos-container"
helper = "/run/hyperhive-root/helper.sock"
claude = "/usr/bin/true"
agent_memory_bytes = 1073741824
"""
PROGRAMS = "[Service]\nEnvironment=PATH=/var/lib/standin/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin\n"
NIX_CONF = "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =\nsandbox = false\n"
NIX_DAEMON = "[Service]\nExecStart=/usr/bin/nix-daemon\n"
# As root: `python system.py SCRIPT ONESHOT INIT` puts a system into the store.
SYSTEM = """\
import sys
from pathlib import Path
from tests.containers.standin.host import StandInHost
stand_in = StandInHost(Path("/"), Path("/var/lib/standin/bin"), booted=True)
script, oneshot, init = sys.argv[1:]
print(stand_in.system(script, {"once": oneshot} if oneshot else {}, init), end="")
"""
# As root: `python flake.py SCRIPT` writes a flake with a system for iris, which nix has to build.
FLAKE = """\
import sys
from pathlib import Path
from tests.containers.standin.host import system_files, write_program
for name, text in system_files(sys.argv[1], {}).items():
    write_program(Path("/srv/flake/system") / name, text)
words = 'args = [ "-c" "/usr/bin/cp -r ${./system} $out" ];'
output = f'derivation {{ name = "nixos-system-iris"; system = "x86_64-linux"; builder = "/bin/sh"; {words} }}'
flake = f"{{ outputs = _: {{ nixosConfigurations.iris.config.system.build.toplevel = {output}; }}; }}"
Path("/srv/flake/flake.nix").write_text(flake)
"""
# As the daemon's user; each call is a daemon of its own: `python daemon.py VERB [WORD]`.
DAEMON = """\
import json, os, sys, trio
from pathlib import Path
from hive_core.containers.helped import Helper
from hive_core.containers.helped_systems import PATIENCE_OF_S, HelpedSystems
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.nixos_build import SystemBuilds
from hive_core.containers.process import ProcessDriver
from hive_core.flakes.nix import Nix
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName

assert os.getuid() != 0
IRIS, STATE, RUN, KIND = AgentName("iris"), Path("/var/lib/hyperhive"), Path("/run/hyperhive"), "nixos-container"

async def main(verb, word=""):
    driver = HelpedSystems(
        Helper(Path("/run/hyperhive-root/helper.sock"), STATE, RUN, KIND, PATIENCE_OF_S), KIND,
        ProcessDriver(STATE, sandbox="", claude=None, orphan_grace_s=600),
        SystemBuilds(STATE, build_s=60),
    )
    dirs = agent_dirs(STATE, RUN, IRIS)
    if verb in ("switch", "roll_back", "current", "destroy"):
        try:
            return await getattr(driver, verb)(IRIS, *([word] if word else []))
        except Refusal as refusal:
            return refusal.message
    if verb == "build":
        words = ["eval", "--raw", f"{word}#nixosConfigurations.iris.config.system.build.toplevel.drvPath"]
        derivation = await Nix(STATE / "nix").run(words, readable=[Path("/srv/flake")])
        return await driver.switch(IRIS, await driver.build(IRIS, derivation.decode()))
    if verb == "start":
        return (await driver.start(IRIS, dirs)).pid
    if verb in ("find", "stop", "kill", "wait"):
        running = await driver.find(IRIS, dirs)
        if running is None or verb == "find":
            return running and running.pid
        if verb != "wait":
            getattr(running, verb)()
        return (await running.wait()).code
    if verb == "missed":
        exit_ = await driver.missed_exit(IRIS)
        return exit_ and exit_.code
    if verb == "said":
        return [await driver.last_words(IRIS), await driver.logs(IRIS)]
    if verb == "exec":
        done = await driver.exec(IRIS, dirs, ["/bin/sh", "-c", word])
        return [done.code, done.output]

print(json.dumps(trio.run(main, *sys.argv[1:])))
"""
PYTHON = ("env", f"PYTHONPATH={SOURCE}", f"{VENV}/bin/python", "-P")
# Each of an agent's directories, and the file system in memory that they stand in.
STAGED = len(agent_dirs(Path("/"), Path("/"), AgentName("iris")).mounts) + 1


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    if why := missing("nix"):
        pytest.skip(why)
    with booted_host(Path(tmp_path_factory.mktemp("host")), "tests") as host:
        host.write("/etc/systemd/system/container@.service", TEMPLATE)
        host.write("/opt/hive/system.py", SYSTEM)
        host.write("/opt/hive/daemon.py", DAEMON)
        host.install(CONFIG, "")
        host.install_helper()
        helper = nix_pages.evaluate("(import ./nix/systemd/helper.nix).Containers")
        host.write(f"/etc/systemd/system/{HELPER}.d/containers.conf", nix_pages.drop_in_text(helper))
        host.write(f"/etc/systemd/system/{HELPER}.d/programs.conf", PROGRAMS)
        host.write("/etc/systemd/system/nix-daemon.service", NIX_DAEMON)
        host.write("/etc/nix/nix.conf", NIX_CONF)
        host.ok("mkdir", "/var/lib/standin")
        system(host, "true")  # which makes the rest of the stand-in
        # nix is the real one, whose daemon serves the store.
        host.ok("sh", "-c", "rm /var/lib/standin/bin/nix /var/lib/standin/bin/nix-*")
        host.ok("mkdir", "-p", *helper["ReadWritePaths"])
        for folder in (STATE, "/run/hyperhive"):
            host.ok("install", "-d", "-m", "700", "-o", "hyperhive", "-g", "hive-admin", folder)
        host.ok("systemctl", "daemon-reload")
        host.ok("systemctl", "start", "nix-daemon", HELPER)
        yield host


def system(host: BootedHost, script: str, oneshot: str = "", init: str = "") -> str:
    return host.ok(*PYTHON, "/opt/hive/system.py", script, oneshot, init)


def daemon(host: BootedHost, *words: str) -> Any:
    """What one daemon that does one thing says."""
    return json.loads(host.ok(*PYTHON, "/opt/hive/daemon.py", *words, user=DAEMON_USER))


def staged(host: BootedHost) -> list[str]:
    """What stands where the host's systemd would find an agent's directories."""
    lines = host.ok("cat", "/proc/1/mountinfo").splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(STAGE)]


def of_hive(host: BootedHost) -> list[str]:
    """All that is mounted on the host from, or below, a directory of the hive's."""
    return [line for line in host.ok("cat", "/proc/1/mountinfo").splitlines() if "hyperhive" in line]


def main_pid(host: BootedHost) -> str:
    return shown(host, HELPER, "MainPID")["MainPID"]


def state(host: BootedHost, unit: str) -> str:
    return shown(host, unit, "ActiveState")["ActiveState"]


def test_the_container_of_a_daemon_without_rights_is_a_unit_of_the_hosts_with_uids_of_its_own(host: BootedHost) -> None:
    assert daemon(host, "switch", system(host, "echo begun; echo mine > /state/made; exec sleep 1000")) is None
    mounts = of_hive(host)
    pid = daemon(host, "start")
    assert of_hive(host) == mounts, "nothing stays mounted on the host"
    properties = ("ActiveState", "MainPID", "MemoryMax", "Slice")
    assert shown(host, UNIT, *properties) == {
        "ActiveState": "active",
        "MainPID": str(pid),
        "MemoryMax": "1073741824",
        "Slice": "hyperhive-agents.slice",
    }
    assert daemon(host, "find") == pid
    look_until(lambda: host.run("test", "-s", f"{STATE}/agents/iris/state/made").returncode == 0)
    code, said = daemon(host, "exec", "pwd; id -u; cat /state/made; cut -c -22 /proc/self/uid_map")
    assert (code, said.split()[:3]) == (0, ["/state", "0", "mine"])
    assert int(said.split()[4]) >= 0x80000
    assert host.ok("stat", "-c", "%U", f"{STATE}/agents/iris/state/made") == "hyperhive\n"
    assert host.ok("stat", "-c", "%U %a", STAGE) == "root 700\n"
    assert daemon(host, "said") == ["begun", ["begun"]]


def test_a_container_lives_on_when_the_helper_is_restarted_or_killed(host: BootedHost) -> None:
    before = shown(host, UNIT, "MainPID", "InvocationID")
    host.ok("systemctl", "restart", HELPER)
    assert daemon(host, "find") == int(before["MainPID"])
    main = main_pid(host)
    host.ok("systemctl", "kill", "--signal=SIGKILL", HELPER)
    look_until(
        lambda: main_pid(host) not in (main, "0") and shown(host, HELPER, "ActiveState")["ActiveState"] == "active"
    )
    assert daemon(host, "find") == int(before["MainPID"])
    assert shown(host, UNIT, "MainPID", "InvocationID") == before


def test_a_switch_that_fails_is_undone_and_one_that_does_not_can_be_gone_back_from(host: BootedHost) -> None:
    first, before = daemon(host, "current"), shown(host, UNIT, "MainPID")
    refused = daemon(host, "switch", system(host, "exec sleep 1002", "exit 1"))
    assert refused.startswith("cannot switch iris (code 4): a unit of the new system failed: ")
    assert refused.endswith("it has the system before again")
    # Activating one makes setuid wrappers.
    wrapper = "touch /run/wrapper && chmod 4755 /run/wrapper && echo done > /run/once"
    assert daemon(host, "switch", system(host, "exec sleep 1001", wrapper)) is None
    assert daemon(host, "exec", "cat /run/once") == [0, "done\n"]
    assert daemon(host, "roll_back") == first
    assert shown(host, UNIT, "MainPID") == before
    assert "nix does not know it" in daemon(host, "switch", plant(host))


def plant(host: BootedHost) -> str:
    """A system in the store's directory that nix was not told of."""
    path = f"/nix/store/{'0' * 32}-planted"
    host.ok("cp", "-r", system(host, "true"), path)
    return path


def test_a_container_that_was_beginning_when_the_helper_was_killed_leaves_no_mounts_on_the_host(
    host: BootedHost,
) -> None:
    daemon(host, "kill")
    daemon(host, "switch", system(host, "", init="#!/bin/sh\nsleep 1000\n"))  # it never is ready
    ask = [*host.entering(DAEMON_USER), *PYTHON, "/opt/hive/daemon.py", "start"]
    with subprocess.Popen(ask, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as starting:
        look_until(lambda: len(staged(host)) == STAGED and shown(host, UNIT, "MainPID")["MainPID"] != "0")
        main = main_pid(host)
        host.ok("systemctl", "kill", "--signal=SIGKILL", HELPER)
        look_until(lambda: main_pid(host) not in (main, "0"))
        look_until(lambda: not staged(host))
        assert starting.wait(60) != 0
    look_until(lambda: host.run("ls", "-A", STAGE).stdout == "")
    daemon(host, "kill")


def test_how_it_ends_is_told_also_when_no_helper_was_there(host: BootedHost) -> None:
    daemon(host, "switch", system(host, "while [ ! -e /state/go ]; do sleep 0.1; done; rm /state/go; exit 9"))
    daemon(host, "start")
    host.ok("systemctl", "stop", HELPER)
    host.ok("touch", f"{STATE}/agents/iris/state/go")
    look_until(lambda: state(host, UNIT) == "failed")
    host.ok("systemctl", "reset-failed", UNIT)  # and systemd itself has forgotten it
    host.ok("systemctl", "start", HELPER)
    assert daemon(host, "find") is None
    assert [daemon(host, "missed"), daemon(host, "missed")] == [9, None]
    daemon(host, "switch", system(host, "trap 'echo goes; exit 5' TERM; echo here; while :; do sleep 0.05; done"))
    daemon(host, "start")
    look_until(lambda: "here" in daemon(host, "said")[0])  # it knows by then what to do when it is asked
    assert daemon(host, "stop") == 5


def test_the_daemons_unit_builds_a_system_by_asking_nix_and_has_the_helper_switch_to_it(host: BootedHost) -> None:
    host.write("/opt/hive/flake.py", FLAKE)
    host.ok(*PYTHON, "/opt/hive/flake.py", "exit 6")
    before = daemon(host, "current")
    build = " ".join([*PYTHON, "/opt/hive/daemon.py", "build", "path:/srv/flake"])
    assert runs_under(host, DAEMON_UNIT, build, f"ReadWritePaths={STATE}"), host.run("journalctl", "-n", "30").stdout
    assert daemon(host, "current") not in (None, before)
    daemon(host, "start")
    look_until(lambda: daemon(host, "find") is None)
    assert daemon(host, "missed") == 6
    assert host.run("ls", f"{STATE}/processes").stdout == "", "what was built is kept by the container's profile"


def test_a_reload_of_a_containers_unit_runs_nothing_of_the_agents_system(host: BootedHost) -> None:
    """A host that is rebuilt may reload all its containers, by a command that is not sure to enter the agent's uids."""
    assert "ExecReload=/usr/bin/touch /run/reloaded\n" in TEMPLATE
    daemon(host, "switch", system(host, "exec sleep 1000"))
    daemon(host, "start")
    host.ok("systemctl", "reload", UNIT)
    assert host.run("test", "-e", "/run/reloaded").returncode != 0
    daemon(host, "kill")


def test_nothing_is_left_of_one_that_is_destroyed(host: BootedHost) -> None:
    assert daemon(host, "destroy") is None
    assert host.ok("ls", "/etc/nixos-containers", "/var/lib/hyperhive-root/processes", STAGE).count("iris") == 0
    assert shown(host, UNIT, "DropInPaths") == {"DropInPaths": ""}
    assert host.ok("cat", "/var/lib/hyperhive-root/uid_ranges.json") == "{}"


def test_a_helper_that_hangs_is_restarted_by_systemd(host: BootedHost) -> None:
    """The last one here: it changes the unit."""
    assert "WatchdogSec=60\n" in HELPER_UNIT.read_text()
    host.write(f"/etc/systemd/system/{HELPER}.d/watchdog.conf", "[Service]\nWatchdogSec=5\nTimeoutAbortSec=1\n")
    host.ok("systemctl", "daemon-reload")
    host.ok("systemctl", "restart", HELPER)
    main = main_pid(host)
    host.ok("kill", "-STOP", main)
    look_until(lambda: main_pid(host) not in (main, "0"))
    look_until(lambda: "watchdog" in host.ok("journalctl", "--quiet", f"--unit={HELPER}").lower())
    assert look_until(lambda: daemon(host, "current") is None)
