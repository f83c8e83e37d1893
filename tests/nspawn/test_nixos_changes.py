"""Changes of a served agent whose container is a NixOS system: a daemon that dies on the way, a system that does not
come up, and builds that come to nothing. The host is a stand-in; nix, systemd-nspawn and the harness are real.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from hive_core.protocol.refusal import Refusal
from tests.containers.drivers import STAND_IN, need
from tests.dying import AFTER, BEFORE, die_at, wait_dead
from tests.nixos_hive import NixosHive, open_nixos_hive, package
from tests.small_disks import small_disks
from tests.swarm.test_outlive import WELCOME, persona, spawn

pytestmark = small_disks
FLAKE, TRIAL = "hive_core.procedures.flake_deployments", "hive_core.procedures.trials"
PLACES = [
    (FLAKE, "FlakeDeployments.build", "built", AFTER),
    (FLAKE, "FlakeDeployments.take", "taken", AFTER),
    (TRIAL, "Trial.prove", "noted", BEFORE),
    (TRIAL, "Trial.prove", "proven", AFTER),
    (FLAKE, "FlakeDeployments.settle", "proof kept", BEFORE),
    ("hive_core.git.repos", "Repos.deploy", "main moved", AFTER),
    (FLAKE, "FlakeDeployments.settle", "settled", AFTER),
]
STEPS = [place[2] for place in PLACES]
LONG = os.environ.get("HIVE_LONG") == "1"  # each step, not some


def rules(name: str) -> list[dict[str, Any]]:
    """She says this name when she is asked."""
    return [WELCOME, {"from": "operator", "do": [{"tool": "send", "args": {"to": "operator", "body": f"I am {name}"}}]}]


class Swarm:
    """A hive whose daemon runs, and iris. said: who she says she is."""

    def __init__(self, hive: NixosHive) -> None:
        self.hive = hive
        self.daemon = hive.daemon
        self.client = hive.start()
        self.said = "the first"
        spawn(self.client, "iris", rules(self.said))
        self.daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
        self.module = (hive.iris.path / "agent.nix").read_text()
        self.asked = 0

    def start(self, **environment: str) -> None:
        """Another daemon in the place of this one."""
        if self.daemon.process.poll() is None:
            self.daemon.kill()
        self.client = self.hive.start(**environment)

    def ask(self, name: str, *, packages: str = "") -> dict[str, Any]:
        """The card of a change after which iris is somebody else, on another system."""
        self.hive.iris.git("reset", "-q", "--hard", self.main())
        module = self.module.replace("systemPackages = [", f"systemPackages = [ {packages or package(name)}")
        sha = self.hive.iris.commit(agent__nix=module, CLAUDE__md=persona(rules(name)))
        asked = self.client.call("request_apply_commit", agent="iris", sha=sha, reason="a test")
        return dict(self.client.call("show", approval=asked["approval"]))

    def approve(self, card: dict[str, Any]) -> dict[str, Any]:
        return dict(self.client.call("approve", approval=card["id"], digest=card["digest"]))

    def approve_and_die(self, card: dict[str, Any], step: str) -> None:
        die_at(self.daemon, step)
        with pytest.raises(Refusal):
            self.approve(card)
        wait_dead(self.daemon)

    def ended(self, card: dict[str, Any]) -> dict[str, Any]:
        ends = ("approval_done", "approval_failed")
        self.daemon.events(self.client, lambda e: e["kind"] in ends and e["data"]["approval"] == card["id"])
        return dict(self.client.call("show", approval=card["id"]))

    def main(self) -> str:
        return self.hive.git("applied/iris.git", "rev-parse", "main").strip()

    def greet(self) -> None:
        """Send her a question, which she answers when she may take a turn."""
        self.asked = self.client.call("send", to="iris", body="who are you?")["message"]

    def answer(self) -> str:
        """What she said to the last question."""

        def is_answer(event: dict[str, Any]) -> bool:
            told = event["data"]
            return event["kind"] == "message_sent" and event["agent"] == "operator" and told["message"] > self.asked

        event = self.daemon.events(self.client, is_answer)
        return str(self.client.call("message", message=event["data"]["message"])["body"])

    def run_of(self) -> str:
        """The run of the unit that iris's container is."""
        return str(json.loads((self.daemon.state / "processes" / "iris.json").read_text())["invocation"])

    def deployed(self) -> dict[str, Any]:
        """What iris runs on, which all who know it tell alike."""
        main, system = self.main(), self.hive.system()
        (iris,) = [agent for agent in self.client.call("list")["agents"] if agent["name"] == "iris"]
        lock = json.loads(self.hive.git("meta", "show", "HEAD:flake.lock"))
        assert {iris["deployed_sha"], lock["nodes"]["agent-iris"]["locked"]["rev"]} == {main}
        assert self.hive.git("meta", "status", "--porcelain") == ""
        tags = self.hive.git("applied/iris.git", "tag", "--list", "deployed/*", "--points-at", "main").split()
        log = self.hive.git("meta", "log", "--format=%s").splitlines()
        assert [f"iris: {tag}" for tag in tags] == [line for line in log if line.startswith("iris: ")][:1]
        return {"main": main, "system": system, "tag": tags[0]}


