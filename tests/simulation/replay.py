"""Trio in virtual time, so that a seed says everything about a run.

Trio shuffles its tasks on purpose. What stops it is private, therefore `test_replay.py` looks each time whether it
still does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import trio
import trio.testing
from trio._core import _run

T = TypeVar("T")


@contextmanager
def seeded_scheduling(seed: int) -> Iterator[None]:
    """Within the block tasks that can run do so in an order that hangs on nothing but the seed."""
    private: Any = _run
    before, state = private._ALLOW_DETERMINISTIC_SCHEDULING, private._r.getstate()
    private._ALLOW_DETERMINISTIC_SCHEDULING = True
    private._r.seed(seed)
    try:
        yield
    finally:
        private._ALLOW_DETERMINISTIC_SCHEDULING = before
        private._r.setstate(state)


def run_in_virtual_time(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """What `main` returns. Time jumps to whatever is slept for next."""
    with seeded_scheduling(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
