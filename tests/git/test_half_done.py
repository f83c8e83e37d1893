"""A change that a daemon left half done comes to an end whatever stands in its way, and nothing is tried for ever."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.procedures import walk
from hive_core.procedures.deployments import PlainDeployments
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, SYSTEM, AgentName
from hive_core.services.approvals import Approval, Shown
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.git.test_deploy_log import OPUS, change, hive, model
from tests.git.test_gate import approve, click_and_die, mail_of, refused, serving, tags
from tests.hives import Services, open_services, wait_until

__all__ = ["hive"]
IRIS = AgentName("iris")


async def die_on_trial(state: Path) -> int:
    """A daemon dies when iris runs on a change that was not proven yet: the number of its approval."""
    async with open_services(state) as hive:
        async with serving(hive):
            await hive.gate.ensure_manager("You manage.")
            await approve(hive, (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"])
        sha = Checkout(hive.repos.proposed_dir / "iris" / "config").commit(agent__toml=OPUS)
        number = (await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "a change"))["approval"]
        await click_and_die(hive, int(number))
        sql = "UPDATE agents SET deployed_sha = ?, settings = json_set(settings, '$.model', 'opus') WHERE name = 'iris'"
        await hive.sql(sql, sha)
        return int(number)


@asynccontextmanager
async def next_daemon(state: Path) -> AsyncIterator[Services]:
    async with open_services(state) as hive:
        await hive.gate.load()
        assert hive.gate.walk._reconciler.on_trial == {IRIS}
        yield hive
        assert hive.gate.walk._reconciler.on_trial == set(), "it would take no turn any more"


async def ended(hive: Services, number: int, step: str = "", then: Callable[[], object] = lambda: None) -> Approval:
    """How an approval ends; then: is done once it is at a step."""
    with hive.store.bus.listen("events") as listener:
        while step and step not in ((await hive.approvals.get(number)).step or ""):
            await listener.wait()
    then()
    return await hive.approvals.wait_settled(number)


async def test_main_moves_together_with_the_tag_of_its_deployment_or_neither_does(hive: Services) -> None:
    before, taken = await hive.repos.main(IRIS), hive.state_dir / "applied/iris.git/refs/tags/deployed/2.lock"
    taken.parent.mkdir(exist_ok=True)
    taken.touch()
    failed = await change(hive, agent__toml=OPUS)
    assert (failed.state, "deployed/2.lock" in (failed.note or "")) == ("failed", True)
    assert (await hive.repos.main(IRIS), await model(hive)) == (before, "sonnet")
    assert f"\ntag: failed/{failed.id}\n" in (await mail_of(hive, MANAGER))[-1]


@pytest.mark.parametrize("left", ["refs/tags/approved/2.lock", "refs/heads/main.lock", "refs/tags/deployed/2.lock"])
async def test_what_a_git_left_that_was_killed_with_its_daemon_does_not_fail_what_the_next_one_finishes(
    tmp_path: Path, left: str
) -> None:
    number = await die_on_trial(tmp_path)
    lock = tmp_path / "applied" / "iris.git" / left
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    async with next_daemon(tmp_path) as hive, serving(hive):
        assert (await ended(hive, number)).state == "done"
        assert (await model(hive), tags(hive)[f"approved/{number}"]) == ("opus", await hive.repos.main(IRIS))


@pytest.mark.parametrize("settled", [False, True], ids=["on trial", "main has moved"])
async def test_while_a_repository_cannot_be_used_what_is_half_done_waits_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settled: bool
) -> None:
    number = await die_on_trial(tmp_path)
    monkeypatch.setattr(walk, "AWAY_REST_S", 0.01)
    repository, away = tmp_path / "applied" / "iris.git", tmp_path / "away.git"
    async with next_daemon(tmp_path) as hive:
        if settled:
            card = await hive.approvals.get(number)
            await hive.repos.deploy(IRIS, number, card.payload["sha"], card.payload["base"])
            # What it finds of main can be read, but not written.
            lock = repository / "refs/heads/main.lock"
            lock.touch()
            async with serving(hive):
                done = await ended(hive, number, "finishing, which is tried again: cannot use", lock.unlink)
            assert (done.state, await model(hive)) == ("done", "opus")
        else:
            repository.rename(away)
            async with serving(hive):
                back = "going back, which is tried again: cannot use the repository of iris"
                failed = await ended(hive, number, back, lambda: away.rename(repository))
            assert (failed.state, await model(hive)) == ("failed", "sonnet")
            assert (await hive.agents.get("iris")).deployed_sha == await hive.repos.main(IRIS)
        caplog.clear()


async def test_who_is_destroyed_while_a_change_is_tried_runs_on_what_it_had_when_it_is_revived(tmp_path: Path) -> None:
    number = await die_on_trial(tmp_path)
    async with next_daemon(tmp_path) as hive, trio.open_nursery() as nursery:
        whole = hive_of(hive)
        nursery.start_soon(whole.destruction.serve)
        await whole.destruction.destroy(IRIS, at_once=False)
        async with serving(hive):
            failed = await ended(hive, number)
        assert (failed.state, failed.note) == ("failed", "cannot deploy iris: it was destroyed meanwhile")
        await whole.destruction.revive("iris")
        assert (await hive.agents.get("iris")).deployed_sha == await hive.repos.main(IRIS)
        assert await model(hive) == "sonnet"
        nursery.cancel_scope.cancel()


def lose_its_repositories(hive: Services) -> None:
    """As a destruction does on its way."""
    (hive.state_dir / "applied" / "iris.git").rename(hive.state_dir / "applied" / "gone.git")


@pytest.mark.parametrize("when", ["before the click", "while the click looks"])
async def test_a_click_while_its_agent_is_being_destroyed_says_so(hive: Services, when: str) -> None:
    card, _ = await ask_for_two(hive, on_top=True)
    look = hive.gate.apply_commit.show_now

    async def begin() -> None:
        await hive_of(hive).tombstones.destroy(IRIS, OPERATOR, at_once=False)
        lose_its_repositories(hive)

    async def look_late(approval: Approval) -> Shown:
        await begin()
        return await look(approval)

    if when == "before the click":
        await begin()
    else:
        hive.gate.apply_commit.show_now = look_late  # type: ignore[method-assign]
    with refused(
        rf"^cannot approve {card.id}: iris is being destroyed; look at it again when that is over$", "conflict"
    ):
        await hive.gate.approve(card.id, card.digest, OPERATOR)
    assert await hive.approvals.get(card.id) == card


async def test_what_was_approved_before_its_agent_was_destroyed_fails_for_that(hive: Services) -> None:
    build = PlainDeployments.build

    async def destroy_and_build(self: PlainDeployments, *given: Any) -> Any:
        await hive_of(hive).tombstones.destroy(IRIS, OPERATOR, at_once=False)
        lose_its_repositories(hive)
        return await build(self, *given)

    card, _ = await ask_for_two(hive, on_top=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainDeployments, "build", destroy_and_build)
        failed = await hive.gate.approve(card.id, card.digest, OPERATOR)
    assert (failed.state, failed.note) == ("failed", "cannot deploy iris: it was destroyed meanwhile")


async def ask_for_two(hive: Services, *, on_top: bool) -> list[Approval]:
    """The cards of two changes of iris; the second begins with the first, or where that begins."""
    checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
    begun, cards = checkout.head(), []
    for files in ({"agent__toml": OPUS}, {"CLAUDE__md": "You write.\n"}):
        sha = checkout.commit(**files)
        number = (await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "a change"))["approval"]
        cards.append(await hive.approvals.get(number))
        if not on_top:
            checkout.git("reset", "-q", "--hard", begun)
    return cards


async def not_outdated(hive: Services, number: int) -> Approval:
    """A card that waited while another change of its agent was carried out, once it was looked at again."""

    async def look() -> bool:
        return number not in {card.id for card in await hive.approvals.outdated()}

    await wait_until(hive.store, look)
    return await hive.approvals.get(number)


@pytest.mark.parametrize("on_top", [True, False], ids=["on top of the first", "beside the first"])
async def test_a_change_is_not_approved_while_another_one_is_carried_out_and_is_shown_against_that_afterwards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, on_top: bool
) -> None:
    async with open_services(tmp_path) as hive:
        async with serving(hive):
            await hive.gate.ensure_manager("You manage.")
            await approve(hive, (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"])
        first, second = await ask_for_two(hive, on_top=on_top)
        await hive.gate.approve(first.id, first.digest, OPERATOR, patience_s=0)
        with refused(
            f"cannot approve {second.id}: approval {first.id} changes iris now; once that is over", "conflict"
        ):
            await hive.gate.approve(second.id, second.digest, OPERATOR)
        assert await hive.approvals.get(second.id) == second
        async with serving(hive):
            assert (await hive.approvals.wait_settled(first.id)).state == "done"
            waiting = await not_outdated(hive, second.id)
            if on_top:
                assert (waiting.state, waiting.payload["base"]) == ("pending", first.payload["sha"])
                assert "agent.toml" not in waiting.payload["diff"]
                assert (await hive.gate.approve(second.id, waiting.digest, OPERATOR)).state == "done"
            else:
                why = f"cannot apply {second.payload['sha'][:12]}: it is not based on {first.payload['sha'][:12]}"
                assert (waiting.state, (waiting.note or "")[: len(why)]) == ("failed", why)
                assert f'\nreason: "{why}' in (await mail_of(hive, MANAGER))[-1]
        runs = second if on_top else first
        assert (await hive.agents.get("iris")).deployed_sha == runs.payload["sha"] == await hive.repos.main(IRIS)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_when_the_first_comes_to_nothing_the_other_one_is_as_it_was_shown(hive: Services) -> None:
    first, second = await ask_for_two(hive, on_top=False)
    taken = hive.state_dir / f"applied/iris.git/refs/tags/deployed/{first.id}.lock"
    taken.parent.mkdir(exist_ok=True)
    taken.touch()
    assert (await approve(hive, first.id)).state == "failed"
    assert await not_outdated(hive, second.id) == second
    assert (await approve(hive, second.id)).state == "done"


async def test_the_next_daemon_shows_anew_what_the_one_before_had_no_time_to(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        async with serving(hive):
            await hive.gate.ensure_manager("You manage.")
            await approve(hive, (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"])
        first, second = await ask_for_two(hive, on_top=True)
        hive.gate.cards.serve = trio.sleep_forever  # type: ignore[method-assign]
        async with serving(hive):
            assert (await approve(hive, first.id)).state == "done"
        assert await hive.approvals.get(second.id) == second
    async with open_services(tmp_path) as hive, serving(hive):
        assert (await not_outdated(hive, second.id)).payload["base"] == first.payload["sha"]


async def test_of_two_clicks_on_changes_of_one_agent_at_once_the_second_fails_nothing(hive: Services) -> None:
    """Whoever is asked first, the card that was not is there to be decided, or is none any more and says why."""
    cards = await ask_for_two(hive, on_top=True)
    ends: dict[int, str] = {}

    async def click(card: Approval) -> None:
        try:
            ends[card.id] = (await hive.gate.approve(card.id, card.digest, OPERATOR)).state
        except Refusal as refusal:
            ends[card.id] = refusal.code

    async with trio.open_nursery() as nursery:
        for card in cards:
            nursery.start_soon(click, card)
    assert sorted(ends.values()) == ["conflict", "done"]
    (done, other) = sorted(cards, key=lambda card: ends[card.id], reverse=True)
    assert (await hive.agents.get("iris")).deployed_sha == done.payload["sha"] == await hive.repos.main(IRIS)
    now = await not_outdated(hive, other.id)
    assert (now.state, now.resolved_by) in (("pending", None), ("failed", SYSTEM))


async def test_a_change_that_came_to_its_end_between_the_look_and_the_click_of_another_one_lets_that_wait(
    hive: Services,
) -> None:
    first, second = await ask_for_two(hive, on_top=True)
    look = hive.gate.apply_commit.show_now

    async def look_and_change(approval: Approval) -> Shown:
        shown = await look(approval)
        hive.gate.apply_commit.show_now = look  # type: ignore[method-assign]
        assert (await approve(hive, first.id)).state == "done"
        return shown

    hive.gate.apply_commit.show_now = look_and_change  # type: ignore[method-assign]
    hive.gate.cards.serve = trio.sleep_forever  # type: ignore[method-assign]
    with refused(f"cannot approve {second.id}: iris was changed meanwhile", "conflict"):
        await hive.gate.approve(second.id, second.digest, OPERATOR)
    assert (await hive.approvals.get(second.id)).state == "pending"
