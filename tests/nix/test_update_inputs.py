"""Newer inputs of the meta flake: shown with their revisions, and each agent is built from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.approvals import settle
from hive_core.services.systems import system_of
from hive_core.store.bus import DEPLOYED
from tests.hives import open_services, wait_until
from tests.nix.house import STANDIN, House, serving

IRIS = AgentName("iris")
LONG = os.environ.get("HIVE_LONG") == "1"


async def test_newer_inputs_are_shown_and_every_agent_is_built_from_them(
    tmp_path: Path, hyperhive: Path, store: Path
) -> None:
    nixpkgs = tmp_path / "nixpkgs"
    shutil.copytree(STANDIN, nixpkgs)
    house = House(tmp_path / "state", hyperhive, store, nixpkgs=nixpkgs)
    async with house.open() as hive, serving(hive):
        asked = await hive.gate.spawn.request(MANAGER, IRIS, "You read.", "r")
        await hive.gate.approve(asked["approval"], (await hive.approvals.get(asked["approval"])).digest, OPERATOR)
        before = await system_of(hive.store, IRIS)
        with pytest.raises(Refusal, match="they are the newest already"):
            await hive.gate.update_meta_inputs.request(MANAGER, "news")
        (nixpkgs / "NEWS").write_text("newer\n")
        asked = await hive.gate.update_meta_inputs.request(MANAGER, "news")
        card = await hive.approvals.get(asked["approval"])
        assert card.effect is not None
        (line,) = card.effect["lines"]
        assert (line["what"], line["before"], line["after"]) == (
            "nixpkgs",
            card.payload["before"]["nixpkgs"],
            card.payload["after"]["nixpkgs"],
        )
        assert line["before"] != line["after"]
        assert house.log()[0] != "inputs: locked anew", "nothing is changed before the click"
        done = await hive.gate.approve(card.id, card.digest, OPERATOR)
        assert done.state == "done", done.note

        async def built_anew() -> bool:
            now = await system_of(hive.store, IRIS)
            return before is not None and now is not None and now.inputs != before.inputs

        await wait_until(hive.store, built_anew, "events", DEPLOYED)
        assert "inputs: locked anew" in house.log()
        log = await hive.gate.deploy_log.of(IRIS)
        assert [(row.what, row.id, row.tag, row.runs) for row in log] == [
            ("update_meta_inputs", done.id, None, False),
            ("spawn", 1, "deployed/0", True),
        ]
    async with house.open() as hive:
        with pytest.raises(Refusal, match="they are the newest already"):
            await hive.gate.update_meta_inputs.request(MANAGER, "again")


async def test_inputs_that_are_others_again_when_they_are_locked_fail_the_approval_and_change_nothing(
    tmp_path: Path, hyperhive: Path, store: Path
) -> None:
    nixpkgs = tmp_path / "nixpkgs"
    shutil.copytree(STANDIN, nixpkgs)
    house = House(tmp_path / "state", hyperhive, store, nixpkgs=nixpkgs)
    async with house.open() as hive, serving(hive):
        await wait_until(hive.store, partial(system_of, hive.store, MANAGER), "events", DEPLOYED)
        (nixpkgs / "NEWS").write_text("newer\n")
        asked = await hive.gate.update_meta_inputs.request(MANAGER, "news")
        card, before = await hive.approvals.get(asked["approval"]), house.tree()
        lock = hive.gate._deployments.lock_inputs

        async def lock_too_late(wanted: Mapping[str, str]) -> None:
            (nixpkgs / "NEWS").write_text("newer still\n")
            await lock(wanted)

        hive.gate._deployments.lock_inputs = lock_too_late  # type: ignore[method-assign]
        failed = await hive.gate.approve(card.id, card.digest, OPERATOR)
        why = "cannot update the inputs: they are others by now; ask for them again"
        assert (failed.state, failed.note) == ("failed", why)
        assert (house.tree(), house.git("status", "--porcelain")) == (before, "")
        assert "inputs: locked anew" not in house.log()


STEPS = ["staged", "locked", "build", "built", "switch", "switched"]


@pytest.mark.parametrize("step", STEPS if LONG else ["staged", "locked", "switched"])
async def test_a_daemon_that_is_killed_after_any_step_is_followed_by_one_that_builds_every_agent_from_them(
    tmp_path: Path, hyperhive: Path, store: Path, step: str
) -> None:
    nixpkgs = tmp_path / "nixpkgs"
    shutil.copytree(STANDIN, nixpkgs)
    house = House(tmp_path / "state", hyperhive, store, nixpkgs=nixpkgs)
    async with house.open() as hive, serving(hive):
        asked = await hive.gate.spawn.request(MANAGER, IRIS, "You read.", "r")
        await hive.gate.approve(asked["approval"], (await hive.approvals.get(asked["approval"])).digest, OPERATOR)
        await wait_until(hive.store, partial(system_of, hive.store, MANAGER), "events", DEPLOYED)
        before = {agent.name: (agent.deployed_sha, agent.settings) for agent in await hive.agents.all()}
        systems = {name: await house.systems.current(name) for name in before}
        with (nixpkgs / "toplevel.sh").open("a") as script:
            script.write("# newer: every system is another\n")
        asked = await hive.gate.update_meta_inputs.request(MANAGER, "news")
    async with house.open() as hive:
        card = await hive.approvals.get(asked["approval"])
        await hive.store.write(lambda tx: settle(tx, card, "approved", None, OPERATOR))
    await house.carry_out_and_die(step)
    async with house.open() as hive, serving(hive):
        assert (await hive.gate.approve(card.id, card.digest, OPERATOR)).state == "done"

        async def all_are_built_anew() -> bool:
            inputs = hive.gate._deployments._meta.inputs  # type: ignore[attr-defined]
            rows = [await system_of(hive.store, name) for name in before]
            return all(row is not None and row.inputs == inputs for row in rows)

        await wait_until(hive.store, all_are_built_anew, "events", DEPLOYED)
        for name in before:
            row = await system_of(hive.store, name)
            assert row is not None
            assert row.path == await house.systems.current(name) != systems[name]
        assert {agent.name: (agent.deployed_sha, agent.settings) for agent in await hive.agents.all()} == before
        locked, _ = await hive.gate._deployments.look_at_inputs()
        assert locked == card.payload["after"]
    assert house.log().count("inputs: locked anew") == 1
    assert house.git("status", "--porcelain") == ""


async def test_without_nix_they_are_refused_at_once_with_the_reason(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.gate.ensure_manager("You manage.")
        with pytest.raises(Refusal, match='only containers of sandbox = "nixos-container" are built from inputs'):
            await hive.gate.update_meta_inputs.request(MANAGER, "news")
        assert await hive.approvals.pending() == []
