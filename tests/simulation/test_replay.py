"""A seed says everything about a run: held here because trio's part in it is private and may change."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import trio

from tests.simulation.replay import run_in_virtual_time
from tests.simulation.swarm import simulate
from tests.simulation.weather import DAY_S, Weather

SHORT = Weather(agents=6, days=0.1, mail_a_day=80.0, crashes_a_day=10.0, silences_a_day=20.0, restarts_in_all=30.0)
IN_A_PROCESS_OF_ITS_OWN = """
from tests.simulation.swarm import simulate
from tests.simulation.test_replay import SHORT
print(simulate(7, SHORT).digest)
"""


def order_of_tasks(seed: int) -> list[int]:
    """In which order tasks run that could all run at once."""
    order: list[int] = []

    async def run(number: int) -> None:
        await trio.sleep(1)
        order.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(run, number)

    run_in_virtual_time(seed, main)
    return order


def test_the_order_of_tasks_hangs_on_the_seed_alone() -> None:
    assert all(order_of_tasks(1) == order_of_tasks(1) for _ in range(20))
    assert len({tuple(order_of_tasks(seed)) for seed in range(20)}) > 1


def test_a_day_takes_no_time() -> None:
    async def main() -> float:
        await trio.sleep(DAY_S)
        return trio.current_time()

    assert run_in_virtual_time(1, main) == DAY_S


def test_a_run_can_be_seen_again_by_its_seed() -> None:
    first = simulate(7, SHORT)
    assert simulate(7, SHORT) == first
    assert simulate(8, SHORT).digest != first.digest
    assert simulate(7, replace(SHORT, crashes_a_day=9.0)).digest != first.digest


def test_it_can_be_seen_again_in_another_process() -> None:
    """Where strings hash otherwise and sets have another order."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1
