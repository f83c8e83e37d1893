"""Whether a turn is stuck, by what its program shows: silence, its processes' cpu, the same call over and over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import trio

from hive_agent.claude_errors import shortened
from hive_agent.claude_stream import Report
from hive_agent.descendants import descendants

SAME_CALLS = 25  # in a row, with the same arguments and answers: nobody learns anything by the next one
WORKING_TIMES = 4  # as long as another may be silent whose processes use the cpu
STARTING_S = 300  # a program that prints nothing for so long never starts: it waits a minute for its tools at most
PROMPT_S = 10  # that it may wait for a person; what can be denied is denied at once, and it goes on
BUSY_SHARE = 0.02  # of a core: below it nothing works
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Stuck(NamedTuple):
    """kind: one of protocol.harness.STUCK."""

    kind: str
    sentence: str


class Watch:
    """`heard` after each line of the turn; `stuck` returns when there is a reason to end it.

    silence_s   a turn that prints nothing for so long is stuck, and after four times as long also one that works
    """

    def __init__(self, report: Report, silence_s: float, cpu_s: Callable[[], float]) -> None:
        self._report = report
        self._given_silence_s = silence_s
        self._cpu_s = cpu_s
        self._heard_at = trio.current_time()
        self._lines = 0
        self._seen = trio.Event()  # what needs no silence to be seen

    def heard(self) -> None:
        self._heard_at = trio.current_time()
        self._lines += 1
        if self._report.repeats >= SAME_CALLS or self._report.asks:
            self._seen.set()

    async def stuck(self) -> Stuck:
        """Why the turn has to end."""
        lines, halves, used_s = -1, 0, 0.0
        while True:
            half_s = self._silence_s / 2
            if lines != self._lines:
                lines, halves, used_s = self._lines, 0, self._cpu_s()
            with trio.move_on_at(self._heard_at + (halves + 1) * half_s):
                await self._seen.wait()
            if self._seen.is_set():
                if (stuck := await self._look()) is not None:
                    return stuck
                continue
            if lines != self._lines:
                continue
            halves, before_s, used_s = halves + 1, used_s, self._cpu_s()
            works = used_s - before_s > BUSY_SHARE * half_s
            if halves >= 2 and (not works or halves >= 2 * WORKING_TIMES):
                return self._describe(works, halves * half_s)

    @property
    def _silence_s(self) -> float:
        return self._given_silence_s if self._lines else min(self._given_silence_s, STARTING_S)

    async def _look(self) -> Stuck | None:
        """What is seen without a silence: None when a call for a person was answered after all."""
        if self._report.repeats < SAME_CALLS:
            await trio.sleep_until(self._heard_at + PROMPT_S)
            if not self._report.asks:
                self._seen = trio.Event()
                return None
        if self._report.repeats >= SAME_CALLS:
            same = "with the same arguments and the same answer"
            return Stuck("loop", f"it called the same tool {SAME_CALLS} times in a row, {same}")
        asked = self._tools()
        return Stuck("unanswered_prompt", f"it waits for a person, who is not there, in the tool {asked}")

    def _describe(self, works: bool, silent_s: float) -> Stuck:
        does = "while its processes used the cpu" if works else "and its processes did nothing"
        silent = f"for {silent_s:.0f} s, {does}"
        if self._lines == 0:
            return Stuck("never_started", f"it did not begin {silent}")
        tools = self._tools()
        where = f"in the tool {tools}" if tools else "outside any tool"
        return Stuck("silent_busy" if works else "silent", f"it printed nothing {silent}, {where}")

    def _tools(self) -> str:
        return shortened(", ".join(self._report.tools.values()))


def cpu_of_descendants_s() -> float:
    """The cpu time that the processes below this one have used, in seconds."""
    ticks = 0
    for pid in descendants():
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue  # it ended just now
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS_A_SECOND
