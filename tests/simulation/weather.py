"""What a simulated swarm goes through: how many agents, how often what happens, and how well wake-ups travel."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hive_core.limits import Limits
from hive_core.store.door import BACKSTOP_S

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@dataclass(frozen=True)
class Weather:
    """Rates are per day: `_a_day` of each agent, `_in_all` of the whole hive."""

    agents: int = 50
    days: float = 3.0
    mail_a_day: float = 9.0  # of the operator to an agent; what that sets off comes on top
    crashes_a_day: float = 1.0
    silences_a_day: float = 1.0
    restarts_in_all: float = 4.0
    cancels_in_all: float = 5.0
    pauses_in_all: float = 6.0
    broadcasts_in_all: float = 1.0
    floods_in_all: float = 2.0
    rounds_in_all: float = 12.0  # of the operator through what is held or dead
    hangs_a_day: float = 0.3  # in the middle of a turn, until somebody ends the container
    compacts_in_all: float = 10.0
    limits_in_all: float = 3.0  # of the provider's, and so on
    overloads_in_all: float = 4.0
    refusals_in_all: float = 1.0
    resumes_in_all: float = 3.0  # by the operator, of a credential that is stopped
    budgets_in_all: float = 3.0  # that will soon be spent
    stops_in_all: float = 1.0
    median_work_s: float = 25.0
    lost_wakes: float = 0.05  # the share of wake-ups that get lost
    slow_commits: float = 0.1
    lost_answers: float = 0.02  # the share of tool calls whose answer the agent does not hear
    backstop_s: float | None = BACKSTOP_S  # None: nobody looks again, so every wake-up has to be right
    prompt_s: float = 2 * BACKSTOP_S + 1.0  # within which a due message reaches an agent that is free
    audits_in_all: float = 4.0  # looks at the whole database; more often than messages are forgotten
    limits: Limits = field(
        default_factory=lambda: Limits(
            inbox_depth=60, pair_rate_per_hour=20, kept_s=DAY_S / 3, history_kept_s=DAY_S * 0.6
        )
    )


CALM = {"lost_wakes": 0.0, "backstop_s": None, "prompt_s": 1.0}


class Chance(random.Random):
    """The luck of one actor: its own seed, so that what others do does not change it."""

    def __init__(self, *seed: object) -> None:
        super().__init__("/".join(map(str, seed)))

    def happens(self, share: float) -> bool:
        return self.random() < share

    def rest_s(self, per_day: float) -> float:
        """Until the next of `per_day` things that come by chance."""
        return self.expovariate(per_day) * DAY_S if per_day > 0 else float("inf")

    def work_s(self, median_s: float) -> float:
        return min(median_s * self.lognormvariate(0, 1), 20 * median_s)
