"""Agents run the hive's own copy of claude; another one takes its place by an approval alone.

In claude's place stands a shell, which is a program in one file too and knows none of its flags.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.containers.mounts import agent_dirs
from hive_core.containers.process import ProcessDriver
from hive_core.containers.program_check import parse_version
from hive_core.hive import Hive
from hive_core.procedures.pinned_claude import PinnedClaude, version_in
from hive_core.program_copies import ProgramCopies, digest_of
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.agents import set_deployed
from hive_core.services.approvals import Approval
from hive_core.services.claude_pins import newest_pins
from hive_core.store.bus import DEPLOYED
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, SETTINGS, Services, open_services, wait_until

IRIS = AgentName("iris")
_SEEN = "SELECT kind FROM events WHERE kind LIKE 'claude_%'"


def write_program(path: Path, build: int) -> Path:
    """A program of its own sha256: the builds differ in bytes of their head that say nothing."""
    shutil.copyfile(os.path.realpath("/bin/sh"), path)
    with path.open("r+b") as opened:
        opened.seek(9)
        opened.write(bytes([build]))
    path.chmod(0o755)
    return path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    return write_program(tmp_path / "claude", 1)


@asynccontextmanager
async def a_hive(tmp_path: Path, installed: Path, program: str = "claude") -> AsyncIterator[Hive]:
    """A daemon's hive from its start on; iris is one of its agents, and nobody serves her."""
    (tmp_path / "state").mkdir(exist_ok=True)
    async with open_services(tmp_path / "state") as services:
        if not [agent for agent in await services.agents.all() if agent.name == IRIS]:
            await add_iris(services, program)
        hive = hive_of(services, pinned=PinnedClaude(services.store, tmp_path / "state", installed, inside=False))
        await hive.pinned.load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.gate.serve)
            with trio.fail_after(PATIENCE_S):
                yield hive
            nursery.cancel_scope.cancel()


async def add_iris(services: Services, program: str) -> None:
    await services.add_agents(IRIS)
    await run_on(services.store, program)


async def run_on(store: Any, program: str) -> None:
    await store.write(lambda tx: set_deployed(tx, IRIS, "0" * 40, {**SETTINGS, "program": program}))


async def approve(hive: Hive, number: int) -> Approval:
    card = await hive.approvals.get(number)
    return await hive.gate.approve(number, card.digest, OPERATOR)


async def asked(hive: Hive) -> list[Approval]:
    return [card for card in await hive.approvals.pending() if card.kind == "claude"]


def lines(card: Approval) -> dict[str, Any]:
    assert card.effect is not None
    return {line["what"]: (line["before"], line["after"]) for line in card.effect["lines"]}


async def test_the_first_one_that_is_found_is_copied_and_stays_whatever_becomes_of_it(
    tmp_path: Path, installed: Path
) -> None:
    digest = digest_of(installed)
    async with a_hive(tmp_path, installed) as hive:
        (pin,) = await newest_pins(hive.store, 2)
        assert (pin.sha256, pin.source, pin.approval) == (digest, installed, None)
        assert (
            hive.claude
            == hive.pinned.path
            == tmp_path / "state" / "programs" / f"claude-unknown-{digest[:12]}" / "claude"
        )
        assert "claude_pinned" in [row["kind"] for row in await hive.store.rows("SELECT kind FROM events")]
    write_program(installed, 2)
    async with a_hive(tmp_path, installed) as hive:
        assert hive.claude is not None
        assert digest_of(hive.claude) == digest
    installed.unlink()
    async with a_hive(tmp_path, installed) as hive:
        assert hive.claude is not None
        assert os.access(hive.claude, os.X_OK)


async def test_another_one_waits_for_an_approval_and_is_run_after_it(tmp_path: Path, installed: Path) -> None:
    first = digest_of(installed)
    async with a_hive(tmp_path, installed) as hive:
        await hive.update_claude.look()
        assert await asked(hive) == []
    second = digest_of(write_program(installed, 2))
    async with a_hive(tmp_path, installed) as hive:
        await hive.update_claude.look()
        await hive.update_claude.look()
        (card,) = await asked(hive)
        assert (card.requested_by, card.agent) == ("system", "hm1nd")
        told = lines(card)
        assert told["claude"] == ("unknown", "unknown, another build")
        assert told["sha256"] == (first, second)
        assert "does not tell its version" in told["hive doctor says"][1]
        assert hive.claude is not None
        assert digest_of(hive.claude) == first, "nothing has changed yet"
        done = await approve(hive, card.id)
        assert (done.state, done.proof) == ("done", "unproven: no agent runs claude now")
        assert digest_of(hive.claude) == second
        assert [pin.sha256 for pin in await newest_pins(hive.store, 5)] == [second, first]
        await hive.update_claude.look()
        assert await asked(hive) == []
        with pytest.raises(Refusal, match="is what agents run already"):
            await hive.update_claude.request(None, None)


