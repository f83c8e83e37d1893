"""The operator of a simulated swarm: gives work, pauses and stops agents, cancels turns, and makes rounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import trio

from hive_core.credentials import DEFAULT
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, OPERATOR, AgentName, MessageBody
from hive_core.services.broker import Broker
from hive_core.services.budgets import THE_HIVE, Change, Kind
from hive_core.services.schedules import parse_plan
from tests.simulation.harness import Agent
from tests.simulation.host import Daemon, Host
from tests.simulation.weather import HOUR_S, Chance
from tests.simulation.witness import NEVER

LONGEST_PAUSE_S = 2 * HOUR_S
LONGEST_STOP_S = HOUR_S
LONGEST_BUDGET_S = 2 * HOUR_S
MOST_MICRO_USD = 5_000_000
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"every_s": 1800.0},
    {"every_s": 5000.0},
    {"cron": "*/20 * * * *", "zone": "UTC"},
    {"cron": "30 2 * * *", "zone": "Europe/Berlin"},
    {"cron": "5 1 * * 0", "zone": "America/New_York"},
)
KINDS = {"work": 930, "poison": 30, "loop": 20, "flood": 20}


class Operator:
    def __init__(self, host: Host, agents: dict[AgentName, Agent], seed: int) -> None:
        self._host = host
        self._agents = agents
        self._seed = seed
        self._numbers = 0
        self._budgets: dict[tuple[AgentName, Kind], None] = {}  # that are set, or about to be

    async def serve(self) -> None:
        """Do everything from time to time, each by a task and a luck of its own, until cancelled."""
        weather = self._host.weather
        deeds: dict[str, tuple[float, Callable[[Chance], Awaitable[None]]]] = {
            "give": (weather.mail_a_day * weather.agents, self._give_work),
            "tell": (weather.broadcasts_in_all, self._tell_everyone),
            "flood": (weather.floods_in_all, self._flood),
            "cancel": (weather.cancels_in_all, self._cancel_a_turn),
            "pause": (weather.pauses_in_all, self._pause),
            "rounds": (weather.rounds_in_all, self.make_rounds),
            "compact": (weather.compacts_in_all, self._compact),
            "resume": (weather.resumes_in_all, self._resume),
            "budget": (weather.budgets_in_all, self._set_a_budget),
            "stop": (weather.stops_in_all, self._stop),
        }
        chance = Chance(self._seed, "operator", "schedules")
        for number, (words, name) in enumerate(zip(SCHEDULES, self._host.names, strict=False)):
            plan = parse_plan(name, f"work schedule-{number}", **words)
            await self._host.call(lambda d, plan=plan, key=f"schedule-{number}": d.schedules.add(plan, key), chance)
        async with trio.open_nursery() as nursery:
            for name, (per_day, deed) in deeds.items():
                nursery.start_soon(self._often, per_day, deed, Chance(self._seed, "operator", name))

    async def _often(self, per_day: float, deed: Callable[[Chance], Awaitable[None]], chance: Chance) -> None:
        while True:
            await trio.sleep(chance.rest_s(per_day))
            await deed(chance)

    def _any(self, chance: Chance) -> AgentName:
        return chance.choice(self._host.names)

    # -- deeds --------------------------------------------------------------------------------------------------------

    async def _give_work(self, chance: Chance) -> None:
        (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
        await self._send(self._any(chance), kind, chance)

    async def _tell_everyone(self, chance: Chance) -> None:
        await self._send(EVERYONE, "work", chance)

    async def _flood(self, chance: Chance) -> None:
        """More than an inbox holds, at once."""
        victim = self._any(chance)
        async with trio.open_nursery() as nursery:
            for _ in range(self._host.weather.limits.inbox_depth + 10):
                nursery.start_soon(self._send, victim, "work", chance)

    async def _cancel_a_turn(self, chance: Chance) -> None:
        name = self._any(chance)
        await self._try(lambda broker: broker.cancel_turn(name, OPERATOR), chance)

    async def _pause(self, chance: Chance) -> None:
        """Let an agent rest a while, with its harness or without."""
        name, down = self._any(chance), chance.happens(0.5)
        if self._host.witness.wanted_since_ms.get(name) == NEVER:
            return  # it rests already
        self._host.witness.wanted_since_ms[name] = NEVER
        await self.want(name, "down" if down else "paused", chance)
        if down:
            self._host.wanted_down.add(name)
            self._agents[name].wanted = trio.Event()
            if (daemon := self._host.daemon) is not None:
                daemon.desks[name].ask_to_stop()
        await trio.sleep(chance.random() * LONGEST_PAUSE_S)
        await self.wake(name, chance)

    async def wake(self, name: AgentName, chance: Chance) -> None:
        await self.want(name, "up", chance)
        self._host.wanted_down.discard(name)
        if (daemon := self._host.daemon) is not None:
            daemon.desks[name].stops = False
        self._agents[name].wanted.set()
        self._host.witness.wanted_since_ms[name] = self._host.now_ms()

    async def want(self, name: AgentName, wanted: str, chance: Chance) -> None:
        await self._host.call(lambda daemon: daemon.agents.want(name, wanted, OPERATOR), chance)

    async def make_rounds(self, chance: Chance) -> None:
        """Read the inbox, and decide what becomes of whatever is held or dead."""
        await self._try(lambda broker: broker.messages.inbox(), chance)
        for state, verbs in (("held", ("release", "drop")), ("dead", ("requeue", "drop", "drop"))):
            for row in await self._host.call(lambda d, state=state: d.broker.messages.aside(state), chance):
                verb = chance.choice(verbs)
                await self._try(partial(_do, verb, row["id"]), chance)

    async def _compact(self, chance: Chance) -> None:
        name = self._any(chance)
        await self._attempt(lambda daemon: daemon.steering.compact(name, OPERATOR), chance)

    async def _resume(self, chance: Chance) -> None:
        """Try the credential before its rest is over."""
        self._host.witness.books.resumes()
        await self._attempt(lambda daemon: daemon.breaker.resume(DEFAULT, OPERATOR), chance)

    async def _stop(self, chance: Chance) -> None:
        """The emergency stop, and after a while the end of it."""
        await self._host.call(lambda daemon: daemon.freeze.estop(OPERATOR), chance)
        self._host.witness.books.stopped()
        await trio.sleep(chance.random() * LONGEST_STOP_S)
        await self._thaw(chance)

    async def _thaw(self, chance: Chance) -> None:
        self._host.witness.books.lets_go()
        await self._host.call(lambda daemon: daemon.freeze.thaw(OPERATOR), chance)

    async def _set_a_budget(self, chance: Chance) -> None:
        """One that will soon be spent; after a while it is removed."""
        scope = THE_HIVE if chance.happens(0.5) else self._any(chance)
        kind: Kind = chance.choice(("day", "total"))
        if (scope, kind) in self._budgets:
            return
        self._budgets[scope, kind] = None
        most = MOST_MICRO_USD if scope == THE_HIVE else MOST_MICRO_USD // 10
        more = chance.randint(1, most)

        async def set_it(daemon: Daemon) -> int:
            amount = daemon.ledger.spent(scope, kind) + more
            await daemon.ledger.set_budget(Change(scope, {kind: amount}, 80), OPERATOR)
            return amount

        amount = await self._host.call(set_it, chance)
        self._host.witness.books.budget_set(scope, kind, amount)
        await trio.sleep(chance.random() * LONGEST_BUDGET_S)
        await self._remove_budget(scope, kind, chance)

    async def _remove_budget(self, scope: AgentName, kind: Kind, chance: Chance) -> None:
        self._host.witness.books.budget_goes(scope, kind)
        await self._attempt(lambda daemon: daemon.ledger.remove_budget(scope, [kind], OPERATOR), chance)
        self._budgets.pop((scope, kind), None)

    async def lift_everything(self, chance: Chance) -> None:
        """What the operator was about when the run came to its end."""
        await self._thaw(chance)
        for scope, kind in list(self._budgets):
            await self._remove_budget(scope, kind, chance)

    async def _try(self, deed: Callable[[Broker], Awaitable[Any]], chance: Chance) -> None:
        await self._attempt(lambda daemon: deed(daemon.broker), chance)

    async def _attempt(self, deed: Callable[[Daemon], Awaitable[Any]], chance: Chance) -> None:
        """A deed that may come too late, or for the second time because its first answer was lost."""
        try:
            await self._host.call(deed, chance)
        except Refusal:
            self._host.witness.counts["refusals"] += 1

    async def _send(self, to: AgentName, kind: str, chance: Chance) -> None:
        self._numbers += 1
        key = f"operator-{self._numbers}"
        body = f"{kind} {key}"

        async def send(daemon: Daemon) -> dict[str, Any]:
            return await daemon.broker.send(OPERATOR, to, MessageBody(body), None, key)

        try:
            answer = await self._host.call(send, chance)
        except Refusal:
            self._host.witness.refused(OPERATOR, body)
        else:
            self._host.witness.sent(OPERATOR, tuple(self._host.names) if to == EVERYONE else (to,), body, key, answer)


async def _do(verb: str, message: int, broker: Broker) -> None:
    await getattr(broker.messages, verb)(message, OPERATOR)
