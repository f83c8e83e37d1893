"""The health gate of a changed agent, in virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from hive_core.procedures.trials import Trial
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from tests.hives import SETTINGS
from tests.scripted_driver import Container, House, open_house

IRIS = AgentName("iris")
LIMITS = {"hello_s": 30.0, "init_s": 20.0, "crash_loop": 3}


@asynccontextmanager
async def opened(**limits: float) -> AsyncIterator[House]:
    """A hive whose iris runs and takes turns."""
    async with open_house(**{**LIMITS, **limits}) as house:
        await house.add_agents("hm1nd", "iris")
        house.let_crash()
        async with house.daemon():
            await house.until(lambda: house.live("iris").state == "idle")
            yield house


async def end_at_the_edge(house: House) -> None:
    """iris's harness ends when it is asked to."""
    await house.until(lambda: house.desks[IRIS].stops and IRIS in house.reconciler.running())
    house.running("iris").end(0)


@asynccontextmanager
async def on_trial(house: House) -> AsyncIterator[Trial]:
    async with house.reconciler.trial(IRIS) as trial:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_at_the_edge, house)
            async with trial.at_rest():
                assert IRIS not in house.reconciler.running()
                nursery.cancel_scope.cancel()
        yield trial


async def answer_check(
    house: House, error: str = "", reason: str | None = None, canary: bool = False, without: object = ()
) -> None:
    """The harness of iris is asked to check its program, or for a canary turn, and tells how that ended."""
    checks = house.desks[IRIS].checks
    await house.until(lambda: checks.asked is not None and checks.calls_model == canary)
    assert checks.asked is not None
    told = {"check": checks.asked.key, "ok": not error, "reason": reason, "without": without}
    assert checks.answered(told, error)


def hello_that_can_check(name: str, house: House) -> None:
    house.hello(name)
    house.desks[AgentName(name)].checks.can = True


def let_live(house: House, life: str) -> None:
    """What becomes of containers of iris that begin from now on."""

    def begin(name: AgentName, container: Container) -> None:
        if name != IRIS or life == "comes up":
            hello_that_can_check(name, house)
        elif life == "ends":
            container.end(7)

    house.driver.life = begin


async def failure(trial: Trial) -> str:
    with pytest.raises(Refusal) as caught:
        await trial.prove(SETTINGS)
    assert caught.value.code == "failed"
    return caught.value.message


async def test_who_says_hello_and_reaches_its_tools_is_healthy_and_takes_no_turn_before(
    autojump_clock: MockClock,
) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "healthy"
            assert house.desks[IRIS].checks.held
        assert not house.desks[IRIS].checks.held
        assert len(house.starts_of("iris")) == 2


@pytest.mark.parametrize(
    ("without", "proof"),
    [
        (["maps", "files"], "healthy, but without its MCP servers maps, files, which do not start"),
        (["maps", "No\nserver", 7], "healthy, but without its MCP servers maps, which do not start"),
        ("maps", "healthy"),
    ],
)
async def test_servers_of_tools_that_do_not_start_are_told_and_take_nothing_back(
    autojump_clock: MockClock, without: object, proof: str
) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(partial(answer_check, house, without=without))
            assert await trial.prove(SETTINGS) == proof


@pytest.mark.parametrize(
    ("life", "why", "took_s"),
    [
        ("ends", 'it ended with code 7; its last words: "iris fell over"', 1),
        ("hangs", 'it said no hello within 30 s (hello_s); its last words: "iris fell over"', 30),
    ],
)
async def test_who_does_not_come_up_is_told_once_and_counts_no_crash(
    autojump_clock: MockClock, life: str, why: str, took_s: int
) -> None:
    async with opened() as house:
        let_live(house, life)
        began = trio.current_time()
        async with on_trial(house) as trial:
            assert await failure(trial) == f"cannot keep the change of iris: {why}"
            assert trio.current_time() - began <= took_s + 1
            await trio.sleep(100)
            assert len(house.starts_of("iris")) == 2, "it was started again on trial"
            let_live(house, "comes up")
            async with trial.back():
                assert IRIS not in house.reconciler.running()
        await house.until(lambda: house.live("iris").state == "idle")
        assert len(house.starts_of("iris")) == 3
        assert await house.mail(MANAGER) == []
        assert await house.store.rows("SELECT 1 FROM container_states WHERE agent = 'iris' AND crashes > 0") == []