async def test_what_the_operator_has_denied_is_not_asked_for_again_but_by_himself(
    tmp_path: Path, installed: Path
) -> None:
    async with a_hive(tmp_path, installed) as hive:
        other = write_program(tmp_path / "other", 3)
        number = (await hive.update_claude.request(str(other), "a try"))["approval"]
        await hive.gate.deny(number, "not now", OPERATOR)
        shutil.copy2(other, installed)
        await hive.update_claude.look()
        assert await asked(hive) == []
        await hive.update_claude.request(str(other), "a try")
        assert len(await asked(hive)) == 1


async def test_a_program_that_was_swapped_since_it_was_shown_is_shown_anew(tmp_path: Path, installed: Path) -> None:
    async with a_hive(tmp_path, installed) as hive:
        other = write_program(tmp_path / "other", 3)
        number = (await hive.update_claude.request(str(other), "a try"))["approval"]
        before, third = digest_of(other), digest_of(write_program(tmp_path / "other", 4))
        with pytest.raises(Refusal, match="look at it again"):
            await approve(hive, number)
        assert lines(await hive.approvals.get(number))["sha256"][1] == third != before
        # One that is swapped behind its times is seen when it is copied.
        seen = other.stat()
        write_program(other, 5)
        os.utime(other, ns=(seen.st_atime_ns, seen.st_mtime_ns))
        failed = await approve(hive, number)
        assert failed.state == "failed"
        assert "is another program now than the one that was shown" in (failed.note or "")
        assert list((tmp_path / "state" / "programs").glob("*/claude")) == [hive.pinned.path]


async def test_what_needs_more_than_its_own_file_is_run_where_it_is(tmp_path: Path, installed: Path) -> None:
    installed.write_text("#!/bin/sh\nexec node cli.js\n")
    async with a_hive(tmp_path, installed) as hive:
        assert (hive.claude, hive.pinned.pin) == (installed, None)
        with pytest.raises(Refusal, match="is not a program in one file"):
            await hive.update_claude.request(None, None)


async def test_a_hive_of_rehearsals_keeps_no_copy_before_an_agent_needs_it(tmp_path: Path, installed: Path) -> None:
    async with a_hive(tmp_path, installed, "rehearsal") as hive, trio.open_nursery() as nursery:
        assert hive.claude == installed
        assert not (tmp_path / "state" / "programs").exists()
        nursery.start_soon(hive.pinned.serve)

        async def is_pinned() -> bool:
            return hive.pinned.pin is not None

        await run_on(hive.store, "claude")
        await wait_until(hive.store, is_pinned, DEPLOYED)
        assert hive.claude == hive.pinned.path != installed
        nursery.cancel_scope.cancel()


async def test_a_copy_that_is_gone_is_made_again_of_the_same_program_alone(tmp_path: Path, installed: Path) -> None:
    async with a_hive(tmp_path, installed) as hive:
        path = hive.claude
    assert path is not None
    path.unlink()
    async with a_hive(tmp_path, installed) as hive:
        assert hive.claude == path
    path.unlink()
    write_program(installed, 2)
    async with a_hive(tmp_path, installed) as hive:
        assert hive.claude is None
        assert hive.pinned.missing.endswith("`hive update-claude` asks to run the one that is installed")
        number = (await hive.update_claude.request(None, None))["approval"]
        assert (await approve(hive, number)).state == "done"
        assert hive.claude is not None
        assert hive.pinned.missing == ""


async def test_where_something_else_decides_it_is_not_pinned(tmp_path: Path, installed: Path) -> None:
    async with open_services(tmp_path) as services:
        await add_iris(services, "claude")
        pinned = PinnedClaude(
            services.store, tmp_path, installed, hindrance="the helper decides; change it there", is_helpers=True
        )
        hive = hive_of(services, pinned=pinned)
        await pinned.load()
        assert (pinned.pin, hive.claude) == (None, installed)
        with pytest.raises(Refusal, match="the helper decides; change it there"):
            await hive.update_claude.request(None, None)
        for build in (1, 1, 2):  # each is told of once
            write_program(installed, build)
            await hive.update_claude.look()
        seen = await newest_pins(hive.store, 5, kept=False)
        assert [pin.kept for pin in seen] == [False, False]
        assert (pinned.pin, pinned.missing, hive.claude) == (seen[0], "", installed)
        assert seen[0].sha256 == digest_of(installed) != seen[1].sha256
        assert [row["kind"] for row in await hive.store.rows(_SEEN)] == ["claude_seen"] * 2
        assert await asked(hive) == []


