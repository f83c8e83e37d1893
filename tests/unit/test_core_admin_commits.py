"""Commits that the operator proposes and compares: `hive` itself, against the real door and real git."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hive_core.protocol.words import AgentName
from hive_core.sockets.admin import AdminDesk
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.hives import Services, open_gate, run_hive, serve

IRIS = AgentName("iris")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """iris with her repositories, and the gate served."""
    (tmp_path / "state").mkdir()
    async with open_gate(tmp_path / "state") as services:
        yield services


async def test_a_branch_is_applied_by_its_name_and_compared(hive: Services, tmp_path: Path) -> None:
    iris = Checkout(hive.repos.proposed_dir / "iris" / "config")
    iris.git("checkout", "-q", "-b", "slow")
    first = iris.commit(CLAUDE__md="You read slowly.\n")
    second = iris.commit(CLAUDE__md="You read very slowly.\nאב → גד\n")

    async def run(*words: str) -> tuple[int, str]:
        done = await run_hive(tmp_path, *words)
        return done.returncode, (done.stdout + done.stderr).decode()

    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        code, said = await run("apply", "iris", first[:9])
        assert (code, said.splitlines()[0]) == (0, f"{first[:9]} is {first}; approval 2 waits for you")
        code, said = await run("apply", "iris", "slow", "--json")
        assert (code, json.loads(said)) == (0, {"approval": 3, "sha": second})
        assert await run("apply", "iris", "slow") == (
            4,
            f"hive: cannot ask for {second[:12]}: approval 3 asks for it already and waits\n",
        )
        assert (await run("apply", "iris", "nothing"))[0] == 3
        code, said = await run("diff", "3")
        assert (code, "+You read very slowly." in said, "-You read slowly." in said) == (0, True, False)
        assert "+\u2068אב\u2069 → \u2068גד\u2069\n" in said, "what is written from right to left moves nothing"
        code, said = await run("diff", "3", "--against", "previous")
        assert (code, "+You read very slowly." in said, "-You read slowly." in said) == (0, True, True)
        assert await run("diff", "1") == (
            2,
            "hive: cannot compare approval 1: it is of no commit (`hive show` shows it)\n",
        )
        assert (await run("diff", "3", "--against", "tomorrow"))[0] == 2
