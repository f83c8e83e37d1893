"""When snapshots of agents' /state are taken, and how one is restored while the hive runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hive_core.cli import snapshots as lines
from hive_core.limits import Limits
from hive_core.procedures import snapshotting
from hive_core.procedures.snapshotting import Snapshotting
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.broker import Acked
from hive_core.services.leases import Lease
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, Services, open_services
from tests.scripted_driver import Container, House, open_house

IRIS = AgentName("iris")
MIB = 2**20


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path, limits=Limits(snapshots_bytes=MIB)) as services:
        await services.add_agents("hm1nd", "iris")
        notes(services).parent.mkdir(parents=True)
        notes(services).write_text("one")
        yield services


def notes(hive: Services) -> Path:
    return hive.state_dir / "agents" / "iris" / "state" / "notes"


async def begin_turn(hive: Services) -> Lease:
    await hive.say("operator", "iris", "work")
    with trio.fail_after(PATIENCE_S):
        return await hive.broker.lease(IRIS)


async def end_turn(hive: Services, lease: Lease, next_fence: str | None = None) -> Acked:
    return await hive.broker.ack(IRIS, lease.turn, "done", next_fence=next_fence)


async def look(taking: Snapshotting) -> float:
    """One look, and whatever it begins to its end."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            return await taking.look(nursery)


async def test_while_its_edge_is_held_an_agent_begins_no_turn_and_one_that_runs_goes_on(hive: Services) -> None:
    lease = await begin_turn(hive)
    access = hive.agents.access
    await hive.say("operator", "iris", "more")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.serve, hive.store)
        with access.at_edge(IRIS):
            assert access.closed(IRIS) is None, "its calls to the model are passed on"
            assert (await end_turn(hive, lease, "next")).lease is None
            leased: list[Lease] = []

            async def wait_for_turn() -> None:
                leased.append(await hive.broker.lease(IRIS, "next"))
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_for_turn)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert leased == []
        with trio.fail_after(PATIENCE_S):
            await trio.sleep_forever()
    assert leased[0].message["body"] == "more"


async def test_one_is_taken_at_the_edge_of_a_turn_and_never_within_one(hive: Services) -> None:
    taking = hive_of(hive).snapshots
    await look(taking)  # what was before the daemon began is no turn's edge
    first = await begin_turn(hive)
    notes(hive).write_text("two")
    assert await look(taking) == float("inf")
    assert await taking.all(IRIS) == []
    await end_turn(hive, first)
    second = await begin_turn(hive)
    notes(hive).write_text("half writt")
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            await taking.look(nursery)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert await taking.all(IRIS) == [], "it waits for the edge"
            notes(hive).write_text("whole")
            await end_turn(hive, second)
    (one,) = await taking.all(IRIS)
    assert (one.why, one.files) == ("at its turn's edge", 1)
    assert (hive.state_dir / "agents/iris/snapshots" / one.id / "state/notes").read_text() == "whole"
    assert (await hive.kinds()).count("snapshot_taken") == 1


async def test_the_next_one_is_taken_no_sooner_than_it_is_due_and_only_of_an_agent_that_had_a_turn(
    hive: Services,
) -> None:
    taking = hive_of(hive).snapshots
    await look(taking)
    await end_turn(hive, await begin_turn(hive))
    await look(taking)
    notes(hive).write_text("two")
    assert await look(taking) == float("inf"), "it had no turn since"
    await end_turn(hive, await begin_turn(hive))
    assert 590 < await look(taking) <= 600
    assert len(await taking.all(IRIS)) == 1
    assert await taking.all(AgentName("hm1nd")) == []