async def test_who_crashes_after_its_hello_has_not_come_up(autojump_clock: MockClock) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:

            async def crash() -> None:
                await house.until(lambda: house.desks[IRIS].checks.asked is not None)
                house.running("iris").end(9)

            nursery.start_soon(crash)
            assert "it ended with code 9; its last words" in await failure(trial)


async def test_who_crashes_once_it_is_proven_has_crashed_as_any_other(autojump_clock: MockClock) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "healthy"
            house.running("iris").end(9)
            await house.until(lambda: len(house.starts_of("iris")) == 3)
            assert house.desks[IRIS].checks.held
        assert not house.desks[IRIS].checks.held
        (told,) = await house.mail(MANAGER)
        assert told.startswith("container_crash: iris ended with code 9, and is started again by itself")


async def test_a_restart_in_the_middle_of_a_trial_is_one_and_the_trial_goes_on(autojump_clock: MockClock) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:

            async def restart() -> None:
                await house.until(lambda: house.desks[IRIS].checks.asked is not None)
                await house.reconciler.restart(IRIS, OPERATOR)
                await end_at_the_edge(house)
                await house.until(lambda: len(house.starts_of("iris")) == 3)
                await answer_check(house)

            nursery.start_soon(restart)
            assert await trial.prove(SETTINGS) == "healthy"
        assert [body.partition(":")[0] for body in await house.mail(MANAGER)] == ["restarted"]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        ("there are no tools", "its program does not come up: there are no tools; "),
        (None, "its program said nothing of itself within 20 s (init_s); "),
    ],
)
async def test_whose_program_does_not_come_up_is_told_of_with_its_words(
    autojump_clock: MockClock, error: str | None, why: str
) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            if error is not None:
                nursery.start_soon(answer_check, house, error)
            assert why in await failure(trial)


async def test_a_harness_that_cannot_be_asked_proves_nothing(autojump_clock: MockClock) -> None:
    async with opened() as house:
        async with on_trial(house) as trial:
            proof = await trial.prove(SETTINGS)
        assert proof == "unproven: its harness is of an older release, and cannot be asked"


async def test_a_change_may_be_the_cure_of_one_that_is_quarantined(autojump_clock: MockClock) -> None:
    async with opened() as house:
        house.let_crash("iris")
        house.running("iris").end(1)
        await house.until(lambda: house.live("iris").state == "quarantined")
        begun = len(house.starts_of("iris"))
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "healthy"
        assert len(house.starts_of("iris")) == begun + 1


async def test_one_that_stays_quarantined_when_the_change_is_no_cure(autojump_clock: MockClock) -> None:
    async with opened() as house:
        house.let_crash("iris")
        house.running("iris").end(1)
        await house.until(lambda: house.live("iris").state == "quarantined")
        begun = len(house.starts_of("iris"))
        async with on_trial(house) as trial:
            await failure(trial)
            async with trial.back():
                pass
        await house.until(lambda: house.live("iris").state == "quarantined")
        await trio.sleep(1000)
        assert len(house.starts_of("iris")) == begun + 1


@pytest.mark.parametrize("when", ["before", "meanwhile"])
async def test_one_that_is_kept_down_proves_nothing(autojump_clock: MockClock, when: str) -> None:
    async with opened() as house:
        let_live(house, "hangs")
        if when == "before":
            await house.reconciler.kill(IRIS, OPERATOR)
        async with on_trial(house) as trial, trio.open_nursery() as nursery:
            if when == "meanwhile":
                nursery.start_soon(house.reconciler.kill, IRIS, OPERATOR)
            assert await trial.prove(SETTINGS) == "unproven: it is kept down"


async def test_one_that_might_not_run_here_before_either_proves_nothing(autojump_clock: MockClock) -> None:
    async with opened() as house, on_trial(house) as trial:
        house.unfit["iris"] = "no program is there"
        assert await trial.prove(SETTINGS) == "unproven: it may not run here: no program is there"


