"""When a turn is stuck, and how it says so: in virtual time, with a cpu that the test turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hive_agent.claude_stream import Report
from hive_agent.watch import PROMPT_S, SAME_CALLS, STARTING_S, WORKING_TIMES, Stuck, Watch, cpu_of_descendants_s
from hive_core.protocol.harness import STUCK
from tests.processes import look_until

SILENCE_S = 1800.0
INIT: dict[str, Any] = {"type": "system", "subtype": "init", "session_id": "s"}


def a_call(number: int = 0, **given: Any) -> dict[str, Any]:
    block = {"type": "tool_use", "id": f"t{number}", "name": "Bash", "input": given}
    return {"type": "assistant", "message": {"content": [block]}}


def a_result(number: int = 0, answer: str = "nothing") -> dict[str, Any]:
    block = {"type": "tool_result", "tool_use_id": f"t{number}", "content": answer}
    return {"type": "user", "message": {"content": [block]}}


class Played:
    """A turn whose lines come `every_s`; its processes use `share` of a core."""

    def __init__(self, *events: dict[str, Any], every_s: float = 1.0, share: float = 0.0) -> None:
        self.report = Report()
        self._share = share
        self.watch = Watch(self.report, SILENCE_S, self._cpu_s)
        self._events, self._every_s = events, every_s

    def _cpu_s(self) -> float:
        return self._share * trio.current_time()

    async def stuck(self) -> tuple[Stuck, float]:
        """How it is stuck, and when that was said."""
        begun = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._play)
            why = await self.watch.stuck()
            nursery.cancel_scope.cancel()
        return why, trio.current_time() - begun

    async def _play(self) -> None:
        for event in self._events:
            await trio.sleep(self._every_s)
            self.report.read_stdout(json.dumps(event).encode())
            self.watch.heard()


def asks(name: str) -> dict[str, Any]:
    return {"type": "assistant", "message": {"content": [{"type": "tool_use", "id": "t0", "name": name, "input": {}}]}}


@pytest.mark.parametrize(
    ("play", "kind", "why", "at_s"),
    [
        (
            lambda: Played(),
            "never_started",
            f"it did not begin for {STARTING_S} s, and its processes did nothing",
            STARTING_S,
        ),
        (
            lambda: Played(share=0.5),
            "never_started",
            f"it did not begin for {WORKING_TIMES * STARTING_S} s, while its processes used the cpu",
            WORKING_TIMES * STARTING_S,
        ),
        (
            lambda: Played(INIT),
            "silent",
            "it printed nothing for 1800 s, and its processes did nothing, outside any tool",
            SILENCE_S + 1,
        ),
        (
            lambda: Played(INIT, a_call()),
            "silent",
            "it printed nothing for 1800 s, and its processes did nothing, in the tool Bash",
            SILENCE_S + 2,
        ),
        (
            lambda: Played(INIT, a_call(), a_result()),
            "silent",
            "it printed nothing for 1800 s, and its processes did nothing, outside any tool",
            SILENCE_S + 3,
        ),
        (
            lambda: Played(INIT, a_call(), share=0.5),
            "silent_busy",
            "it printed nothing for 7200 s, while its processes used the cpu, in the tool Bash",
            WORKING_TIMES * SILENCE_S + 2,
        ),
        (
            lambda: Played(INIT, *[e for n in range(99) for e in (a_call(n, command="ls"), a_result(n))]),
            "loop",
            f"it called the same tool {SAME_CALLS} times in a row, with the same arguments and the same answer",
            2 * SAME_CALLS,
        ),
        (
            lambda: Played(INIT, asks("AskUserQuestion")),
            "unanswered_prompt",
            "it waits for a person, who is not there, in the tool AskUserQuestion",
            2 + PROMPT_S,
        ),
    ],
    ids=["never", "never, busy", "silent", "in a tool", "after a tool", "silent with cpu", "in a loop", "asks"],
)
async def test_each_way_of_being_stuck_has_its_name_its_time_and_its_words(
    autojump_clock: MockClock, play: Callable[[], Played], kind: str, why: str, at_s: float
) -> None:
    stuck, after_s = await play().stuck()
    assert stuck == Stuck(kind, why)
    assert kind in STUCK
    assert after_s == pytest.approx(at_s)


async def test_a_call_for_a_person_that_is_answered_after_all_is_not_stuck(autojump_clock: MockClock) -> None:
    stuck, after_s = await Played(INIT, asks("AskUserQuestion"), a_result()).stuck()
    assert (stuck.kind, after_s) == ("silent", SILENCE_S + 3)


async def test_who_prints_a_line_now_and_then_is_not_stuck(autojump_clock: MockClock) -> None:
    played = Played(*[a_call(n, command=n) for n in range(40)], every_s=STARTING_S - 1)
    _, after_s = await played.stuck()
    assert after_s == pytest.approx(40 * (STARTING_S - 1) + SILENCE_S)


async def test_one_that_stops_working_is_ended_before_one_that_works(autojump_clock: MockClock) -> None:
    played = Played(INIT, share=0.5)
    async with trio.open_nursery() as nursery:

        async def stop_working() -> None:
            await trio.sleep(2 * SILENCE_S)
            used_s = played._cpu_s()
            played.watch._cpu_s = lambda: used_s

        nursery.start_soon(stop_working)
        stuck, after_s = await played.stuck()
    assert stuck.sentence == "it printed nothing for 4500 s, and its processes did nothing, outside any tool"
    assert 2 * SILENCE_S < after_s < 3 * SILENCE_S + 2


async def test_a_call_that_is_answered_otherwise_is_no_loop(autojump_clock: MockClock) -> None:
    """Whoever waits for mail or a build asks again and again."""
    rounds = [event for n in range(100) for event in (a_call(n, wait_s=180), a_result(n, f"{n} %"))]
    stuck, _ = await Played(*rounds).stuck()
    assert stuck.sentence.startswith("it printed nothing")


async def test_a_call_with_other_arguments_begins_to_count_anew(autojump_clock: MockClock) -> None:
    calls = [a_call(n, command="ls" if n % 20 else "pwd") for n in range(200)]
    stuck, _ = await Played(*calls).stuck()
    assert stuck.sentence.startswith("it printed nothing")


def test_the_cpu_of_the_processes_that_come_from_this_one_is_counted() -> None:
    before_s = cpu_of_descendants_s()
    shell = subprocess.Popen(["/bin/sh", "-c", "(while :; do :; done) & wait"], start_new_session=True)
    try:
        look_until(lambda: cpu_of_descendants_s() > before_s + 0.05)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
