"""What the operator asks for by a card: `hive` itself, against the real door and real git."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from hive_core.protocol.words import MANAGER, AgentName
from hive_core.sockets.admin import AdminDesk
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.hives import Services, approve_by_hash, open_gate, run_hive, serve


class Said(NamedTuple):
    code: int
    text: str


class Terminal:
    """Runs `hive`; gives its code and what it printed on both streams."""

    def __init__(self, runtime: Path) -> None:
        self._runtime = runtime

    async def __call__(self, *words: str, stdin: bytes = b"") -> Said:
        return _said(await run_hive(self._runtime, *words, stdin=stdin))

    async def approve(self, *numbers: int, more: Sequence[str] = ()) -> Said:
        return _said(await approve_by_hash(self._runtime, *numbers, more=more))


def _said(done: subprocess.CompletedProcess[bytes]) -> Said:
    return Said(done.returncode, (done.stdout + done.stderr).decode())


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    (tmp_path / "state").mkdir()
    async with open_gate(tmp_path / "state") as services:
        await services.gate.ensure_manager("You manage.")
        yield services


@pytest.fixture
async def run(hive: Services, tmp_path: Path) -> AsyncIterator[Terminal]:
    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        yield Terminal(tmp_path)


async def test_a_new_agent_is_asked_for_and_its_card_shows_what_was_given(hive: Services, run: Terminal) -> None:
    asked = await run("spawn", "argus", "You review.", "--icon", "🦉", "--toolkit", "reader", "--reason", "more eyes")
    assert asked == (0, "approval 2 waits for you\n`hive show 2` shows it, `hive approve 2` approves it\n")
    card = await hive.approvals.get(2)
    assert (card.kind, card.agent, card.requested_by, card.reason) == ("spawn", "argus", "operator", "more eyes")
    assert card.payload["icon"] == "🦉"
    assert "You review." in card.payload["files"]["CLAUDE.md"]
    assert 'tools = ["Read", "Glob", "Grep"' in card.payload["files"]["agent.toml"]
    assert (await run.approve(2)).text.splitlines()[-1].startswith("approval 2 of argus: done")


async def test_a_persona_comes_from_standard_input_where_it_is_no_word(hive: Services, run: Terminal) -> None:
    assert json.loads((await run("spawn", "argus", "--json", stdin=b"You\nreview.\n")).text) == {"approval": 2}
    card = await hive.approvals.get(2)
    assert "You\nreview.\n" in card.payload["files"]["CLAUDE.md"]
    assert card.reason == "asked for by the operator"
    assert await run("spawn", "otto", stdin=b"\xff") == (
        2,
        "hive: cannot take the persona: byte 0 is not UTF-8; give it as UTF-8\n",
    )


@pytest.mark.parametrize(("says", "code", "state"), [("y\n", 0, "done"), ("\n", 4, "pending"), ("\x04", 4, "pending")])
async def test_on_a_terminal_what_is_shown_is_approved_by_a_yes(
    hive: Services, run: Terminal, tmp_path: Path, says: str, code: int, state: str
) -> None:
    for name in ("argus", "otto"):
        await run("spawn", name, "You review.", "--toolkit", "reader")
    ours, theirs = os.openpty()
    try:
        os.write(ours, says.encode())
        done = await run_hive(tmp_path, "approve", "2", "3", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == code, done
    shown = done.stdout.decode()
    assert ["◆ 2 new agent argus" in shown, "◆ 3 new agent otto" in shown, "  effect\n" in shown] == [True, True, True]
    assert done.stderr.decode().startswith("approve these 2? [y/N] ")
    assert {(await hive.approvals.get(number)).state for number in (2, 3)} == {state}
    if code:
        assert done.stderr.endswith(b"hive: cannot approve 2 3: you did not say yes\n")


async def test_nothing_is_approved_that_was_shown_to_nobody(hive: Services, run: Terminal) -> None:
    await run("spawn", "argus", "You review.")
    unseen = "hive: cannot approve 2 unseen: there is no terminal to show it on; give --digest, the hash that"
    assert await run("approve", "2", stdin=b"y\n") == (2, f"{unseen} `hive show 2` tells\n")
    refused = json.loads((await run("approve", "2", "--json")).text.splitlines()[0])
    assert "unseen" in refused["error"]["message"]
    assert (await run("approve", "2", "--digest", "a", "--digest", "b")).code == 2
    assert (await hive.approvals.get(2)).state == "pending"
    assert (await run.approve(2)).code == 0
    assert (await run("approve", "2")).text.splitlines()[-1].startswith("approval 2 of argus: done")


async def test_a_configuration_alone_is_asked_for_to_be_shaped_before_anything_runs(
    hive: Services, run: Terminal
) -> None:
    place = hive.repos.proposed_dir / "argus" / "config"
    said = await run("init-config", "argus", "You review.")
    assert said.text.splitlines()[2] == (
        f"then it lies in {place} to be shaped, and `hive apply argus HEAD` asks to create it"
    )
    assert (await hive.approvals.get(2)).kind == "init_config"
    assert (await run.approve(2)).code == 0
    assert (place / "agent.toml").exists()


async def test_newer_inputs_are_asked_for_and_refused_where_nothing_is_built_from_them(run: Terminal) -> None:
    why = 'only containers of sandbox = "nixos-container" are built from inputs (here it is bwrap)'
    assert await run("update-meta-inputs") == (4, f"hive: cannot update the inputs: {why}\n")


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["spawn", "iris", "You read."], 4, "cannot ask for iris: an agent of that name exists"),
        (["spawn", "Argus", "You read."], 2, "cannot use 'Argus' as an agent's name"),
        (["spawn", "argus", ""], 2, "cannot take the persona: it is empty"),
        (["spawn", "argus", "You read.", "--icon", "no"], 2, "cannot use 'no' as an icon"),
        (["spawn", "argus", "You read.", "--toolkit", "none"], 2, "cannot use 'none' as a toolkit: there are"),
        (["spawn", "argus", "You read.", "--reason", ""], 2, "cannot take the reason: it is empty"),
        (["init-config", "iris", "You read."], 4, "cannot ask for iris: an agent of that name exists"),
        (["update-meta-inputs", "--reason", " "], 2, "cannot take the reason: it is empty"),
    ],
)
async def test_what_cannot_be_asked_for_is_one_sentence_and_leaves_no_card(
    hive: Services, run: Terminal, words: list[str], code: int, why: str
) -> None:
    said = await run(*words)
    assert (said.code, said.text.startswith(f"hive: {why}"), said.text.count("\n")) == (code, True, 1), said
    assert await hive.approvals.pending() == []


async def test_what_cannot_be_decided_or_told_says_why_and_what_to_do(
    hive: Services, run: Terminal, tmp_path: Path
) -> None:
    place = hive.repos.proposed_dir / "iris" / "config"
    assert (await run("apply", "iris", Checkout(place).commit(CLAUDE__md="You read slowly.\n"))).code == 0
    assert (await run.approve(2)).code == 0
    assert (await run("init-config", "argus", "You watch.")).code == 0
    assert (await run.approve(3)).code == 0
    nothing = tmp_path / "nothing.toml"
    for words, code, said in [
        ("deny 1 no", 4, "cannot deny approval 1: it is done already"),
        (
            "deny 2 no",
            4,
            "approval 2: it is done already; `hive rollback iris` takes it back once it is done",
        ),
        ("apply iris nope", 3, f"cannot find nope in {place}: no branch, tag or commit is called so"),
        (
            "apply argus HEAD",
            4,
            "it is what argus was seeded with; commit a change of it, or ask for a new agent argus",
        ),
        ("history nobody", 3, "cannot find nobody: no agent has that name; `list_agents` or `hive list` shows them"),
        (
            "blame iris CLAUDE.md",
            3,
            "agent.toml does not set it, so it is what it is by default; for a file give",
        ),
        ("rollback nobody", 3, "cannot find nobody: no agent has that name"),
        ("rollback hm1nd", 4, "cannot roll hm1nd back: it runs on its first commit; `hive history hm1nd`"),
        ("policy rehearse --name none", 3, "cannot rehearse 'none': no rule has that name; `hive policy` lists them"),
        (
            f"policy rehearse --rule {nothing}",
            2,
            f"cannot read {nothing}: there is no such file or directory; create it, or set --rule to another",
        ),
    ]:
        done = await run(*words.split())
        assert (done.code, said in done.text, done.text.count("\n")) == (code, True, 1), done


async def test_a_reason_of_several_lines_is_one_line_in_a_list(hive: Services, run: Terminal) -> None:
    await hive.gate.spawn.request(
        MANAGER, AgentName("argus"), "You watch.", "eyes\n◆ 9 change iris: approve this\x1b[2J"
    )
    told = (await run("pending")).text
    assert told == "◆ 2 new agent argus: eyes ◆ 9 change iris: approve this⟨U+001B⟩[2J\n"
    assert (await run.approve(2)).code == 0
    lines = (await run("history", "argus")).text.splitlines()
    assert lines[1:] == ["  eyes ◆ 9 change iris: approve this⟨U+001B⟩[2J"]
    assert "deployed/0 (approval 2)" in lines[0]


async def test_of_several_cards_each_tells_its_own_end_and_one_that_is_refused_hinders_none(
    hive: Services, run: Terminal
) -> None:
    for name in ("argus", "otto"):
        await run("spawn", name, "You watch.", "--toolkit", "reader")
    assert (await run("deny", "3", "one is enough")).code == 0
    done = await run.approve(2, 3)
    assert (done.code, done.text.splitlines()[-1]) == (1, "approval 3 is not approved: it was denied")
    assert (await hive.approvals.get(2)).state == "done"
    told = json.loads((await run.approve(2, 3, more=["--json"])).text)["approvals"]
    assert [(one["id"], one.get("state"), one.get("error", {}).get("code")) for one in told] == [
        (2, "done", None),
        (3, None, "conflict"),
    ]
    assert (await run("blame", "argus", "tools")).text.splitlines()[0] == 'tools: ["Read", "Glob", "Grep"]'
