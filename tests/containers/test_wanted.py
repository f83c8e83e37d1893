"""What is wanted of agents is kept true under every driver: the reconciler as it is, and its real containers."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import trio

from hive_core.containers.mounts import agent_dirs
from hive_core.containers.running import Running
from hive_core.limits import Limits
from hive_core.procedures.desk import Desk
from hive_core.procedures.reconcile import Reconciler
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.agents import LIVE, Agent
from hive_core.sockets.harness import HarnessDesk
from hive_core.store.bus import EVENTS
from tests.containers.drivers import IRIS, SANDBOXES, dirs_in, driver_in, need
from tests.hives import Services, open_services, wait_until
from tests.processes import PATIENCE_S

REST_S = 0.2
# So slow is no machine that one of them ends a test.
PATIENT = {"start_s": 3600.0, "lease_silence_s": 3600.0}


@pytest.fixture(params=SANDBOXES)
def sandbox(request: pytest.FixtureRequest) -> str:
    """Each driver that puts an agent into a container."""
    return need(request.param)


@dataclass
class House:
    """A hive with agents whose harness is a script; its daemon can be ended and begun again."""

    folder: Path
    sandbox: str
    script: str
    services: Services
    limits: Limits
    desks: dict[str, HarnessDesk] = field(default_factory=dict)

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Reconciler]:
        """One life of it, whose end ends no agent."""
        hive = self.services

        async def serve(agent: Agent, task_status: trio.TaskStatus[Desk]) -> None:
            dirs_in(self.folder, name=agent.name)
            given = (hive.broker, hive.turns, hive.agents, hive.background)
            desk = self.desks[agent.name] = HarnessDesk(agent.name, agent.role, *given, lambda: "api_key")
            task_status.started(desk)
            await trio.sleep_forever()

        reconciler = Reconciler(
            hive.store,
            hive.agents,
            driver_in(self.folder, self.sandbox, self.script),
            partial(agent_dirs, self.folder, self.folder / "runtime"),
            lambda _: None,
            serve,
            hive.broker.put_back,
            self.limits,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reconciler.serve)
            yield reconciler
            nursery.cancel_scope.cancel()

    async def count(self, kind: str) -> int:
        found: int = await self.services.value("SELECT count(*) FROM events WHERE kind = ?", kind)
        return found

    async def times(self, kind: str) -> list[int]:
        """When each event of a kind was, in milliseconds."""
        rows = await self.services.store.rows("SELECT at_ms FROM events WHERE kind = ? ORDER BY seq", (kind,))
        return [row["at_ms"] for row in rows]

    async def until_counted(self, kind: str, least: int) -> None:
        async def is_so() -> bool:
            return await self.count(kind) >= least

        await wait_until(self.services.store, is_so, EVENTS)

    async def until_waiting(self, number: int) -> None:
        """Until so many agents wait for others to start."""

        async def is_so() -> bool:
            details = [self.services.agents.live(name).detail for name in self.desks]
            return sum(re.fullmatch(r"waits for \d+ others?", detail) is not None for detail in details) == number

        await wait_until(self.services.store, is_so, LIVE)

    async def until_state(self, name: str, state: str) -> str:
        """What is said of an agent as soon as it is in a state."""

        async def is_so() -> bool:
            return self.services.agents.live(name).state == state

        await wait_until(self.services.store, is_so, LIVE)
        return self.services.agents.live(name).detail


@asynccontextmanager
async def open_house(folder: Path, sandbox: str, script: str, *names: str, **limits: float) -> AsyncIterator[House]:
    """hm1nd, which is kept down, and these agents."""
    async with open_services(folder) as services:
        await services.add_agents(MANAGER, *names)
        await services.agents.want(MANAGER, "down", OPERATOR)
        yield House(folder, sandbox, script, services, Limits.model_validate({**PATIENT, **limits}))


async def test_an_agent_that_crashes_is_started_after_a_longer_rest_each_time_and_then_quarantined_with_its_last_words(
    tmp_path: Path, sandbox: str
) -> None:
    script, runs = "echo run >> /state/runs; echo no such luck; exit 3", dirs_in(tmp_path).state / "runs"
    async with open_house(tmp_path, sandbox, script, IRIS, restart_s=REST_S, crash_loop=3) as house:
        async with house.daemon():
            for crash in range(3):
                await house.until_counted("agent_ended", crash + 1)
            said = await house.until_state(IRIS, "quarantined")
        assert "it crashed 3 times in a row; the last time it ended with code 3" in said
        assert "no such luck" in said
        assert runs.read_text().count("run") == 3
        begun, ended = await house.times("agent_started"), await house.times("agent_ended")
        rests_ms = [start - end for end, start in zip(ended[:2], begun[1:], strict=True)]
        assert rests_ms[0] >= 1000 * REST_S
        assert rests_ms[1] >= 2000 * REST_S
        async with house.daemon() as reconciler:
            assert await house.until_state(IRIS, "quarantined") == said
            assert await house.count("agent_started") == 3
            await house.services.agents.want(IRIS, "up", OPERATOR)
            await house.until_counted("agent_ended", 4)
            await reconciler.drain(PATIENCE_S)  # it would be started once more
        assert runs.read_text().count("run") >= 4


async def test_many_agents_start_a_few_at_a_time_and_the_next_daemon_adopts_them_all(
    tmp_path: Path, sandbox: str
) -> None:
    """A hundred with HIVE_LONG=1."""
    names = [f"agent-{number:03}" for number in range(100 if os.environ.get("HIVE_LONG") == "1" else 8)]
    async with open_house(tmp_path, sandbox, "exec sleep 1000", *names, starts_at_once=4) as house:
        async with house.daemon() as reconciler:
            for said in range(len(names)):
                begun = min(said + 4, len(names))
                await house.until_counted("agent_started", begun)
                await house.until_waiting(len(names) - begun)
                assert len(running(reconciler)) == begun
                desks = (house.desks[name] for name in running(reconciler))
                next(desk for desk in desks if not desk.said_hello.is_set()).said_hello.set()
            first = running(reconciler)
            assert len({each.pid for each in first.values()}) == len(names)
        async with house.daemon() as reconciler:
            await house.until_counted("agent_adopted", len(names))
            adopted = running(reconciler)
            assert {name: each.pid for name, each in adopted.items()} == {name: first[name].pid for name in names}
            assert await house.count("agent_started") == len(names)
            assert set(await reconciler.drain(0)) == set(names)
        for each in first.values():  # of which this process is the parent still
            await each.wait()
        driver = driver_in(tmp_path, sandbox, "")
        found = [await driver.find(AgentName(name), dirs_in(tmp_path, name=name)) for name in names]
        assert found == [None] * len(names)


def running(reconciler: Reconciler) -> dict[str, Running]:
    """All agents that run."""
    return {name: one.running for name, one in reconciler._supervised.items() if one.running is not None}
