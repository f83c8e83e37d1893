"""Restarts, quarantine and mass starts, in virtual time."""

from __future__ import annotations

import errno
import itertools
import json

import pytest
import trio
from trio.testing import MockClock

from hive_core.containers.running import Exit
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.stopped import stopped
from hive_core.store.errors import StoreBusy
from tests.scripted_driver import Container, House, open_house

IRIS = AgentName("iris")


async def test_a_container_that_crashes_rests_twice_as_long_each_time_and_no_longer_than_a_minute(
    autojump_clock: MockClock,
) -> None:
    async with open_house(crash_loop=100) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash("iris")
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 10)
    begun = house.starts_of("iris")
    rests = [round(then - now) for now, then in itertools.pairwise(begun)]
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_daemon_that_starts_again_goes_on_with_the_rest_and_the_count(autojump_clock: MockClock) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash("iris")
        for _ in range(20):
            async with house.daemon():
                await trio.sleep(0.5)
        assert [round(at) for at in house.starts_of("iris")] == [0, 1, 3, 7]


async def test_a_crash_loop_is_quarantined_across_daemons_and_told_once_to_the_manager_and_the_operator(
    autojump_clock: MockClock,
) -> None:
    async with open_house(crash_loop=4) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash("iris")
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "quarantined")
            await trio.sleep(3600)
        async with house.daemon():
            await trio.sleep(3600)
            seen = house.live("iris")
            assert (seen.state, len(house.starts_of("iris"))) == ("quarantined", 4)
            why = 'it crashed 4 times in a row; the last time it ended with code 1. Its last words: "iris fell over".'
            assert seen.detail == f"{why} `hive start iris` starts it again"
            (row,) = stopped(house.agents, await house.agents.all(), house.reconciler.trouble)
            assert (row["agents"], row["state"], row["why"]) == (["iris"], "quarantined", seen.detail)
        told = f"container_quarantined: iris is not started any more: {seen.detail}\nagent: iris"
        assert await house.mail(OPERATOR) == [told]
        assert await house.mail(MANAGER) == [
            "container_crash: iris ended with code 1, and is started again by itself\n"
            'agent: iris\nlast_words: "iris fell over"',
            told,
        ]
        assert (await house.kinds("iris")).count("agent_quarantined") == 1


async def test_the_operator_starts_a_quarantined_agent_and_its_crashes_count_no_more(autojump_clock: MockClock) -> None:
    async with open_house(crash_loop=2) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash("iris")
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "quarantined")
            await house.agents.want(IRIS, "paused", OPERATOR)
            await trio.sleep(100)
            assert len(house.starts_of("iris")) == 2
            await house.agents.want(IRIS, "up", OPERATOR)
            await house.until(lambda: len(house.starts_of("iris")) == 4)
            began = house.starts_of("iris")
            assert round(began[3] - began[2]) == 1
            await house.until(lambda: house.live("iris").state == "quarantined")


async def test_a_steady_run_makes_the_next_crash_the_first_in_a_row(autojump_clock: MockClock) -> None:
    async with open_house(crash_loop=3, crash_loop_s=100.0) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 1)
            for ran_s in (10, 80, 110, 80, 110):
                await trio.sleep(ran_s)
                house.last_of("iris").end(1)
                await trio.sleep(5)
            assert house.live("iris").state == "idle"
        assert len([text for text in await house.mail(MANAGER) if "container_crash" in text]) == 3


async def test_exits_while_the_daemon_was_away_count_too(autojump_clock: MockClock) -> None:
    async with open_house(crash_loop=3) as house:
        await house.add_agents("hm1nd", "iris")
        for _ in range(3):
            house.driver.missed[IRIS] = Exit(137)
            async with house.daemon():
                await trio.sleep(0.5)
        async with house.daemon():
            await trio.sleep(1)
            assert house.live("iris").state == "quarantined"
            assert "was killed by signal 9 (SIGKILL) while the daemon was away" in house.live("iris").detail
        assert house.starts_of("iris") == []


async def test_a_harness_that_hangs_counts_as_a_crash(autojump_clock: MockClock) -> None:
    async with open_house(crash_loop=3, lease_silence_s=10.0) as house:
        await house.add_agents("hm1nd", "iris")
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "quarantined")
            assert "it was ended: its harness was not connected for 50 s" in house.live("iris").detail
        assert [round(at) for at in house.starts_of("iris")] == [0, 51, 103]