@pytest.fixture(scope="module")
def swarm() -> Iterator[Swarm]:
    need(STAND_IN)
    with open_nixos_hive(dies=PLACES) as hive:
        yield Swarm(hive)


# -- a daemon that dies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS if LONG else ["built", "noted", "main moved"])
def test_a_daemon_that_is_killed_at_any_step_is_followed_by_one_that_finishes(swarm: Swarm, step: str) -> None:
    before, name = swarm.deployed(), step.replace(" ", "-")
    card = swarm.ask(name)
    swarm.approve_and_die(card, step)
    swarm.start()
    swarm.greet()
    done = swarm.ended(card)
    assert (done["state"], done["proof"]) == ("done", "healthy")
    # Before it is taken she is who she was.
    assert swarm.answer() in {f"I am {name}", *([f"I am {swarm.said}"] if step == "built" else [])}
    swarm.said = name
    now = swarm.deployed()
    assert (now["main"], now["tag"]) == (card["payload"]["sha"], f"deployed/{card['id']}")
    assert now["system"] != before["system"]


def test_a_new_agent_whose_daemon_is_killed_before_it_is_proven_is_found_healthy_by_the_next(swarm: Swarm) -> None:
    asked = swarm.client.call("request_spawn", agent="argus", persona=persona(rules("argus")), reason="a test")
    card = dict(swarm.client.call("show", approval=asked["approval"]))
    swarm.approve_and_die(card, "noted")
    swarm.start()
    assert swarm.ended(card)["proof"] == "healthy"


# -- what comes to nothing --------------------------------------------------------------------------------------------


HUSH = "cannot keep the change of iris: it said no hello within 2 s (hello_s)"


@pytest.mark.parametrize("step", ["", "taken", "noted"] if LONG else ["", "noted"])
def test_a_system_whose_harness_does_not_say_hello_is_taken_back_by_whichever_daemon(swarm: Swarm, step: str) -> None:
    before = swarm.deployed()
    card = swarm.ask(f"mute-{step}", packages=package("mute"))
    if step:
        swarm.approve_and_die(card, step)
    swarm.start(HIVE_HELLO_S="2")
    if not step:
        swarm.approve(card)
    failed = swarm.ended(card)
    assert (failed["state"], failed["note"][: len(HUSH)]) == ("failed", HUSH)
    swarm.greet()
    assert swarm.answer() == f"I am {swarm.said}"
    assert swarm.deployed() == before
    assert f"failed/{card['id']}" in swarm.hive.git("applied/iris.git", "tag", "--list", "failed/*").split()
    swarm.start()


NO_ROOM = "/bin/cat /dev/zero > $out"
TOO_LONG = "it took longer than 2 s (build_s) and was ended; build less, or set build_s higher"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        pytest.param(NO_ROOM, "No space left on device", id="fills the disk"),
        *([pytest.param("/usr/bin/sleep 1000", TOO_LONG, id="hangs")] if LONG else []),
    ],
)
def test_a_build_that_comes_to_nothing_leaves_her_running_as_she_was(swarm: Swarm, script: str, why: str) -> None:
    before, run = swarm.deployed(), swarm.run_of()
    card = swarm.ask("broken", packages=package("broken", script))
    if why == TOO_LONG:
        swarm.start(HIVE_BUILD_S="2")
    failed = swarm.approve(card)
    assert failed["state"] == "failed"
    assert failed["note"].startswith("cannot build iris: ")
    assert why in failed["note"]
    for half_made in (swarm.hive.host.state.nix / "store").glob("*-broken"):
        half_made.unlink()  # nix's own sandbox, which this host's has not, leaves nothing
    swarm.greet()
    assert swarm.answer() == f"I am {swarm.said}"
    assert swarm.deployed() == before
    assert swarm.run_of() == run
    swarm.start()
    swarm.said = f"after-{card['id']}"
    assert swarm.approve(swarm.ask(swarm.said))["proof"] == "healthy"
