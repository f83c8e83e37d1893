"""The host's network is given by an approval of its own: by a commit that does nothing else, clicked by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dashboard.rows import Rows
from hive_core.procedures.kinds.apply_commit import ApplyCommit
from hive_core.procedures.together import Click, Together
from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, CommitSha
from hive_core.services.approvals import Approval
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.hives import Services, open_gate

IRIS, ARGUS = AgentName("iris"), AgentName("argus")
GIVEN = "network: private → host: every address this machine reaches, its own services too"


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """iris with her repositories, and a gate that is served."""
    async with open_gate(tmp_path) as services:
        await services.gate.ensure_manager("You manage.")
        yield services


def commit(hive: Services, toml: str = "", name: str = "iris", **files: str) -> CommitSha:
    """A commit of the proposed repository whose agent.toml has these lines more."""
    folder = hive.repos.proposed_dir / name / "config"
    return CommitSha(Checkout(folder).commit(**{"agent.toml": (folder / "agent.toml").read_text() + toml, **files}))


async def ask(hive: Services, sha: CommitSha, name: AgentName = IRIS) -> Approval:
    asked = await hive.gate.apply_commit.request(MANAGER, name, sha, "it measures the network")
    return await hive.approvals.get(asked["approval"])


async def click(hive: Services, card: Approval) -> Approval:
    return await hive.gate.approve(card.id, card.digest, OPERATOR)


async def test_a_commit_that_does_nothing_else_gives_it_and_the_card_says_so(hive: Services) -> None:
    assert (await hive.agents.get("iris")).network == "private"
    card = await ask(hive, commit(hive, 'network = "host"  # for a week\n'))
    lines = (card.effect or {})["lines"]
    assert [(line["weight"], effect_line(line)) for line in lines] == [("wide", GIVEN)]
    row = Rows(hive_of(hive)).approval(card)
    assert ("APPR0VE" in row, "choose-" in row) == (True, False), "it is no part of a bundle"
    assert (await click(hive, card)).state == "done"
    iris = await hive.agents.get("iris")
    assert (iris.network, "network" in (iris.settings or {})) == ("host", False)


@pytest.mark.parametrize(
    ("toml", "files", "named"),
    [
        ('description = "reads more"\n', {}, "description"),
        ("warm_turns = 7\n", {"CLAUDE.md": "You measure.\n"}, "prompt, warm_turns"),
        ("", {"later": "x"}, "files"),
        ("", {"agent.toml": 'program = "claude"\nmodel = "sonnet"\nnetwork = "host"\n'}, "program"),
    ],
)
async def test_a_commit_that_does_more_is_refused_and_leaves_no_card(
    hive: Services, toml: str, files: dict[str, str], named: str
) -> None:
    sha = commit(hive, f'network = "host"\n{toml}', **files)
    with pytest.raises(Refusal, match=f"approved by itself, and this changes {named} too; propose a commit"):
        await ask(hive, sha)
    assert await hive.approvals.pending() == []


async def test_it_is_taken_back_together_with_anything(hive: Services) -> None:
    await click(hive, await ask(hive, commit(hive, 'network = "host"\n')))
    folder = hive.repos.proposed_dir / "iris" / "config"
    back = (folder / "agent.toml").read_text().replace('network = "host"', "warm_turns = 7")
    card = await ask(hive, CommitSha(Checkout(folder).commit(**{"agent.toml": back, "CLAUDE.md": "You rest.\n"})))
    assert (await click(hive, card)).state == "done"
    assert (await hive.agents.get("iris")).network == "private"


async def test_a_way_back_to_it_that_brings_more_is_refused_like_any_other(hive: Services) -> None:
    given = await click(hive, await ask(hive, commit(hive, 'network = "host"\n')))
    folder = hive.repos.proposed_dir / "iris" / "config"
    private = (folder / "agent.toml").read_text().replace('network = "host"\n', "")
    await click(hive, await ask(hive, CommitSha(Checkout(folder).commit(**{"agent.toml": private}))))
    alone = await hive.gate.apply_commit.request_back(IRIS, f"deployed/{given.id}")
    await hive.gate.deny(alone["approval"], "not now", OPERATOR)
    await click(hive, await ask(hive, CommitSha(Checkout(folder).commit(**{"CLAUDE.md": "You rest.\n"}))))
    with pytest.raises(Refusal, match="this changes prompt too"):
        await hive.gate.apply_commit.request_back(IRIS, f"deployed/{given.id}")


async def test_a_new_agent_never_begins_with_it(hive: Services) -> None:
    asked = await hive.gate.init_config.request(MANAGER, ARGUS, "You watch.", "eyes")
    await click(hive, await hive.approvals.get(asked["approval"]))
    with pytest.raises(Refusal, match='a new agent begins with network = "private"; ask for the other once it runs'):
        await ask(hive, commit(hive, 'network = "host"\n', "argus"), ARGUS)


async def test_it_is_never_approved_together_with_others(hive: Services) -> None:
    given = await ask(hive, commit(hive, 'network = "host"\n'))
    asked = await hive.gate.spawn.request(MANAGER, ARGUS, "You watch.", "eyes")
    other = await hive.approvals.get(asked["approval"])
    together = Together(hive.store, hive.approvals, hive.gate)
    for cards in ((given, other), (other, given)):
        with pytest.raises(Refusal, match=f"{given.id} gives iris the host's network; approve that by itself"):
            await together.approve([Click(card.id, card.digest) for card in cards], OPERATOR)
    assert [(await hive.approvals.get(card.id)).state for card in (given, other)] == ["pending"] * 2


@pytest.mark.parametrize(("listed", "gives"), [(None, True), (["argus"], False), (["iris"], True)])
async def test_where_the_helper_would_not_give_it_it_cannot_be_asked_for(
    hive: Services, listed: list[str] | None, gives: bool
) -> None:
    kind = hive.gate.apply_commit
    assert isinstance(kind, ApplyCommit)
    kind._host_network = listed
    sha = commit(hive, 'network = "host"\n')
    if gives:
        assert (await ask(hive, sha)).state == "pending"
        return
    with pytest.raises(Refusal, match="the helper's own configuration does not list iris in host_network; list it"):
        await ask(hive, sha)