async def test_why_it_might_not_be_started_before_it_was_changed_says_nothing_of_the_change(
    autojump_clock: MockClock,
) -> None:
    async with opened() as house:
        let_live(house, "comes up")
        async with house.reconciler.trial(IRIS) as trial, trio.open_nursery() as nursery:
            nursery.start_soon(end_at_the_edge, house)
            house.unfit["iris"] = "its container is being built"
            async with trial.at_rest():
                await house.until(lambda: house.live("iris").detail == "its container is being built")
                del house.unfit["iris"]
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "healthy"


async def test_who_waits_for_others_to_start_is_given_all_its_time_after_that(autojump_clock: MockClock) -> None:
    async with opened(starts_at_once=1, start_s=100.0) as house:
        await house.add_agents("argus")
        house.driver.stuck.add("argus")
        await house.agents.want(AgentName("argus"), "up", OPERATOR)
        await house.until(lambda: house.live("argus").state == "starting" and house.live("argus").detail == "")
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "healthy"


async def test_a_trial_that_a_daemon_left_is_a_trial_to_the_next_until_it_is_over(autojump_clock: MockClock) -> None:
    async with open_house(**LIMITS) as house:
        await house.add_agents("hm1nd", "iris")
        house.open()
        let_live(house, "ends")
        house.reconciler.on_trial.add(IRIS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.reconciler.serve)
            await trio.sleep(500)
            assert (len(house.starts_of("iris")), await house.mail(MANAGER)) == (1, [])
            let_live(house, "comes up")
            house.reconciler.end_trial(IRIS)
            await house.until(lambda: house.live("iris").state == "idle")
            nursery.cancel_scope.cancel()


async def test_no_update_takes_an_agent_on_trial_for_its_own(autojump_clock: MockClock) -> None:
    async with opened() as house:
        let_live(house, "hangs")
        async with on_trial(house) as trial:
            await house.until(lambda: IRIS in house.reconciler.running())
            house.reconciler._supervised[IRIS].outdated = True
            assert not house.reconciler.updates.is_outdated(IRIS)
            with pytest.raises(Refusal, match="a change of it is tried just now"):
                await house.reconciler.updates.update(IRIS, OPERATOR)
            await failure(trial)
            async with trial.back():
                pass
        assert house.reconciler.updates.trouble == ""


@pytest.mark.parametrize(
    ("error", "reason", "proof"),
    [
        ("", None, "healthy"),
        ("slow down", "rate_limited", "unproven: its canary turn could not be taken: slow down"),
        ("too many", "overloaded", "unproven: its canary turn could not be taken: too many"),
        ("who are you", "authentication", "unproven: its canary turn could not be taken: who are you"),
        ("pay", "billing", "unproven: its canary turn could not be taken: pay"),
        ("no such model", "error", "its canary turn did not end well: no such model; its last words"),
        ("gone", "crashed", "its canary turn did not end well: gone; its last words"),
        ("silence", None, "its canary turn did not end well: silence; its last words"),
    ],
)
async def test_a_canary_turn_takes_back_for_no_fault_of_the_providers(
    autojump_clock: MockClock, error: str, reason: str | None, proof: str
) -> None:
    async with opened(canary_turn=True) as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            nursery.start_soon(answer_check, house, error, reason, True)
            if proof.startswith(("healthy", "unproven")):
                assert await trial.prove(SETTINGS) == proof
            else:
                assert proof in await failure(trial)
            assert not house.desks[IRIS].checks.calls_model


async def test_no_canary_turn_is_taken_where_no_turn_may_begin(autojump_clock: MockClock) -> None:
    async with opened(canary_turn=True) as house:
        let_live(house, "comes up")
        await house.agents.want(IRIS, "paused", OPERATOR)
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert (await trial.prove(SETTINGS)).startswith("unproven: no canary turn could be taken: ")


async def test_a_canary_turn_that_does_not_end_proves_nothing(autojump_clock: MockClock) -> None:
    async with opened(canary_turn=True, canary_s=40.0) as house:
        let_live(house, "comes up")
        async with trio.open_nursery() as nursery, on_trial(house) as trial:
            nursery.start_soon(answer_check, house)
            assert await trial.prove(SETTINGS) == "unproven: its canary turn did not end within 40 s (canary_s)"
