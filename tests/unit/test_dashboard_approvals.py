"""The page of one approval: what waits, what was decided, and a commit against another base."""

from __future__ import annotations

from pathlib import Path

import pytest

from hive_core.cli import show_approvals
from hive_core.effects import Effect, Line
from hive_core.protocol.words import MANAGER, AgentName
from hive_core.services.approvals import Request, Shown, put_request, settle
from tests.dashboards import browse, hive_of
from tests.hives import Services, open_gate

DIFF = "diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n-old\n+new\n"


NOW, THEN = (f"/nix/store/{sign * 32}-nixos-system-iris.drv" for sign in "01")


async def put(hive: Services, kind: str = "apply_commit", **built: str) -> int:
    payload = {"sha": "a" * 40, "base": "b" * 40, "diff": DIFF}
    shown = Shown(payload, Effect([Line("model", "sonnet", "opus")], **built).to_wire())
    request = Request(kind, AgentName("iris"), MANAGER, "it reads more", shown)
    return await hive.store.write(lambda tx: put_request(tx, request, 60.0))


async def page(hive: Services, path: str) -> str:
    async with browse(hive_of(hive)) as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    return answer.text


async def test_what_waits_can_be_decided_on_its_own_page(hive: Services) -> None:
    number = await put(hive)
    text = await page(hive, f"/approvals/{number}")
    for part in ("it reads more", "model: sonnet → opus", "+new", "APPR0VE", "D3NY", f"choose-{number}"):
        assert part in text


@pytest.mark.parametrize(
    ("built", "line"),
    [
        ({"derivation": THEN, "former": NOW}, "builds: 111111111111…-nixos-system-iris"),
        ({"derivation": NOW, "former": NOW}, "builds: 000000000000…-nixos-system-iris, the same as now"),
        ({"derivation": THEN}, "builds: 111111111111…-nixos-system-iris"),  # of a new agent
        ({}, None),
    ],
)
async def test_a_card_and_a_terminal_say_what_is_built(hive: Services, built: dict[str, str], line: str | None) -> None:
    number = await put(hive, **built)
    printed = show_approvals.approval((await hive.approvals.get(number)).to_wire()).splitlines()
    assert [each.strip() for each in printed if "builds" in each] == ([line] if line else [])
    shown = await page(hive, f"/approvals/{number}")
    assert (f">{line}</p>" in shown) if line else ("builds:" not in shown)


@pytest.mark.parametrize(
    ("state", "words"),
    [("denied", "denied"), ("expired", "expired"), ("cancelled", "taken back"), ("failed", "failed")],
)
async def test_what_was_decided_stays_to_be_read_and_cannot_be_decided_again(
    hive: Services, state: str, words: str
) -> None:
    number = await put(hive)
    card = await hive.approvals.get(number)
    await hive.store.write(lambda tx: settle(tx, card, state, "not now", "operator", "the dashboard, 127.0.0.1"))
    text = await page(hive, f"/approvals/{number}")
    for part in (words, "not now", "it reads more", "model: sonnet → opus", "+new"):
        assert part in text
    assert ("by operator, the dashboard, 127.0.0.1" in text) == (state != "expired")
    assert "APPR0VE" not in text


async def test_a_base_that_there_is_not_is_said_to_be_missing(tmp_path: Path) -> None:
    async with open_gate(tmp_path) as hive:  # whose iris has repositories
        number = await put(hive)
        assert "no commit was proposed for iris before it" in await page(hive, f"/approvals/{number}?against=previous")
        assert "no commit was" not in await page(hive, f"/approvals/{number}?against=everything")


async def test_an_approval_that_is_not_there_has_no_page(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        for number in ("99", "x", "-1", "9" * 40, "1\u0661"):
            assert (await client.get(f"/approvals/{number}")).status_code == 404


async def test_the_card_of_a_configuration_alone_promises_no_agent(hive: Services) -> None:
    argus, otto = AgentName("argus"), AgentName("otto")
    spawn = (await hive.gate.spawn.request(MANAGER, argus, "You watch.", "eyes"))["approval"]
    seed = (await hive.gate.init_config.request(MANAGER, otto, "You wait.", "to be shaped"))["approval"]
    assert "a new agent, with these files as its first commit:" in await page(hive, f"/approvals/{spawn}")
    text = await page(hive, f"/approvals/{seed}")
    assert "repositories with these files as their first commit, and no agent yet:" in text
    assert "a new agent" not in text
