"""Whether a turn is stuck, by what its program shows: silence, its processes' cpu, the same call over and over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import trio

from hive_agent.claude_stream import Report
from hive_agent.descendants import descendants

SAME_CALLS = 25  # in a row, with the same arguments and answers: nobody learns anything by the next one
WORKING_TIMES = 4  # as long as another may be silent whose processes use the cpu
BUSY_SHARE = 0.02  # of a core: below it nothing works
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


class Watch:
    """`heard` after each line of the turn; `stuck` returns when there is a reason to end it.

    silence_s   a turn that prints nothing for so long is stuck, and after four times as long also one that works
    """

    def __init__(self, report: Report, silence_s: float, cpu_s: Callable[[], float]) -> None:
        self._report = report
        self._silence_s = silence_s
        self._cpu_s = cpu_s
        self._heard_at = trio.current_time()
        self._lines = 0
        self._loops = trio.Event()

    def heard(self) -> None:
        self._heard_at = trio.current_time()
        self._lines += 1
        if self._report.repeats >= SAME_CALLS:
            self._loops.set()

    async def stuck(self) -> str:
        """Why the turn has to end, in a sentence."""
        half_s = self._silence_s / 2
        lines, halves, used_s = -1, 0, 0.0
        while True:
            if lines != self._lines:
                lines, halves, used_s = self._lines, 0, self._cpu_s()
            with trio.move_on_at(self._heard_at + (halves + 1) * half_s):
                await self._loops.wait()
                return (
                    f"it called the same tool {SAME_CALLS} times in a row, with the same arguments and the same answer"
                )
            if lines != self._lines:
                continue
            halves, before_s, used_s = halves + 1, used_s, self._cpu_s()
            works = used_s - before_s > BUSY_SHARE * half_s
            if halves >= 2 and (not works or halves >= 2 * WORKING_TIMES):
                return self._describe(works, halves * half_s)

    def _describe(self, works: bool, silent_s: float) -> str:
        silent = (
            f"for {silent_s:.0f} s, {'while its processes used the cpu' if works else 'and its processes did nothing'}"
        )
        if self._lines == 0:
            return f"it did not begin {silent}"
        if self._report.tools:
            return f"it printed nothing {silent}, in the tool {', '.join(self._report.tools.values())}"
        return f"it printed nothing {silent}, outside any tool"


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
