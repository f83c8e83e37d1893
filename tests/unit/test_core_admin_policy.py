"""`hive policy`, and what `hive` tells of changes that passed by a rule: against the real door and real git."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.sockets.admin import AdminDesk
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, Services, approve_by_hash, open_services, run_hive, serve
from tests.unit.test_core_policy import OWN_PROMPT, rule

IRIS = AgentName("iris")
RULE = rule(name="own prompt", agents=["iris", "argus"], only=["prompt"], at_most={"prompt_lines": 200}, per_day=1)


@asynccontextmanager
async def hive_served(hive: Services) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.serve)
        with trio.fail_after(PATIENCE_S):
            yield
        nursery.cancel_scope.cancel()


async def test_rules_are_listed_and_rehearsed_and_what_passed_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()

    async def run(*words: str) -> tuple[int, str]:
        done = await run_hive(tmp_path, *words)
        return done.returncode, (done.stdout + done.stderr).decode()

    async def add_iris() -> Checkout:
        number = (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"]
        assert (await approve_by_hash(tmp_path, number)).returncode == 0
        return Checkout(hive.repos.proposed_dir / "iris" / "config")

    async with (
        open_services(tmp_path / "state", policy=[RULE]) as hive,
        serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve),
        hive_served(hive),
    ):
        iris = await add_iris()
        code, said = await run("apply", "iris", iris.commit(CLAUDE__md="Read aloud.\n"))
        assert (code, said.splitlines()[1]) == (0, "`hive show 2` shows it")
        assert said.splitlines()[0].endswith("; approval 2 passes by rule own prompt, without a click")
        assert (await hive.approvals.wait_settled(2)).state == "done"
        code, said = await run("show", "2")
        assert "approved, and done by rule own prompt at " in said
        code, said = await run("apply", "iris", iris.commit(CLAUDE__md="Shout.\n"))
        assert "approval 3 waits for you" in said
        assert (await run("deny", "3", "too loud"))[0] == 0

        code, said = await run("policy")
        assert (code, said.splitlines()) == (
            0,
            [
                "own prompt: apply_commit of iris, argus, asked for by everybody",
                "  only prompt, prompt_lines up to 200",
                "  1 of 1 passed in the last 24 hours",
                "  ! agents names argus, which no agent is called",
            ],
        )
        code, said = await run("policy", "--json")
        assert json.loads(said)["rules"][0]["passed"] == 1

        code, said = await run("policy", "rehearse")
        assert (code, said.splitlines()[:4]) == (
            0,
            [
                "1 of 2 recorded requests would have passed without a click",
                "1 would have waited because of per_day",
                "own prompt: 1 would have passed",
                "  ! agents names argus, which no agent is called",
            ],
        )
        file = tmp_path / "rules.toml"
        file.write_text(OWN_PROMPT.replace('["hm1nd"]', '["operator"]'))
        code, said = await run("policy", "rehearse", "--rule", str(file), "--days", "1")
        lines = said.splitlines()
        assert lines[:4] == [
            "2 of 2 recorded requests would have passed without a click",
            "▲ of those you denied 1",
            "own prompt: 2 would have passed",
            "▲ denied  ◆ 3 change iris: asked for by the operator",
        ]
        assert "  note: too loud" in lines
        assert any(line.endswith("by rule own prompt; it passed by own prompt") for line in lines)
        code, said = await run("policy", "rehearse", "--rule", str(file), "--json")
        assert [one["id"] for one in json.loads(said)["approvals"]] == [3, 2]

        file.write_text(OWN_PROMPT)
        code, said = await run("policy", "rehearse", "--rule", str(file))
        assert said.splitlines() == [
            "0 of 2 recorded requests would have passed without a click",
            "own prompt: 0 would have passed",
            "  2 wait: asked for by others than requested_by names",
        ]
        file.write_text('sandbox = "bwrap"\n' + OWN_PROMPT)
        code, said = await run("policy", "rehearse", "--rule", str(file))
        why = "it has 'sandbox' too; give tables [[policy]], and nothing else"
        assert (code, said) == (2, f"hive: cannot use the file of --rule: {why}\n")
        file.write_text(OWN_PROMPT.replace("per_day", "per_dya"))
        code, said = await run("policy", "rehearse", "--rule", str(file))
        assert (code, "rule 1: per_dya: unknown key; change line 9 of the file of --rule" in said) == (2, True)
        for words in (
            ["--name", "nothing"],
            ["--days", "0"],
            ["--rule", str(tmp_path / "none")],
            ["--rule", "/dev/zero"],
        ):
            code, said = await run("policy", "rehearse", *words)
            assert (code in (2, 3), said.count("\n")) == (True, 1), said
        assert (await run("policy", "--days", "3"))[0] == 2


async def test_a_hive_without_rules_says_that_everything_waits(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    async with (
        open_services(tmp_path / "state") as hive,
        serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve),
    ):
        for words in (["policy"], ["policy", "rehearse"]):
            done = await run_hive(tmp_path, *words)
            assert done.stdout == b"no rules: everything waits for you\n"