@pytest.mark.parametrize("asked", [True, False])
async def test_an_end_with_code_0_is_a_crash_only_when_nobody_asked_for_it(
    autojump_clock: MockClock, asked: bool
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 1)
            house.hello("iris")
            if asked:
                house.desks[IRIS].outdated = "of an older version"
            house.driver.begun[-1][1].end(0)
            await trio.sleep(0.9)
            assert len(house.starts_of("iris")) == (2 if asked else 1)
            assert house.live("iris").state == ("starting" if asked else "crashed")
            house.driver.begun[-1][1].end(0)  # the next one is nothing that was asked of the one before
            await trio.sleep(0.1)
            assert house.live("iris").state == "crashed"
            assert "and nobody had asked it to" in house.live("iris").detail


async def test_a_clock_that_is_set_back_locks_no_agent(autojump_clock: MockClock) -> None:
    async with open_house(crash_loop=100) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash("iris")
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 3)
            house.set_s = -365 * 86_400.0
        begun = len(house.starts_of("iris"))
        async with house.daemon():
            await trio.sleep(1)
            assert len(house.starts_of("iris")) > begun


async def test_a_container_that_cannot_be_started_is_told_and_quarantined_and_the_others_run(
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with open_house(crash_loop=2) as house:
        await house.add_agents("hm1nd", "iris")
        house.driver.broken = "no such program"
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "quarantined")
            assert "the last time it could not be started: no such program." in house.live("iris").detail
            house.driver.broken = ""
            await house.agents.want(IRIS, "up", OPERATOR)
            await house.until(lambda: len(house.starts_of("iris")) == 1)
    assert "cannot start iris: no such program" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("asked", ["find", "generation", "start"])
