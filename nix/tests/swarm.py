"""Runs in the driver of a NixOS test, which gives `machine`, `start_all` and `subtest`."""

# ruff: noqa: F821

import json

CHANGED = "/run/booted-system/specialisation/changed/bin/switch-to-configuration test"
GIT = "runuser -u hyperhive -- git -C /var/lib/hyperhive/applied/iris.git"
BASE = "/run/booted-system/bin/switch-to-configuration test"


def hive(words, user="ada"):
    """What `hive WORDS --json` says, as that user."""
    return json.loads(machine.succeed(f"su - {user} -c 'hive {words} --json'"))


def agents():
    return {agent["name"]: agent for agent in hive("list")["agents"]}


def pending():
    """The one request that waits, as soon as there is one."""
    machine.wait_until_succeeds("su - ada -c 'hive pending --json' | grep -q '\"id\"'", timeout=60)
    (approval,) = hive("pending")["approvals"]
    return approval


def approve(approval):
    """Click, and wait for the end: what became of it."""
    by = f"--digest {approval['digest']}"
    _, said = machine.execute(f"su - ada -c 'hive approve {approval['id']} {by} --json'")
    return json.loads(said)


def units():
    """The units of agents."""
    listed = machine.succeed("systemctl list-units --plain --no-legend --type=scope 'hyperhive-agent-*'")
    return [line.split()[0] for line in listed.splitlines()]


def group(unit):
    """Where a unit's control group is."""
    return "/sys/fs/cgroup" + machine.succeed(f"systemctl show --property=ControlGroup --value {unit}").strip()


def harnesses():
    """The processes of agents: they outlive the daemon."""
    return set(machine.succeed("pgrep -f 'serve --run' || true").split())


start_all()
machine.wait_for_unit("hyperhive.service")

with subtest("the unit answers under the name of the original, too"):
    machine.succeed("systemctl is-active hive-c0re.service")

with subtest("agents have their sandboxes under the hardened unit"):
    assert agents()["hm1nd"]["sandbox"] == "bwrap"

with subtest("only members of hive-admin command the daemon"):
    machine.fail("su - eve -c 'hive list'")

with subtest("an agent is asked for, shown and approved"):
    hive('send hm1nd "I want an agent that draws."')
    approval = pending()
    assert (approval["kind"], approval["agent"]) == ("spawn", "iris"), approval
    approve(approval)
    machine.wait_until_succeeds("su - ada -c 'hive list --json' | grep -q iris", timeout=60)

with subtest("each agent is a unit outside of the daemon's and the helper's, which holds it to its memory"):
    machine.wait_for_unit("hyperhive-root.service")
    machine.wait_until_succeeds(
        "test $(systemctl list-units --plain --no-legend --type=scope 'hyperhive-agent-*' | wc -l) = 2", timeout=60
    )
    for unit in units():
        machine.succeed(f"grep -qx {1024 << 20} {group(unit)}/memory.max")
    for service in ("hyperhive.service", "hyperhive-root.service"):
        # git comes and goes below the daemon.
        machine.wait_until_succeeds(f"test $(wc -l < {group(service)}/cgroup.procs) = 1", timeout=60)

with subtest("a change of it is asked for, shown and approved"):
    hive('send hm1nd "Change iris."')
    approval = pending()
    assert approval["kind"] == "apply_commit", approval
    approve(approval)
    machine.wait_until_succeeds(f"{GIT} show main:agent.toml | grep -q haiku")

with subtest("one with which it does not come up is taken back by itself"):
    hive('send hm1nd "Break iris."')
    failed = approve(pending())
    assert failed["state"] == "failed", failed
    assert "its program does not come up" in failed["note"], failed
    machine.succeed(f"{GIT} show main:agent.toml | grep -q haiku")
    machine.fail(f"{GIT} diff --quiet main failed/{failed['id']}")
    machine.wait_until_succeeds("pgrep -f 'hive_agent.cli serve'", timeout=60)

with subtest("a rollback walks the same gate, and so does the way back from it"):
    for model in ("sonnet", "haiku"):
        done = hive("rollback iris")
        assert (done["state"], done["proof"]) == ("done", "healthy"), done
        machine.succeed(f"{GIT} show main:agent.toml | grep -q {model}")

with subtest("a rebuild restarts the daemon, and agents live on"):
    machine.wait_until_succeeds("pgrep -f 'hive_agent.cli serve'", timeout=60)
    before = harnesses()
    machine.succeed(CHANGED)
    machine.wait_for_unit("hyperhive.service")
    machine.succeed("grep -q 'tries = 9' /etc/hyperhive/config.toml")
    machine.wait_until_succeeds("su - ada -c 'hive list'", timeout=60)
    assert before <= harnesses(), "an agent was started anew"

with subtest("a rollback does the same backwards"):
    machine.succeed(BASE)
    machine.wait_for_unit("hyperhive.service")
    machine.fail("grep -q 'tries = 9' /etc/hyperhive/config.toml")
    machine.wait_until_succeeds("su - ada -c 'hive list'", timeout=60)
    assert before <= harnesses(), "an agent was started anew"

with subtest("a reboot brings the daemon and its agents back"):
    machine.shutdown()
    machine.start()
    machine.wait_for_unit("hyperhive.service")
    machine.wait_until_succeeds("su - ada -c 'hive list --json' | grep -q iris", timeout=60)
    assert set(agents()) == {"hm1nd", "iris"}

with subtest("a daemon that hangs is restarted by the watchdog"):
    machine.succeed("systemctl kill --kill-whom=main --signal=STOP hyperhive.service")
    machine.wait_until_succeeds("journalctl -u hyperhive | grep -qi watchdog", timeout=180)
    machine.wait_for_unit("hyperhive.service")
