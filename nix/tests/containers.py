"""Runs in the driver of a NixOS test, which gives `machine`, `start_all` and `subtest`."""

# ruff: noqa: F821

import json

CHANGED = "/run/booted-system/specialisation/changed/bin/switch-to-configuration test"
BASE = "/run/booted-system/bin/switch-to-configuration test"
INSIDE = "nixos-container run h-iris --"
DRAWS = f"{INSIDE} /run/current-system/sw/bin/rsvg-convert --version"
BUILT_WITHIN_S = 1800


def hive(words):
    """What `hive WORDS --json` says, as a user of hive-admin."""
    return json.loads(machine.succeed(f"su - ada -c 'hive {words} --json'"))


def agents():
    return {agent["name"]: agent for agent in hive("list")["agents"]}


def pending():
    """The one request that waits, as soon as there is one."""
    machine.wait_until_succeeds("su - ada -c 'hive pending --json' | grep -q '\"id\"'", timeout=BUILT_WITHIN_S)
    (approval,) = hive("pending")["approvals"]
    return approval


def decide(words):
    """What becomes of an approval by a command: it comes to its end."""
    _, said = machine.execute(f"su - ada -c 'hive {words} --json'", timeout=BUILT_WITHIN_S)
    return json.loads(said)


def approve(approval):
    """Click on what was shown."""
    return decide(f"approve {approval['id']} --digest {approval['digest']}")


def runs():
    """Which run of its unit each container is in: it is another one after a restart."""
    show = "systemctl show --property=InvocationID --value container@{}.service"
    return [machine.succeed(show.format(container)).strip() for container in ("hm1nd", "h-iris")]


start_all()
machine.wait_for_unit("hyperhive.service")

with subtest("the daemon has no right, and the helper that has them answers it"):
    machine.wait_for_unit("hyperhive-root.service")
    assert machine.succeed("systemctl show --property=User --value hyperhive.service").strip() == "hyperhive"
    assert "it starts agents in nixos-container for uid" in machine.succeed("hive doctor || true")

with subtest("the manager's container is built and started"):
    machine.wait_until_succeeds("systemctl is-active container@hm1nd.service", timeout=BUILT_WITHIN_S)
    assert agents()["hm1nd"]["sandbox"] == "nixos-container"

with subtest("an agent is asked for, approved and built"):
    hive('send hm1nd "I want an agent that draws."')
    approval = pending()
    assert (approval["kind"], approval["agent"]) == ("spawn", "iris"), approval
    approve(approval)
    machine.wait_until_succeeds("systemctl is-active container@h-iris.service", timeout=BUILT_WITHIN_S)
    assert agents()["iris"]["container"] == "h-iris"

with subtest("its harness is a unit of its own system"):
    machine.wait_until_succeeds(f"{INSIDE} systemctl is-active hive-agent.service", timeout=60)

with subtest("it reaches nothing of the host"):
    machine.fail(f"{INSIDE} test -S /nix/var/nix/daemon-socket/socket")
    machine.fail(f"{INSIDE} touch /nix/var/nix/profiles/mine")
    machine.fail(f"{INSIDE} test -e /var/lib/hyperhive")
    assert machine.succeed(f"{INSIDE} ls /sys/class/net").split() == ["lo"]

with subtest("nothing of it stays mounted on the host, and nobody but the helper can start it"):
    machine.fail("grep -q /var/lib/hyperhive-root/stage /proc/1/mountinfo")

with subtest("what iris wished for is shown, and absent when it is denied"):
    machine.fail(DRAWS)
    hive('send iris "Draw something."')
    approval = pending()
    assert (approval["kind"], approval["agent"]) == ("apply_commit", "iris"), approval
    (packages,) = [line for line in approval["effect"]["lines"] if line["what"] == "packages"]
    assert "librsvg" in packages["after"], packages
    assert decide(f'deny {approval["id"]} "Not today."')["state"] == "denied"
    machine.fail(DRAWS)

with subtest("it is built when it is approved, and comes at a turn's edge"):
    hive('send iris "Draw something."')
    done = approve(pending())
    assert (done["state"], done["proof"]) == ("done", "healthy"), done
    machine.succeed(DRAWS)
    machine.succeed("git -c safe.directory='*' -C /var/lib/hyperhive/meta log --format=%s | grep -q '^iris: deployed/'")

with subtest("a system that boots and does not say hello is taken back by itself"):
    hive('send hm1nd "Break iris."')
    failed = approve(pending())
    assert failed["state"] == "failed", failed
    assert "it said no hello" in failed["note"], failed
    machine.wait_until_succeeds(f"{INSIDE} systemctl is-active hive-agent.service", timeout=120)
    machine.succeed(DRAWS)

with subtest("a rollback walks the same gate, and so does the way back from it"):
    done = decide("rollback iris")
    assert (done["state"], done["proof"]) == ("done", "healthy"), done
    machine.fail(DRAWS)
    done = decide("rollback iris")
    assert (done["state"], done["proof"]) == ("done", "healthy"), done
    machine.succeed(DRAWS)

with subtest("a container that ends is started again"):
    _, before = runs()
    machine.succeed("systemctl kill --signal=KILL container@h-iris.service")
    machine.wait_until_succeeds("systemctl is-active container@h-iris.service", timeout=120)
    assert runs()[1] != before
    machine.succeed(DRAWS)

with subtest("a rebuild and a rollback of the machine restart the daemon, and containers live on"):
    before = runs()
    for switch in (CHANGED, BASE):
        machine.succeed(switch)
        machine.wait_for_unit("hyperhive.service")
        machine.wait_until_succeeds("su - ada -c 'hive list'", timeout=60)
        assert runs() == before, "a container was started anew"

with subtest("a reboot brings each back as it was deployed"):
    machine.shutdown()
    machine.start()
    machine.wait_for_unit("hyperhive.service")
    for container in ("hm1nd", "h-iris"):
        machine.wait_until_succeeds(f"systemctl is-active container@{container}.service", timeout=BUILT_WITHIN_S)
    machine.succeed(DRAWS)

with subtest("one that is destroyed leaves no container, and its tombstone"):
    hive("destroy iris --now")
    machine.wait_until_fails("nixos-container list | grep -q h-iris", timeout=120)
    assert "iris" in json.dumps(hive("tombstones"))
