"""Rolling updates, in virtual time: few at a time, each at its turn's edge, none after one that does not come up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.revision import revision, revision_of
from hive_core.services.agents import set_deployed
from hive_core.store.bus import WANTED
from tests.hives import SETTINGS
from tests.scripted_driver import Container, House, open_house

NAMES = ("agent0", "agent1", "agent2", "agent3")
FIRST = AgentName("agent0")


@asynccontextmanager
async def upgraded(silent: str = "", **limits: Any) -> AsyncIterator[House]:
    """A hive whose agents are left running by the daemon before, and are of another shape by now; none is adopted yet.

    silent: the agent that says no hello by itself when it is started anew.
    """
    async with open_house(**limits) as house:
        await house.add_agents("hm1nd", *NAMES)
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.driver.begun) == 5)
        house.driver.left = dict(house.driver.begun)
        house.driver.begun.clear()
        house.driver.shape = "another"
        if silent:
            house.driver.life = lambda name, _: None if name == silent else house.hello(name)
        yield house


async def adopted(house: House, *idle: str) -> None:
    """Every container that was left has said hello again; who is not `idle` has a turn under way."""
    await trio.sleep(1)
    for name in ("hm1nd", *NAMES):
        house.hello(name)
        if idle and name not in idle:
            house.agents.observe(name, "thinking")


def asked(house: House) -> set[str]:
    """Whose harness is asked to stop now."""
    return {str(name) for name, desk in house.desks.items() if desk.begins_none}


async def stop(house: House, *names: str) -> None:
    """These agents' harnesses do as they were asked."""
    for name in names:
        assert house.desks[AgentName(name)].begins_none
        house.running(name).end(0)
    await trio.sleep(0.5)


async def test_the_first_goes_alone_then_so_many_at_once_and_the_manager_is_the_last(
    autojump_clock: MockClock,
) -> None:
    async with upgraded() as house, house.daemon():
        await adopted(house)
        assert house.reconciler.updates.outdated == [*NAMES, "hm1nd"]
        seen = []
        for _ in range(4):
            await trio.sleep(100)
            seen.append(asked(house))
            await stop(house, *sorted(asked(house)))
        assert seen == [{"agent0"}, {"agent1", "agent2"}, {"agent3"}, {"hm1nd"}]
        assert house.reconciler.updates.outdated == []
        assert sorted(name for name, _ in house.driver.begun) == [*NAMES, "hm1nd"]
        assert await house.mail(MANAGER) == []


async def test_an_agent_in_a_turn_is_replaced_at_the_edge_at_which_there_is_a_place_and_holds_up_nobody(
    autojump_clock: MockClock,
) -> None:
    async with upgraded(silent="agent1") as house, house.daemon():
        await adopted(house, "agent1", "agent2")
        await trio.sleep(1)
        assert asked(house) == {"agent1"}
        house.desks[FIRST].at_edge()
        assert asked(house) == {"agent1"}, "there was no place: it goes on with its next turn"
        await stop(house, "agent1")
        house.hello("agent1")
        await trio.sleep(1)
        assert asked(house) == {"agent2"}
        house.desks[FIRST].at_edge()
        assert asked(house) == {"agent0", "agent2"}


async def test_the_next_waits_until_the_one_before_has_said_hello_and_with_mail_until_it_has_been_up_for_a_while(
    autojump_clock: MockClock,
) -> None:
    async with upgraded(silent="agent0") as house, house.daemon():
        await house.broker.send(OPERATOR, (FIRST,), "work")
        await adopted(house)
        await trio.sleep(1)
        await stop(house, "agent0")
        await trio.sleep(60)
        assert asked(house) == set()
        house.hello("agent0")
        await trio.sleep(9)
        assert asked(house) == set()
        await trio.sleep(2)
        assert asked(house) == {"agent1", "agent2"}


async def fail(house: House, how: str) -> None:
    """The first that is replaced does not come up."""
    if how == "cannot be started":
        house.driver.broken = "no such program"
    elif how == "crashes":
        house.driver.life = lambda name, container: container.end(7) if name == FIRST else house.hello(name)
    await trio.sleep(1)
    await stop(house, "agent0")
    if how == "crashes at its mail":
        await trio.sleep(5)
        house.running("agent0").end(7)
    await trio.sleep(3)