def test_the_version_is_read_from_the_path_of_a_package() -> None:
    assert version_in(Path("/nix/store/0000-claude-code-2.1.197/bin/claude")) == "2.1.197"
    assert version_in(Path("/usr/bin/claude")) == "unknown"


def test_a_copy_is_another_file_and_nobody_writes_to_it(tmp_path: Path, installed: Path) -> None:
    copies = ProgramCopies(tmp_path)
    copied = copies.copy(installed)
    assert (copied.sha256, copied.size_bytes) == (digest_of(installed), installed.stat().st_size)
    path = copies.keep(copied, "1.2.3")
    assert path.stat().st_ino != installed.stat().st_ino
    assert path.stat().st_mode & 0o777 == 0o555
    assert copies.keep(copies.copy(installed), "1.2.3") == path
    copies.copy(installed)
    copies.clear([path])
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.glob("programs/*")] == [
        f"programs/claude-1.2.3-{copied.sha256[:12]}"
    ]


async def test_the_former_one_is_asked_for_by_its_copy(tmp_path: Path, installed: Path) -> None:
    first = digest_of(installed)
    async with a_hive(tmp_path, installed) as hive:
        with pytest.raises(Refusal, match="there is no copy of one that agents ran before"):
            await hive.update_claude.request(None, None, former=True)
        write_program(installed, 2)
        await approve(hive, (await hive.update_claude.request(None, None))["approval"])
        assert hive.claude is not None
        assert digest_of(hive.claude) != first
        number = (await hive.update_claude.request(None, None, former=True))["approval"]
        assert (await approve(hive, number)).state == "done"
        assert digest_of(hive.claude) == first
        with pytest.raises(Refusal, match="give a path, or ask for the former one"):
            await hive.update_claude.request(str(installed), None, former=True)
    async with a_hive(tmp_path, installed) as hive:
        assert hive.claude is not None
        assert digest_of(hive.claude) == first
        await hive.update_claude.look()
        assert await asked(hive) == [], "what is installed was approved and left again"


async def test_only_the_one_who_tries_a_program_is_started_on_it(tmp_path: Path, installed: Path) -> None:
    driver = ProcessDriver(tmp_path, sandbox="bwrap", claude=installed, orphan_grace_s=1.0)
    other, argus = write_program(tmp_path / "other", 2), AgentName("argus")

    async def shapes() -> list[str]:
        return [await driver.generation(name, agent_dirs(tmp_path, tmp_path, name)) for name in (IRIS, argus)]

    before = await shapes()
    driver.use_claude(other, IRIS)
    tried, untouched = await shapes()
    assert untouched == before[1]
    assert tried != before[0]
    driver.use_claude(other)
    assert await shapes() == [tried, tried]
    driver.use_claude(installed)
    assert await shapes() == before


@pytest.mark.parametrize("told", ["", "../../x", "2.1/7", "-2", "2.1.197\n", "2" * 41, "2\u202e1"])
def test_what_a_program_calls_its_version_never_leads_out_of_the_folder_of_copies(told: str) -> None:
    assert parse_version(told) == "unknown"
    assert parse_version("2.1.197-beta+1") == "2.1.197-beta+1"


async def test_a_pipe_is_no_program_and_keeps_nobody_waiting(tmp_path: Path, installed: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o755)
    async with a_hive(tmp_path, installed) as hive:
        with pytest.raises(Refusal, match="is not a program in one file"):
            await hive.update_claude.request(str(tmp_path / "pipe"), None)


async def test_links_that_lead_in_a_circle_lead_to_no_program(tmp_path: Path, installed: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    async with a_hive(tmp_path, installed) as hive:
        with pytest.raises(Refusal, match="cannot update claude: "):
            await hive.update_claude.request(str(tmp_path / "circle"), None)


@pytest.mark.parametrize("path", ["claude", "", "/a\0b", "/\ud800", 7])
async def test_a_path_that_is_none_is_refused(tmp_path: Path, installed: Path, path: object) -> None:
    async with a_hive(tmp_path, installed) as hive:
        with pytest.raises(Refusal) as caught:
            await hive.update_claude.request(path, None)
        assert "as the path of claude" in caught.value.message
        with pytest.raises(Refusal, match="there is no such file"):
            await hive.update_claude.request(str(tmp_path / "none"), None)


async def test_what_was_left_of_a_copy_that_was_never_made_goes(tmp_path: Path, installed: Path) -> None:
    left = tmp_path / "state" / "programs" / ".new.left"
    left.mkdir(parents=True)
    (left / "claude").write_bytes(b"half of it")
    async with a_hive(tmp_path, installed) as hive:
        assert list(left.parent.glob("*/claude")) == [hive.claude]
        assert not left.exists()
