"""An agent in two steps: its repositories first, to be shaped, and the agent with the first commit that is approved."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, CommitSha
from hive_core.services.approvals import Approval
from hive_core.services.configured import all_configured
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, Services, open_services, wait_until
from tests.notices import read_notice
from tests.tools import program_of

ARGUS = AgentName("argus")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path) as services:
        await services.gate.ensure_manager("You manage.")
        yield services


@asynccontextmanager
async def serving(hive: Services) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.serve)
        with trio.fail_after(PATIENCE_S):
            yield
        nursery.cancel_scope.cancel()


async def approve(hive: Services, asked: dict[str, Any]) -> Approval:
    card = await hive.approvals.get(asked["approval"])
    return await hive.gate.approve(card.id, card.digest, OPERATOR)


async def told(hive: Services, name: str = MANAGER) -> list[tuple[str, str, dict[str, Any]]]:
    newest = await hive.broker.messages.newest(name)
    return [read_notice(message["body"]) for message in newest if message["sender"] == "system"]


async def configure(hive: Services, **more: Any) -> Approval:
    return await approve(hive, await hive.gate.init_config.request(MANAGER, ARGUS, "You watch.", "eyes", **more))


def shape(hive: Services) -> CommitSha:
    checkout = Checkout(hive.state_dir / "proposed" / "argus" / "config")
    return CommitSha(checkout.commit(**{"CLAUDE.md": "You watch the door.\n"}))


async def test_the_repositories_are_there_and_no_agent_is_until_a_commit_of_theirs_is_approved(
    hive: Services, tmp_path: Path
) -> None:
    async with serving(hive):
        card = await configure(hive, icon="🦉", toolkit="reader")
        assert (card.state, card.kind) == ("done", "init_config")
        assert [agent.name for agent in await hive.agents.all()] == ["hm1nd"]
        (one,) = await all_configured(hive.store)
        assert (one["name"], one["requested_by"]) == ("argus", "hm1nd")
        assert await told(hive) == [
            (
                "config_ready",
                "argus can be shaped in /agents/argus/config; a commit there that is approved creates it",
                {"approval": card.id, "agent": "argus", "sha": one["sha"]},
            )
        ]
        async with program_of(hive, "hm1nd", tmp_path) as client:
            listed = (await client.call("list_agents"))["agents"]
            assert [(agent["name"], agent["state"]) for agent in listed][-1] == ("argus", "configured")
        asked = await hive.gate.apply_commit.request(MANAGER, ARGUS, shape(hive), "it is shaped")
        waits = await hive.approvals.get(asked["approval"])
        assert waits.effect is not None
        assert waits.effect["lines"][0]["after"] == "a new one, which is started"
        assert hive.gate.kinds["apply_commit"].title(waits).endswith("for the new agent argus")
        done = await approve(hive, asked)
        assert done.state == "done", done.note
    argus = await hive.agents.get("argus")
    assert (argus.wanted, argus.icon, (argus.settings or {})["prompt"]) == ("up", "🦉", "You watch the door.\n")
    assert (argus.settings or {})["tools"] == ["Read", "Glob", "Grep"]
    assert await all_configured(hive.store) == []
    assert [kind for kind, _, _ in await told(hive, "argus")] == ["welcome"]


async def test_a_change_of_one_that_was_created_so_is_as_any_other(hive: Services) -> None:
    async with serving(hive):
        await configure(hive)
        await approve(hive, await hive.gate.apply_commit.request(MANAGER, ARGUS, shape(hive), "r"))
        checkout = Checkout(hive.state_dir / "proposed" / "argus" / "config")
        sha = CommitSha(checkout.commit(**{"CLAUDE.md": "You watch the window.\n"}))
        asked = await hive.gate.apply_commit.request(MANAGER, ARGUS, sha, "r")
        assert "creates" not in (await hive.approvals.get(asked["approval"])).payload


async def test_a_name_that_is_configured_can_begin_with_other_files_and_be_spawned(hive: Services) -> None:
    async with serving(hive):
        await configure(hive)
        again = await hive.gate.init_config.request(MANAGER, ARGUS, "You listen.", "ears")
        assert (await approve(hive, again)).state == "done"
        assert len(await all_configured(hive.store)) == 1
        spawned = await hive.gate.spawn.request(MANAGER, ARGUS, "You smell.", "nose")
        assert (await approve(hive, spawned)).state == "done"
    assert await all_configured(hive.store) == []
    assert "You smell." in ((await hive.agents.get("argus")).settings or {})["prompt"]


async def test_a_card_of_a_name_that_is_an_agent_by_now_touches_none_of_its_repositories(hive: Services) -> None:
    asked = await hive.gate.init_config.request(MANAGER, ARGUS, "You watch.", "eyes")
    async with serving(hive):
        await hive.repos.create(ARGUS, {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You were here.\n"})
        await hive.add_agents("argus")
        with pytest.raises(Refusal, match="cannot approve 1 any more: cannot make the repositories of argus"):
            await approve(hive, asked)
    failed = await hive.approvals.get(asked["approval"])
    assert failed.state == "failed"
    assert "an agent of that name exists" in (failed.note or "")
    prompt = (hive.state_dir / "proposed" / "argus" / "config" / "CLAUDE.md").read_text()
    assert prompt == "You were here.\n"


async def test_a_daemon_that_dies_after_either_step_is_followed_by_one_that_finishes_it(hive: Services) -> None:
    async def step(_: str) -> None:
        pass

    for ask in (
        lambda: hive.gate.init_config.request(MANAGER, ARGUS, "You watch.", "eyes"),
        lambda: ask_to_apply(hive),
    ):
        card = await hive.approvals.get((await ask())["approval"])
        await hive.sql("UPDATE approvals SET state = 'approved' WHERE id = ?", card.id)
        done = await hive.gate.kinds[card.kind].carry_out(await hive.approvals.get(card.id), step)
        async with done.held:
            pass  # and its end is not written down
        # It is there when it is proven, and takes no turn before its approval is done.
        there = await hive.value("SELECT count(*) FROM agents WHERE name = 'argus'")
        assert there == (card.kind == "apply_commit")
        async with serving(hive):
            assert (await hive.approvals.wait_settled(card.id)).state == "done"
    assert (await hive.agents.get("argus")).wanted == "up"


async def ask_to_apply(hive: Services, sha: CommitSha | None = None) -> dict[str, Any]:
    return await hive.gate.apply_commit.request(MANAGER, ARGUS, sha or shape(hive), "r")


async def test_a_configuration_is_destroyed_as_an_agent_is_and_can_be_revived(hive: Services, tmp_path: Path) -> None:
    house, repository = hive_of(hive), tmp_path / "proposed/argus/config"
    async with serving(hive), trio.open_nursery() as nursery:
        nursery.start_soon(house.destruction.serve)
        await configure(hive, icon="🦉")
        sha = shape(hive)
        waits = (await hive.gate.apply_commit.request(MANAGER, ARGUS, sha, "it is shaped"))["approval"]
        card = await hive.approvals.get((await house.destroy.request(MANAGER, ARGUS, "not wanted"))["approval"])
        assert [line["what"] for line in (card.effect or {})["lines"]] == ["configuration", "ends", "kept"]
        assert (await approve(hive, {"approval": card.id})).state == "done"

        async def kept() -> bool:
            return [one.state for one in await house.tombstones.all()] == ["kept"]

        await wait_until(hive.store, kept)
        assert (await all_configured(hive.store), repository.exists()) == ([], False)
        denied = await hive.approvals.get(waits)
        assert (denied.state, denied.note) == ("denied", "argus was destroyed")
        revived = await house.destruction.revive("argus")
        assert revived.configured
        assert [(one["name"], one["icon"]) for one in await all_configured(hive.store)] == [("argus", "🦉")]
        assert await house.tombstones.all() == []
        assert (await approve(hive, await ask_to_apply(hive, sha))).state == "done"
        assert (await hive.agents.get("argus")).icon == "🦉"
        nursery.cancel_scope.cancel()


async def test_a_configuration_that_becomes_an_agent_now_is_not_destroyed_before(hive: Services) -> None:
    async with serving(hive):
        await configure(hive)
    card = await hive.approvals.get((await ask_to_apply(hive))["approval"])
    await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
    with pytest.raises(Refusal, match=f"cannot destroy argus: approval {card.id} is being carried out; try again"):
        await hive_of(hive).tombstones.destroy(ARGUS, OPERATOR, at_once=True)
    async with serving(hive):
        assert (await hive.approvals.wait_settled(card.id)).state == "done"


async def test_a_tombstone_does_not_come_back_while_its_name_is_made_an_agent_again(hive: Services) -> None:
    house = hive_of(hive)
    async with serving(hive), trio.open_nursery() as nursery:
        nursery.start_soon(house.destruction.serve)
        await configure(hive)
        await house.destruction.destroy(ARGUS, at_once=True)
        nursery.cancel_scope.cancel()
    asked = await hive.gate.spawn.request(MANAGER, ARGUS, "You watch.", "eyes")
    card = await hive.approvals.get(asked["approval"])
    await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
    with pytest.raises(Refusal, match=f"cannot revive argus: approval {card.id} is being carried out; try again"):
        await house.destruction.revive("argus")
    async with serving(hive):
        assert (await hive.approvals.wait_settled(card.id)).state == "done"
    assert [one.state for one in await house.tombstones.all()] == ["kept"]


async def test_a_commit_for_who_is_neither_an_agent_nor_configured_is_refused(hive: Services) -> None:
    with pytest.raises(Refusal, match="no agent has that name"):
        await hive.gate.apply_commit.request(MANAGER, ARGUS, CommitSha("0" * 40), "r")


async def test_a_toolkit_and_an_icon_stand_on_the_card_of_a_spawn(hive: Services) -> None:
    asked = await hive.gate.spawn.request(MANAGER, ARGUS, "You watch.", "eyes", icon="★", toolkit="coder")
    card = await hive.approvals.get(asked["approval"])
    assert card.effect is not None
    assert card.effect["lines"][-1] != card.effect["lines"][0]
    assert {"what": "icon", "before": None, "after": "★", "weight": "plain"} in card.effect["lines"]
    assert "packages: git, ripgrep, jq are not installed in this sandbox; it has the host's" in card.effect["unknown"]
    assert 'tools = ["Bash", "Read"' in card.payload["files"]["agent.toml"]
    async with serving(hive):
        assert (await approve(hive, asked)).state == "done"
    assert (await hive.agents.get("argus")).icon == "★"
    with pytest.raises(Refusal, match="there are reader"):
        await hive.gate.spawn.request(MANAGER, AgentName("other"), "You watch.", "eyes", toolkit="all")