@pytest.mark.parametrize("how", ["crashes", "cannot be started", "crashes at its mail"])
async def test_one_that_does_not_come_up_stops_the_update_which_is_told_once_to_the_operator_and_the_manager(
    autojump_clock: MockClock, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded() as house:
        async with house.daemon():
            await house.broker.send(OPERATOR, (FIRST,), "work")
            await adopted(house)
            await fail(house, how)
            house.driver.broken = ""
            await trio.sleep(3600)
            assert asked(house) == set()
            updates = house.reconciler.updates
            assert updates.outdated == ["agent1", "agent2", "agent3", "hm1nd"]
            sentence = "agent0 did not come up when replaced; `hive update agent0` tries it again, "
            assert updates.trouble == sentence + "`hive update --all` goes on with the others"
        for who in (OPERATOR, MANAGER):
            (told,) = [text for text in await house.mail(who) if text.startswith("update_failed")]
            why = "could not be started: no such program" if how == "cannot be started" else "ended with code 7"
            assert told == (
                f"update_failed: agent0 did not come up when it was replaced by {revision()}: {why}; "
                "`hive update agent0` tries it again, `hive update --all` goes on\n"
                f'agent: agent0\nrevision: {revision()}\nlast_words: "agent0 fell over"'
            )
        assert (await house.kinds("agent0")).count("update_failed") == 1
    caplog.clear()


async def test_a_daemon_that_starts_again_goes_on_with_no_update_that_failed_but_with_one_to_something_else(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded() as house:
        async with house.daemon():
            await adopted(house)
            await fail(house, "crashes")
            left = {AgentName(name): house.running(name) for name in ("agent1", "agent2", "agent3", "hm1nd")}
        for shape, begun in (("another", False), ("a third", True)):
            house.driver.left, house.driver.shape = dict(left), shape
            async with house.daemon():
                await adopted(house)
                await trio.sleep(100)
                assert (asked(house) != set()) == begun
    caplog.clear()


async def test_the_operator_tries_one_again_and_when_it_comes_up_the_update_goes_on(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded(crash_loop=2) as house, house.daemon():
        await adopted(house)
        await fail(house, "crashes")
        await house.until(lambda: house.live("agent0").state == "quarantined")
        assert await house.reconciler.updates.update(FIRST, OPERATOR)
        await trio.sleep(2)
        assert len([text for text in await house.mail(OPERATOR) if text.startswith("update_failed")]) == 2
        house.let_crash()
        assert await house.reconciler.updates.update(FIRST, OPERATOR)
        await trio.sleep(1)
        assert house.live("agent0").state == "idle"
        assert house.reconciler.updates.trouble == ""
        assert asked(house) == {"agent1", "agent2"}
        assert not await house.reconciler.updates.update(FIRST, OPERATOR), "it is as it would be started now"
    caplog.clear()


async def test_the_operator_goes_on_with_the_others_though_one_did_not_come_up(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded() as house:
        async with house.daemon():
            await adopted(house)
            await fail(house, "crashes")
            await house.agents.want(FIRST, "down", OPERATOR)
            outdated = ["agent1", "agent2", "agent3", "hm1nd"]
            assert await house.reconciler.updates.go_on(OPERATOR) == outdated
            await trio.sleep(1)
            assert asked(house) == {"agent1"}, "the first goes alone again"
        assert await house.store.rows("SELECT 1 FROM container_states WHERE update_failed IS NOT NULL") == []
    caplog.clear()


async def test_one_that_is_asked_for_by_name_goes_before_its_turn_and_counts_in_no_place(
    autojump_clock: MockClock,
) -> None:
    async with upgraded() as house, house.daemon():
        await adopted(house)
        await trio.sleep(1)
        assert await house.reconciler.updates.update(MANAGER, OPERATOR)
        assert asked(house) == {"agent0", "hm1nd"}
        await stop(house, "hm1nd")
        assert house.live("hm1nd").state == "idle"


async def test_one_that_is_kept_down_or_not_there_is_refused(autojump_clock: MockClock) -> None:
    async with upgraded() as house, house.daemon():
        await adopted(house)
        await house.agents.want(FIRST, "down", OPERATOR)
        with pytest.raises(Refusal, match="cannot update agent0: it is kept down, and is started as it shall be by"):
            await house.reconciler.updates.update(FIRST, OPERATOR)
        with pytest.raises(Refusal, match="cannot find nobody: no agent has that name"):
            await house.reconciler.updates.update(AgentName("nobody"), OPERATOR)


async def test_who_is_paused_is_replaced_when_it_goes_on_and_who_is_down_when_it_is_started(
    autojump_clock: MockClock,
) -> None:
    async with upgraded() as house, house.daemon():
        await house.agents.want(FIRST, "paused", OPERATOR)
        await house.agents.want(AgentName("agent1"), "down", OPERATOR)
        await adopted(house, *NAMES)
        await trio.sleep(1)
        assert asked(house) == {"agent2"}
        await stop(house, "agent2")
        await stop(house, "agent3")
        await trio.sleep(1)
        assert asked(house) == set()
        await house.agents.want(FIRST, "up", OPERATOR)
        await trio.sleep(1)
        assert asked(house) == {"agent0"}
        await house.agents.want(AgentName("agent1"), "up", OPERATOR)
        await trio.sleep(1)
        assert len(house.starts_of("agent1")) == 1


async def test_one_that_is_destroyed_or_ended_while_it_is_replaced_gives_its_place_back(
    autojump_clock: MockClock,
) -> None:
    async with upgraded() as house, house.daemon():
        await adopted(house)
        await trio.sleep(1)
        assert asked(house) == {"agent0"}
        await house.reconciler.kill(FIRST, OPERATOR)
        await trio.sleep(1)
        assert "agent1" in asked(house)


async def test_who_outlived_a_daemon_that_wrote_no_generation_down_is_not_replaced(autojump_clock: MockClock) -> None:
    async with upgraded() as house:
        await house.store.write(lambda tx: tx.execute("UPDATE container_states SET generation = NULL").rowcount)
        async with house.daemon():
            await adopted(house)
            await trio.sleep(100)
            assert asked(house) == set()


async def test_an_agent_that_is_deployed_as_another_container_is_replaced_at_its_turns_edge(
    autojump_clock: MockClock,
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.driver.begun) == 2)
            house.driver.shapes["iris"] = "with more programs"
            await house.store.write(lambda tx: set_deployed(tx, "iris", "1" * 40, SETTINGS))
            await trio.sleep(1)
            assert asked(house) == {"iris"}
            await stop(house, "iris")
            assert house.reconciler.updates.outdated == []


def test_the_revision_is_another_when_what_an_agent_runs_is_and_the_same_in_another_place(tmp_path: Path) -> None:
    for part in ("hive_agent", "hive_core/protocol", "hive_core/containers", "dashboard"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "one.py").write_text("one = 1\n")
    (tmp_path.parent / "second").symlink_to(tmp_path)
    before = revision_of(tmp_path)
    assert before.startswith("0.")
    (tmp_path / "dashboard" / "one.py").write_text("one = 2\n")
    (tmp_path / "hive_agent" / "one.pyc").write_text("x")
    assert revision_of(tmp_path.parent / "second") == before
    (tmp_path / "hive_core" / "containers" / "one.py").write_text("one = 2\n")
    assert revision_of(tmp_path) != before


async def test_what_cannot_be_asked_when_something_is_deployed_ends_no_daemon_and_holds_up_nobody(
    autojump_clock: MockClock,
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris", "argus")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.driver.begun) == 3)
            away = Refusal("unavailable", "cannot reach the helper: it is away")
            house.driver.failing = {("argus", "generation"): away}
            house.driver.shapes["iris"] = "with more programs"
            await house.store.write(lambda tx: set_deployed(tx, "iris", "1" * 40, SETTINGS))
            await trio.sleep(1)
            assert asked(house) == {"iris"}


async def test_one_that_does_not_come_up_is_told_of_though_its_driver_cannot_say_its_last_words(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded() as house:

        def life(name: AgentName, container: Container) -> None:
            if name == FIRST:
                house.driver.failing[(name, "last_words")] = OSError(5, "Input/output error")
                container.end(7)
            else:
                house.hello(name)

        house.driver.life = life
        async with house.daemon():
            await adopted(house)
            await trio.sleep(1)
            await stop(house, "agent0")
            await trio.sleep(20)
            assert house.reconciler.updates.is_failed(FIRST)
            assert asked(house) == set()
        (told,) = [text for text in await house.mail(MANAGER) if text.startswith("needs_update")]
        assert told == (
            "needs_update: 4 agents stay as they are, since agent0 did not come up when it was replaced\n"
            f"agents: agent1, agent2, agent3, hm1nd\nrevision: {revision()}"
        )
    caplog.clear()


async def test_one_that_did_not_come_up_and_is_destroyed_holds_up_the_others_no_more(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with upgraded() as house, house.daemon():
        await adopted(house)
        await fail(house, "crashes")
        assert house.reconciler.updates.trouble
        await house.agents.want(FIRST, "down", OPERATOR)
        await house.reconciler.leave(FIRST, True)
        await house.store.write(lambda tx: tx.execute("DELETE FROM agents WHERE name = 'agent0'").rowcount)
        house.reconciler.left(FIRST)
        await trio.sleep(60)
        assert house.reconciler.updates.trouble == ""
        assert asked(house) == {"agent1"}
    caplog.clear()


async def test_who_may_not_be_started_yet_runs_on_and_holds_up_nobody(autojump_clock: MockClock) -> None:
    async with upgraded() as house:
        house.unfit = dict.fromkeys(("hm1nd", *NAMES), "its container is being built")
        async with house.daemon():
            await adopted(house)
            await trio.sleep(100)
            house.desks[FIRST].at_edge()
            with pytest.raises(Refusal, match="cannot update agent0: its container is being built"):
                await house.reconciler.updates.update(FIRST, OPERATOR)
            assert asked(house) == set()
            del house.unfit["agent2"]
            house.store.bus.publish([WANTED])
            await trio.sleep(1)
            assert asked(house) == {"agent2"}
            await stop(house, "agent2")
            house.unfit.clear()
            house.store.bus.publish([WANTED])
            await trio.sleep(1)
            assert asked(house) == {"agent0", "agent1"}
            assert house.reconciler.updates.trouble == ""
