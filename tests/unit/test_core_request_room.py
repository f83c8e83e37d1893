"""However much an agent asks for, the operator's page can be read: what waits is bounded, and so is taking it back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from tests.hives import Services, open_services


@asynccontextmanager
async def opened(folder: Path, limits: Limits) -> AsyncIterator[Services]:
    async with open_services(folder, limits=limits) as hive:
        await hive.add_agents(MANAGER)
        yield hive


async def ask(hive: Services, name: str, persona: str = "You watch.", asker: AgentName = MANAGER) -> int:
    asked = await hive.gate.spawn.request(asker, AgentName(name), persona, "eyes")
    number: int = asked["approval"]
    return number


async def test_over_its_limit_an_agent_asks_for_nothing_more_until_something_is_decided(tmp_path: Path) -> None:
    async with opened(tmp_path, Limits(request_depth=2)) as hive:
        first, _ = [await ask(hive, name) for name in ("argus", "hera")]
        with pytest.raises(Refusal, match=r"2 requests of hm1nd wait already and the limit is 2 \(request_depth\)"):
            await ask(hive, "iris")
        assert await ask(hive, "argus") == first, "the same again is the same card"
        await ask(hive, "damocles", asker=OPERATOR)
        await hive.gate.deny(first, "no", OPERATOR)
        await ask(hive, "iris")
        assert len(await hive.approvals.pending()) == 3


async def test_who_asks_and_takes_back_in_a_loop_meets_the_limit_within_the_hour(tmp_path: Path) -> None:
    async with opened(tmp_path, Limits(request_depth=2)) as hive:
        for _ in range(2):
            number = await ask(hive, "argus")
            for _ in range(2):
                await hive.gate.cancel(number, "not needed", MANAGER)
        with pytest.raises(Refusal, match="2 that it took back within the last hour count too"):
            await ask(hive, "argus")
        await hive.let_time_pass(3700.0)
        await ask(hive, "argus")


async def test_what_waits_of_an_agent_has_no_more_than_its_bytes(tmp_path: Path) -> None:
    async with opened(tmp_path, Limits(request_quota_bytes=20_000)) as hive:
        await ask(hive, "argus", "ä" * 5_000)
        with pytest.raises(Refusal, match=r"1 request of hm1nd waits already; with this one .*\(request_quota_bytes\)"):
            await ask(hive, "hera", "ä" * 5_000)
        await ask(hive, "hera")


async def test_an_agent_is_told_that_the_operator_has_asked_for_the_same(tmp_path: Path) -> None:
    async with opened(tmp_path, Limits()) as hive:
        number = await ask(hive, "argus", asker=OPERATOR)
        with pytest.raises(Refusal, match=f"approval {number}, which operator asked for, is the same"):
            await ask(hive, "argus")
        mine = await ask(hive, "hera")
        assert await ask(hive, "hera", asker=OPERATOR) == mine