async def test_the_operator_takes_one_of_what_changed_and_reads_why_where_none_can_be(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = hive_of(hive)
    desk = AdminDesk(house)

    async def call(verb: str, **args: Any) -> Any:
        return await desk._verbs[verb][0](args)

    taken = (await call("snapshot", agent="iris"))["snapshot"]
    assert (taken["why"], taken["files"], taken["left_out"]) == ("operator asked for it", 1, 0)
    assert (await call("snapshot", agent="iris"))["snapshot"] is None
    assert (await call("snapshots", agent="iris"))["snapshots"] == [taken]
    assert "1 file, 0.0 MiB: operator asked for it" in lines._line(taken)
    notes(hive).write_bytes(b"x" * 2 * MIB)
    with pytest.raises(Refusal, match="snapshots_bytes"):
        await call("snapshot", agent="iris")
    assert "snapshots_bytes" in (await call("snapshots", agent="iris"))["trouble"]
    notes(hive).write_text("small again")
    lease = await begin_turn(hive)
    monkeypatch.setattr(snapshotting, "EDGE_PATIENCE_S", 0.01)
    with pytest.raises(Refusal, match="its turn has not ended within"):
        await call("snapshot", agent="iris")
    await end_turn(hive, lease)
    monkeypatch.setattr(snapshotting, "EDGE_PATIENCE_S", PATIENCE_S)
    assert (await call("snapshot", agent="iris"))["snapshot"] is not None
    assert (await call("snapshots", agent="iris"))["trouble"] is None
    for name in ("nobody", "../iris", 7):
        with pytest.raises(Refusal):
            await call("snapshots", agent=name)


async def test_what_cannot_be_written_costs_the_snapshot_and_nothing_else(hive: Services) -> None:
    house = hive_of(hive)
    await look(house.snapshots)
    (hive.state_dir / "agents/iris/snapshots").write_text("no directory can be made here")
    with pytest.raises(Refusal, match="cannot use the snapshots of iris"):
        await house.snapshots.take(IRIS)
    assert "cannot use the snapshots of iris" in house.snapshots.trouble(IRIS)
    await end_turn(hive, await begin_turn(hive))
    assert 3590 < await look(house.snapshots) <= 3600, "trying again keeps turns waiting"


# -- restored, with containers that end as told ------------------------------------------------------------------------


def state_of(folder: Path) -> Path:
    state = folder / "agents" / "iris" / "state"
    state.mkdir(parents=True, exist_ok=True)
    return state


def taking_of(house: House, folder: Path) -> Snapshotting:
    taking = Snapshotting(
        house.store,  # type: ignore[arg-type]
        house.agents,
        house.agents.access,
        house.reconciler,
        house.limits,
        folder,
        house.wall_clock,
    )
    house.reconciler.before_switch(taking.before_switch)
    return taking


def let_end_when_asked(house: House) -> None:
    """Harnesses that end as soon as they are asked to stop."""

    def life(name: AgentName, container: Container) -> None:
        house.hello(name)

    house.driver.life = life


async def test_a_restore_ends_the_container_at_its_turns_edge_and_starts_it_again(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        let_end_when_asked(house)
        async with house.daemon(), trio.open_nursery() as nursery:
            taking = taking_of(house, tmp_path)
            await house.until(lambda: len(house.driver.begun) == 2)
            (state_of(tmp_path) / "note").write_text("good")
            good = await taking.take(IRIS)
            (state_of(tmp_path) / "note").unlink()
            desk = house.desks[IRIS]

            async def end_at_the_edge() -> None:
                await house.until(lambda: desk.asked_to_stop)
                (state_of(tmp_path) / "unsaved").write_text("of the turn that ran")
                await trio.sleep(3)
                house.last_of("iris").end(0)

            nursery.start_soon(end_at_the_edge)
            restored, kept = await taking.restore(IRIS)
            assert restored == good
            assert {path.name: path.read_text() for path in state_of(tmp_path).iterdir()} == {"note": "good"}
            before = tmp_path / "agents/iris/snapshots" / kept.id / "state"
            assert [path.name for path in before.iterdir()] == ["unsaved"]
            await house.until(lambda: len(house.starts_of("iris")) == 2)
        kinds = await house.kinds("iris")
        assert "container_crash" not in kinds
        assert kinds[kinds.index("agent_ended") : kinds.index("agent_ended") + 3] == [
            "agent_ended",
            "state_restored",
            "agent_started",
        ]


async def test_a_restore_whose_agent_has_a_long_turn_is_refused_and_at_once_it_is_not(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        let_end_when_asked(house)
        async with house.daemon():
            taking = taking_of(house, tmp_path)
            await house.until(lambda: len(house.driver.begun) == 2)
            with pytest.raises(Refusal, match="it has no /state"):
                await taking.restore(IRIS, at_once=True)
            (state_of(tmp_path) / "note").write_text("good")
            await taking.take(IRIS)
            (state_of(tmp_path) / "note").write_text("bad")
            with pytest.raises(Refusal, match="its turn runs; wait for its end, or `hive restore-state iris --now`"):
                await taking.restore(IRIS)
            assert (state_of(tmp_path) / "note").read_text() == "bad"
            with pytest.raises(Refusal, match="no snapshot has that name"):
                await taking.restore(IRIS, "1999", at_once=True)
            await taking.restore(IRIS, at_once=True)
            assert (state_of(tmp_path) / "note").read_text() == "good"


async def test_one_is_taken_before_an_agent_is_started_in_a_container_of_another_shape(
    autojump_clock: MockClock, tmp_path: Path
) -> None:
    async with open_house() as house:
        await house.add_agents("iris")
        let_end_when_asked(house)
        (state_of(tmp_path) / "note").write_text("good")
        for shape, count in (("one", 0), ("one", 0), ("two", 1)):
            house.driver.shape = shape
            house.open()
            async with house.daemon():
                taking = taking_of(house, tmp_path)
                await house.until(lambda: house.live("iris").state == "idle")
                assert len(await taking.all(IRIS)) == count


async def test_an_agent_that_may_run_unseen_is_not_given_another_state_under_its_hands(
    autojump_clock: MockClock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house() as house:
        await house.add_agents("iris")
        let_end_when_asked(house)
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "idle")
        house.driver.left = dict(house.driver.begun)
        away = Refusal("unavailable", "cannot reach the helper: it is away")
        house.driver.failing = {("iris", "find"): away}
        async with house.daemon():
            taking = taking_of(house, tmp_path)
            (state_of(tmp_path) / "note").write_text("good")
            await taking.take(IRIS)
            (state_of(tmp_path) / "note").write_text("of the turn that runs")
            for at_once in (False, True):
                with pytest.raises(Refusal, match="cannot reach the helper"):
                    await taking.restore(IRIS, at_once=at_once)
            assert (state_of(tmp_path) / "note").read_text() == "of the turn that runs"
            house.driver.failing = {}
            await house.until(lambda: house.reconciler.running() == [IRIS])
            await taking.restore(IRIS, at_once=True)
            assert (state_of(tmp_path) / "note").read_text() == "good"
    caplog.clear()
