"""When a harness counts as hung: in virtual time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from hive_core.sockets.silence import Silence

LIMIT_S = 60.0


async def hung_after(silence: Silence, *happens: tuple[float, Callable[[], None]]) -> tuple[str, float]:
    """Why it counts as hung, and after how many seconds, when each thing happens at its second."""
    began = trio.current_time()

    async def play() -> None:
        for at_s, what in happens:
            await trio.sleep_until(began + at_s)
            what()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        why = await silence.lasts()
        nursery.cancel_scope.cancel()
    return why, trio.current_time() - began


async def test_one_that_never_says_hello_is_hung_after_five_times_the_limit(autojump_clock: MockClock) -> None:
    assert await hung_after(Silence(LIMIT_S)) == ("its harness was not connected for 300 s", 300)


async def test_one_that_lost_its_turn_gets_some_seconds_more_for_a_word(autojump_clock: MockClock) -> None:
    silence = Silence(LIMIT_S)
    why = "its harness said nothing for 60 s and lost its turn"
    assert await hung_after(silence, (0, silence.ended), (100, silence.lost_turn)) == (why, 110)


async def test_a_word_in_time_is_all_it_takes(autojump_clock: MockClock) -> None:
    silence = Silence(LIMIT_S)
    happens = [(299, silence.ended), (1000, silence.lost_turn), (1009, silence.ended), (2000, silence.not_connected)]
    assert await hung_after(silence, *happens) == ("its harness was not connected for 300 s", 2300)


@pytest.mark.parametrize("heard", [True, False])
async def test_a_container_that_just_began_has_all_its_time(autojump_clock: MockClock, heard: bool) -> None:
    silence = Silence(LIMIT_S)
    if heard:
        silence.ended()
        silence.not_connected()
    await trio.sleep(1000)  # while no container runs nobody asks
    assert (await hung_after(silence))[1] == 300


async def test_one_that_is_heard_is_never_hung(autojump_clock: MockClock) -> None:
    silence = Silence(LIMIT_S)
    silence.ended()
    with trio.move_on_after(10**6) as scope:
        await silence.lasts()
    assert scope.cancelled_caught