async def test_an_agent_whose_driver_cannot_be_asked_for_a_while_is_told_and_has_not_crashed(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    away = Refusal("unavailable", "cannot reach the helper: it is away; start it")
    async with open_house(crash_loop=2) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        house.driver.failing["iris", asked] = away
        async with house.daemon():
            await trio.sleep(100)
            seen = house.live("iris")
            assert (seen.state, seen.detail) == ("starting", away.message)
            assert house.live("hm1nd").state == "idle"
            (row,) = stopped(house.agents, await house.agents.all(), house.reconciler.trouble)
            assert (row["agents"], row["state"]) == (["iris"], "starting")
            assert row["why"] == f"{away.message}; that is tried again by itself"
            house.driver.failing.clear()
            await trio.sleep(6)
            assert stopped(house.agents, await house.agents.all(), house.reconciler.trouble) == []
            assert (house.live("iris").state, len(house.starts_of("iris"))) == ("idle", 1)
        assert "agent_ended" not in await house.kinds("iris")
    assert {record.message for record in caplog.records} == {f"cannot run iris: {away.message}"}
    caplog.clear()


async def test_an_agent_that_runs_on_while_its_driver_cannot_be_asked_is_then_what_it_was(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "idle")
        house.driver.left[IRIS] = house.last_of("iris")
        house.driver.failing["iris", "find"] = Refusal("unavailable", "cannot reach the helper: it is away; start it")
        async with house.daemon():
            await trio.sleep(1)
            house.hello("iris")  # its sockets are served, whatever is away
            await trio.sleep(30)
            assert (house.live("iris").state, house.live("iris").detail[:23]) == ("idle", "cannot reach the helper")
            house.driver.failing.clear()
            await trio.sleep(6)
            assert (house.live("iris").state, house.live("iris").detail) == ("idle", "")
        assert len(house.starts_of("iris")) == 1
    caplog.clear()


async def test_an_agent_whose_sockets_cannot_be_opened_is_told_and_tried_again_by_itself(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        house.unserved = "no space left on device"
        async with house.daemon():
            await trio.sleep(100)
            assert house.driver.begun == []
            (row,) = stopped(house.agents, await house.agents.all(), house.reconciler.trouble)
            assert row["why"] == "no space left on device; it is started again by itself"
            house.unserved = ""
            await trio.sleep(60)
            assert {house.live(name).state for name in ("hm1nd", "iris")} == {"idle"}
    assert {record.message for record in caplog.records} == {
        f"cannot serve {name}: no space left on device" for name in ("hm1nd", "iris")
    }
    caplog.clear()


async def test_a_container_that_does_not_end_is_said_to_be_there_still_and_is_not_started_twice(
    autojump_clock: MockClock,
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.driver.mortal = False
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 1)
            with pytest.raises(Refusal, match="cannot end iris at once: process 2 was killed and has not gone yet"):
                await house.reconciler.kill(IRIS, OPERATOR)
            await house.agents.want(IRIS, "up", OPERATOR)
            await trio.sleep(100)
            assert len(house.starts_of("iris")) == 1
            await house.agents.want(IRIS, "down", OPERATOR)
            house.driver.begun[1][1].end(137)
            await house.until(lambda: house.live("iris").state == "down")


@pytest.mark.parametrize("shape", ["one", "another"])
async def test_a_container_of_another_shape_is_replaced_at_its_turns_edge_and_one_of_the_same_goes_on(
    autojump_clock: MockClock, shape: str
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.starts_of("iris")) == 1)
        house.driver.left[IRIS] = house.last_of("iris")
        house.driver.shape = shape
        async with house.daemon():
            await trio.sleep(1)
            house.hello("iris")
            await trio.sleep(0.1)
            assert house.desks[IRIS].begins_none == (shape == "another")
            assert len(house.starts_of("iris")) == 1, "its turn is not cut"
            if shape == "another":
                house.last_of("iris").end(0)
                await trio.sleep(0.5)
                assert len(house.starts_of("iris")) == 2
                assert not house.desks[IRIS].begins_none
            await trio.sleep(100)
            assert house.live("iris").state == "idle"
        assert await house.mail(MANAGER) == []


# -- what goes wrong with one agent, and with no other -----------------------------------------------------------------


@pytest.mark.parametrize("what", ["find", "missed_exit", "forget", "last_words", "start"])
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/x/iris.json"), "/x/iris.json: a directory stands where a"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/iris.run"), "/x/iris.run: no space is left; make room"),
        (Refusal("refused", "cannot allocate uids for iris: all 3 are"), "cannot allocate uids for iris: all 3 are"),
        (StoreBusy("cannot write: the disk is full"), "cannot write: the disk is full"),
    ],
    ids=["directory", "full", "uids", "busy"],
)
async def test_what_the_driver_cannot_do_for_one_agent_is_that_agents_trouble_and_is_tried_again(
    autojump_clock: MockClock, what: str, trouble: Exception, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris", "rowan")
        house.let_crash()
        house.driver.failing["iris", what] = trouble
        async with house.daemon():
            await trio.sleep(5)
            if what in ("forget", "last_words"):
                house.last_of("iris").end(1)
            await trio.sleep(5)
            seen = house.live("iris")
            assert seen.state == "crashed"
            assert said in seen.detail
            assert {house.live(name).state for name in ("hm1nd", "rowan")} == {"idle"}
            house.driver.failing.clear()
            await trio.sleep(100)
            assert house.live("iris").state == "idle"
            assert len(house.starts_of("rowan")) == 1
    assert "iris" in caplog.text
    caplog.clear()


async def test_one_that_runs_already_when_it_is_to_be_started_is_adopted_and_has_not_crashed(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "idle")
        # Of a start that the daemon before had not seen to its end: it was not there yet to be found.
        house.driver.failing = {("iris", "start"): BlockingIOError(errno.EAGAIN, "it runs already")}
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "crashed")
            assert "it runs already" in house.live("iris").detail
            house.driver.left = dict(house.driver.begun)
            await house.until(lambda: "iris" in house.reconciler.running())
        assert "agent_quarantined" not in await house.kinds("iris")
        assert await house.store.row("SELECT 1 FROM container_states WHERE crashes > 0") is None
    caplog.clear()


async def test_a_disk_that_is_full_while_agents_start_quarantines_none(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_house(crash_loop=2) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        house.driver.failing["iris", "start"] = OSError(errno.ENOSPC, "No space left on device", "/x/iris.run")
        async with house.daemon():
            await trio.sleep(3600)
            house.driver.failing.clear()
            await trio.sleep(60)
            assert house.live("iris").state == "idle"
        assert await house.mail(MANAGER) == []
    caplog.clear()


async def test_a_drain_and_a_destruction_do_not_wait_for_ever_for_a_container_that_does_not_end(
    autojump_clock: MockClock,
) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.driver.mortal = False
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: len(house.driver.begun) == 2)
            await house.agents.want(IRIS, "down", OPERATOR)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.reconciler.leave, IRIS, True)
                await trio.sleep(60)
                assert house.reconciler.lingers(IRIS) == (
                    "process 2 was killed and has not gone yet; its disk may hang"
                )
                ends = await house.reconciler.drain(5.0)
                assert ends == {"hm1nd": "not ended", "iris": "not ended"}
                for _, container in house.driver.begun:
                    container.end(137)


