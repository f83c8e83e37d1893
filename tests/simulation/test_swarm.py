"""Fifty agents through days of crashes, silences, restarts, floods, limits, stops, spent budgets and lost wake-ups:
every promise holds throughout.

HIVE_TEST_SEED picks the luck; a failure tells its own. HIVE_LONG=1 makes a month and a year of it.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from tests.simulation.swarm import SEED_VARIABLE, Run, simulate, simulate_shipped
from tests.simulation.weather import CALM, DAY_S, Weather

LONG = os.environ.get("HIVE_LONG") == "1"
# A luck that never changes, and one of today.
FIXED_SEED = 1
# Another one each time, and the same in all processes of a run.
SOME_SEED = int(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex(4))[:7], 16)
SEEDS = [int(os.environ[SEED_VARIABLE])] if SEED_VARIABLE in os.environ else [FIXED_SEED, SOME_SEED]
RUNS = [(1, seed) for seed in SEEDS]
if LONG:
    RUNS += [*((30, seed) for seed in SEEDS), (365, SEEDS[-1])]
SPEED = 120.0  # seconds of the swarm in one of the shipped store
LEAST_A_DAY = 20


def assert_busy(run: Run, weather: Weather, seed: int) -> None:
    """What a run proves, it proves for a swarm that had much to do and much trouble.

    Asked of the luck that never changes: any other may have been mild, and that is no fault.
    """
    if seed != FIXED_SEED:
        return
    agent_days = weather.agents * weather.days
    assert run.counts["turns"] > LEAST_A_DAY * agent_days
    assert run.counts["crashes"] > 0.7 * agent_days
    assert min(run.counts[kind] for kind in ("late acks", "errands", "calls", "hangs")) > 0


@pytest.mark.parametrize(("days", "seed"), RUNS)
def test_days_of_trouble_break_no_promise(days: int, seed: int) -> None:
    weather = Weather(days=days)
    if days > 30:  # all that happened in a year is much to look through, and 16 million looks of the backstop many
        limits = weather.limits.model_copy(update={"kept_s": 8 * DAY_S, "history_kept_s": 16 * DAY_S})
        weather = replace(weather, audits_in_all=1 / 7, limits=limits, backstop_s=30.0, prompt_s=61.0)
    assert_busy(simulate(seed, weather), weather, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_where_no_wake_up_is_lost_nobody_has_to_look_again(seed: int) -> None:
    """The backstop never looks here: what waits for a second would wait for ever."""
    weather = Weather(days=0.5, **CALM)
    assert_busy(simulate(seed, weather), weather, seed)


@pytest.mark.parametrize("seed", SEEDS if LONG else SEEDS[:1])
def test_the_same_luck_breaks_no_promise_of_the_shipped_store(seed: int, tmp_path: Path) -> None:
    """With its thread, its files and its readers, for a minute of the wall in the long mode."""
    weather = Weather(
        days=(60 if LONG else 6) * SPEED / DAY_S,
        mail_a_day=200.0,
        crashes_a_day=24.0,
        silences_a_day=24.0,
        restarts_in_all=150.0,
        lost_wakes=0.0,
        prompt_s=float("inf"),  # nobody knows how long this machine stands still
        audits_in_all=48.0,
    )
    weather = replace(weather, limits=weather.limits.model_copy(update={"inbox_depth": 30}))
    run = simulate_shipped(seed, weather, tmp_path / "hive.sqlite", SPEED)
    assert run.counts["turns"] > weather.agents