async def test_an_agent_whose_start_hangs_holds_up_no_other_and_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with open_house(starts_at_once=1, start_s=20.0) as house:
        await house.add_agents("hm1nd", "iris", "rowan")
        house.let_crash()
        house.driver.stuck.add("iris")
        async with house.daemon():
            await trio.sleep(100)
            assert {house.live(name).state for name in ("hm1nd", "rowan")} == {"idle"}
            assert house.live("iris").detail == "its start has not come back for 20 s; its disk may hang"
            assert house.reconciler.lingers(IRIS) == "its start has not come back; its disk may hang"
            with pytest.raises(Refusal, match="cannot end iris at once: its start has not come back; its disk may"):
                await house.reconciler.kill(IRIS, OPERATOR)
            assert (await house.reconciler.drain(1.0))["iris"] == "not ended"


async def test_agents_that_went_down_with_the_machine_have_not_crashed(autojump_clock: MockClock) -> None:
    async with open_house() as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        house.driver.missed = {MANAGER: Exit(None, with_machine=True), IRIS: Exit(None, with_machine=True)}
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "idle")
        assert await house.mail(MANAGER) == []
        (row,) = await house.store.rows("SELECT data FROM events WHERE kind = 'agent_ended' AND agent = 'iris'")
        assert json.loads(row["data"])["when"] == "with the machine"


# -- mass starts ------------------------------------------------------------------------------------------------------


async def begin(house: House) -> None:
    await house.add_agents("hm1nd", *(f"agent{number}" for number in range(6)))


async def test_so_many_start_at_once_the_manager_first_then_by_name_and_the_others_say_for_how_many_they_wait(
    autojump_clock: MockClock,
) -> None:
    async with open_house(starts_at_once=2, start_s=1000.0) as house:
        await begin(house)
        async with house.daemon():
            await trio.sleep(10)
            assert [name for name, _ in house.driver.begun] == ["hm1nd", "agent0"]
            waits = [house.live(f"agent{number}") for number in range(1, 6)]
            assert [live.detail for live in waits] == [f"waits for {number} others" for number in range(2, 7)]
            assert {live.state for live in waits} == {"starting"}
            for started in ("agent0", "agent1", "hm1nd", "agent2", "agent3", "agent4"):
                house.hello(started)
                await trio.sleep(1)
        assert [name for name, _ in house.driver.begun] == ["hm1nd", *(f"agent{number}" for number in range(6))]


async def test_a_start_that_never_says_hello_gives_its_place_back(autojump_clock: MockClock) -> None:
    async with open_house(starts_at_once=1, start_s=20.0) as house:
        await begin(house)
        async with house.daemon():
            await house.until(lambda: len(house.driver.begun) == 7)
        assert [round(container.began_s) for _, container in house.driver.begun] == [0, 20, 40, 60, 80, 100, 120]


async def test_one_that_crashes_while_it_starts_and_one_that_is_not_wanted_any_more_keep_no_place(
    autojump_clock: MockClock,
) -> None:
    async with open_house(starts_at_once=1, start_s=10_000.0) as house:
        await begin(house)
        async with house.daemon():
            await trio.sleep(1)
            await house.agents.want(AgentName("agent0"), "down", OPERATOR)
            house.driver.begun[0][1].end(1)
            await trio.sleep(0.5)
            assert [name for name, _ in house.driver.begun] == ["hm1nd", "agent1"]
            assert house.live("agent0").state == "down"
            await house.agents.want(AgentName("agent0"), "up", OPERATOR)
            await trio.sleep(2)
            # The manager's rest is over: it comes before all that wait.
            house.hello("agent1")
            await trio.sleep(1)
            assert [name for name, _ in house.driver.begun][2:] == ["hm1nd"]
            house.hello("hm1nd")
            await trio.sleep(1)
            assert [name for name, _ in house.driver.begun][3:] == ["agent0"]


async def test_those_that_outlived_a_daemon_are_adopted_all_at_once(autojump_clock: MockClock) -> None:
    async with open_house(starts_at_once=1) as house:
        await begin(house)
        house.driver.left = {AgentName(f"agent{number}"): Container(100 + number, True) for number in range(6)}
        async with house.daemon():
            await trio.sleep(0.5)
            assert (await house.store.rows("SELECT count(*) FROM events WHERE kind = 'agent_adopted'"))[0][0] == 6
        assert [name for name, _ in house.driver.begun] == ["hm1nd"]


async def test_a_drain_waits_for_none_that_only_waits_to_start(autojump_clock: MockClock) -> None:
    async with open_house(starts_at_once=1, start_s=10_000.0) as house:
        await begin(house)
        async with house.daemon():
            await trio.sleep(1)
            assert await house.reconciler.drain(5.0) == {"hm1nd": "killed"}
            await trio.sleep(100)
        assert len(house.driver.begun) == 1
