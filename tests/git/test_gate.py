from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hive_core.cli.show_approvals import approval as show_approval
from hive_core.git.commit_contents import FILE_LIMIT_BYTES, READ_LIMIT_BYTES, Contents
from hive_core.git.proposals import DIFF_LIMIT_BYTES
from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import PERSONA_LIMIT_BYTES, AgentName, CommitSha
from hive_core.services.agents import set_deployed
from hive_core.services.approvals import Approval, Shown, note_proof, settle, show_again
from hive_core.services.events import newest_events
from tests.checkouts import Checkout
from tests.hives import PATIENCE_S, Services, clean_environment, open_services, wait_until
from tests.tools import program_of

HM1ND, IRIS, ARGUS = AgentName("hm1nd"), AgentName("iris"), AgentName("argus")
TOML = 'program = "rehearsal"\nmodel = "opus"\n'


def applied(hive: Services, *arguments: str) -> str:
    command = ["git", "--git-dir", str(hive.state_dir / "applied" / "iris.git"), *arguments]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout.strip()


def tags(hive: Services) -> dict[str, str]:
    lines = applied(hive, "for-each-ref", "--format=%(refname:short) %(objectname) %(*objectname)", "refs/tags")
    return {line.split()[0]: line.split()[-1] for line in lines.splitlines()}


@contextlib.contextmanager
def refused(words: str, code: str | None = None) -> Iterator[None]:
    with pytest.raises(Refusal, match=words) as caught:
        yield
    assert code in (None, caught.value.code)


async def mail_of(hive: Services, agent: str) -> list[str]:
    return [m["body"] for m in await hive.broker.messages.newest(agent) if m["recipient"] == agent]


@asynccontextmanager
async def serving(hive: Services) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.serve)
        with trio.fail_after(PATIENCE_S):
            yield
        nursery.cancel_scope.cancel()


async def approve(hive: Services, number: int) -> Approval:
    card = await hive.approvals.get(number)
    return await hive.gate.approve(number, card.digest, "operator")


async def click_and_die(hive: Services, number: int) -> None:
    """The operator's click is stored, and the daemon dies before anything follows from it."""
    card = await hive.approvals.get(number)
    await hive.store.write(lambda tx: settle(tx, card, "approved", None, "operator"))


async def ask_for_argus(hive: Services, persona: str = "You watch.", **more: Any) -> int:
    return (await hive.gate.spawn.request(HM1ND, ARGUS, persona, "we need eyes", **more))["approval"]


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """hm1nd with its repositories."""
    async with open_services(tmp_path) as services:
        await services.gate.ensure_manager("You manage.")
        yield services


@pytest.fixture
async def iris(hive: Services) -> Checkout:
    """iris with her repositories; her proposed one."""
    number = (await hive.gate.spawn.request(AgentName("operator"), IRIS, "You read.", "a reader"))["approval"]
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    return Checkout(hive.repos.proposed_dir / "iris" / "config")


# -- a new agent ------------------------------------------------------------------------------------------------------


async def test_the_manager_is_made_once_without_an_approval(hive: Services) -> None:
    before = await hive.agents.get("hm1nd")
    assert (before.role, before.wanted, before.page_port) == ("manager", "up", 8000)
    assert (before.settings or {})["prompt"] == "You manage."
    await hive.gate.ensure_manager("Another prompt.")
    assert await hive.agents.get("hm1nd") == before
    assert await hive.approvals.recent() == []


async def test_approve_makes_the_agent_exist_with_its_settings_its_welcome_and_word_to_who_asked(
    hive: Services,
) -> None:
    number = await ask_for_argus(hive)
    with refused("cannot find argus", "not_found"):
        await hive.agents.get("argus")
    async with serving(hive):
        done = await approve(hive, number)
    assert (done.state, done.resolved_by) == ("done", "operator")
    argus = await hive.agents.get("argus")
    assert (argus.role, argus.wanted, argus.queued) == ("agent", "up", 1)
    settings = argus.settings or {}
    assert (settings["program"], settings["model"]) == ("rehearsal", "sonnet")
    assert "You watch." in settings["prompt"]
    assert "we need eyes" in (await mail_of(hive, "argus"))[0]
    assert f"approval {number}, the new agent argus: approved" in (await mail_of(hive, "hm1nd"))[0]
    kinds = [kind for kind in await hive.kinds() if kind.startswith(("approval_", "agent_"))]
    told = [kind for kind in kinds[1:] if kind != "approval_step"]
    assert told == ["approval_requested", "approval_approved", "agent_created", "approval_done"]


async def test_what_was_shown_is_what_the_agent_runs_on(hive: Services) -> None:
    number = await ask_for_argus(hive, 'You {{ name }} <b>&amp;</b> \'quote\' """ é\r\n{% raw %}')
    shown = (await hive.approvals.get(number)).payload["files"]
    async with serving(hive):
        await approve(hive, number)
    argus = await hive.agents.get("argus")
    assert (argus.settings or {})["prompt"] == shown["CLAUDE.md"]
    assert 'You {{ name }} <b>&amp;</b> \'quote\' """ é\r\n{% raw %}' in shown["CLAUDE.md"]


async def test_a_persona_of_just_the_limit_can_be_deployed(hive: Services) -> None:
    number = await ask_for_argus(hive, "x" * (PERSONA_LIMIT_BYTES - 2048))
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    with refused("cannot take the persona: it has"):
        await hive.gate.spawn.request(HM1ND, IRIS, "x" * (PERSONA_LIMIT_BYTES - 2047), "r")


async def test_deny_makes_nothing_and_tells_who_asked_why(hive: Services) -> None:
    number = await ask_for_argus(hive)
    async with serving(hive):
        denied = await hive.gate.deny(number, "not before Monday", "operator")
        assert (denied.state, denied.note) == ("denied", "not before Monday")
        assert (await hive.gate.deny(number, "something else", "operator")).note == "not before Monday"
        with refused("it was denied", "conflict"):
            await approve(hive, number)
    with refused("cannot find argus"):
        await hive.agents.get("argus")
    assert not (hive.state_dir / "applied" / "argus.git").exists()
    assert len(told := await mail_of(hive, "hm1nd")) == 1
    assert 'state: denied\nreason: "not before Monday"' in told[0]


async def test_deny_needs_a_reason(hive: Services) -> None:
    number = await ask_for_argus(hive)
    for reason in ("", " ", None, "x" * 5000, "\ud800"):
        with refused("cannot take the reason", "usage"):
            await hive.gate.deny(number, reason, "operator")
    assert (await hive.approvals.get(number)).state == "pending"


async def test_two_denies_at_once_are_one(hive: Services) -> None:
    number = await ask_for_argus(hive)
    async with trio.open_nursery() as nursery:
        for reason in ("one", "two"):
            nursery.start_soon(hive.gate.deny, number, reason, "operator")
    assert len(await mail_of(hive, "hm1nd")) == 1


async def test_the_same_request_twice_is_one_card_and_another_for_the_same_name_is_refused(hive: Services) -> None:
    number = await ask_for_argus(hive)
    assert await ask_for_argus(hive) == number
    with refused(f"approval {number} asks for it already"):
        await ask_for_argus(hive, "You watch something else.")
    assert [card.id for card in await hive.approvals.pending()] == [number]
    await hive.gate.deny(number, "no", "operator")
    assert await ask_for_argus(hive) != number


async def test_on_a_full_disk_nothing_new_is_asked_for_and_what_was_asked_is_decided(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for_argus(hive, key="k")
    hive.set_full(True)
    with pytest.raises(Refusal, match="cannot ask for damocles: no space is left"):
        await hive.gate.spawn.request(HM1ND, AgentName("damocles"), "p", "r")
    with pytest.raises(Refusal, match="cannot ask for a commit of iris: no space is left"):
        await hive.gate.apply_commit.request(HM1ND, IRIS, iris.commit(CLAUDE__md="Read more."), "r")
    assert await ask_for_argus(hive, key="k") == number
    assert (await hive.gate.deny(number, "not now", "operator")).state == "denied"


async def test_an_agent_that_exists_is_not_asked_for_again(hive: Services, iris: Checkout) -> None:
    with refused("an agent of that name exists"):
        await hive.gate.spawn.request(HM1ND, IRIS, "p", "r")
    with refused("an agent of that name exists"):
        await hive.gate.spawn.request(HM1ND, HM1ND, "p", "r")


async def test_a_click_on_something_else_than_what_is_there_is_refused(hive: Services) -> None:
    number = await ask_for_argus(hive)
    stale = (await hive.approvals.get(number)).digest
    await hive.sql("UPDATE approvals SET digest = 'moved'")
    for digest in (stale, "", "f" * 64):
        with refused("not what you were shown", "conflict"):
            await hive.gate.approve(number, digest, "operator")
    assert (await hive.approvals.get(number)).state == "pending"


async def test_two_clicks_at_once_have_one_effect_and_one_end(hive: Services) -> None:
    number = await ask_for_argus(hive)
    ends: list[str] = []

    async def click() -> None:
        ends.append((await approve(hive, number)).state)

    async with serving(hive), trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(click)
    assert ends == ["done"] * 5
    kinds = await hive.kinds()
    assert [kinds.count(kind) for kind in ("approval_approved", "approval_done")] == [1, 1]
    assert len(await mail_of(hive, "argus")) == 1


async def test_a_click_and_a_deny_at_once_have_one_end(hive: Services) -> None:
    number = await ask_for_argus(hive)
    ends: list[str] = []

    async def end(call: Any, *arguments: Any) -> None:
        try:
            ends.append((await call(*arguments)).state)
        except Refusal as refusal:
            ends.append(refusal.code)

    async with serving(hive), trio.open_nursery() as nursery:
        nursery.start_soon(end, approve, hive, number)
        nursery.start_soon(end, hive.gate.deny, number, "no", "operator")
    assert sorted(ends) in (["conflict", "done"], ["conflict", "denied"])
    state = (await hive.approvals.get(number)).state
    assert state in ends
    assert len(await mail_of(hive, "hm1nd")) == 1


async def test_a_daemon_that_died_after_the_click_finishes_it_when_it_starts_again(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.gate.ensure_manager("You manage.")
        number = await ask_for_argus(hive)
        await click_and_die(hive, number)
    async with open_services(tmp_path) as hive, serving(hive):
        assert (await approve(hive, number)).state == "done"
        assert (await hive.agents.get("argus")).queued == 1


async def test_a_daemon_that_died_with_half_a_repository_finishes_it_when_it_starts_again(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.gate.ensure_manager("You manage.")
        number = await ask_for_argus(hive)
        await click_and_die(hive, number)
        # What is there when the daemon is killed in the middle: the one repository whole, of the other a part.
        await hive.repos.create(ARGUS, (await hive.approvals.get(number)).payload["files"])
        (tmp_path / "proposed" / "argus" / "config").rename(tmp_path / "proposed" / "argus" / ".new")
        (tmp_path / "applied" / ".argus.new").mkdir()
    async with open_services(tmp_path) as hive, serving(hive):
        assert (await approve(hive, number)).state == "done"
        assert (
            Checkout(tmp_path / "proposed" / "argus" / "config").head() == (await hive.agents.get("argus")).deployed_sha
        )


async def test_a_name_whose_first_try_failed_gets_what_the_second_card_showed(tmp_path: Path) -> None:
    async with open_services(tmp_path, ports=range(8100, 8101)) as hive, serving(hive):
        await hive.gate.ensure_manager("You manage.")
        await hive.gate.spawn.request(HM1ND, IRIS, "You read.", "r")
        await approve(hive, 1)
        failed = await approve(hive, await ask_for_argus(hive, "You are harmless."))
        assert (failed.state, "ports" in (failed.note or "")) == ("failed", True)
        assert 'state: failed\nreason: "cannot create argus' in (await mail_of(hive, "hm1nd"))[-1]
    async with open_services(tmp_path) as hive, serving(hive):
        assert (await approve(hive, await ask_for_argus(hive, "You watch."))).state == "done"
        argus = await hive.agents.get("argus")
        assert "You watch." in (argus.settings or {})["prompt"]
        checkout = Checkout(tmp_path / "proposed" / "argus" / "config")
        assert checkout.head() == argus.deployed_sha
        assert "You watch." in (checkout.path / "CLAUDE.md").read_text()


async def test_a_repository_that_cannot_be_made_fails_the_approval_and_not_the_daemon(hive: Services) -> None:
    (hive.state_dir / "applied" / "argus.git").write_text("in the way")
    number = await ask_for_argus(hive)
    async with serving(hive):
        failed = await approve(hive, number)
        assert failed.state == "failed"
        assert failed.note
        await hive.gate.spawn.request(HM1ND, IRIS, "You read.", "r")
        assert (await approve(hive, number + 1)).state == "done"


# -- a change ---------------------------------------------------------------------------------------------------------


async def ask_for(hive: Services, sha: str, **more: Any) -> int:
    return (await hive.gate.apply_commit.request(HM1ND, IRIS, CommitSha(sha), "a better model", **more))["approval"]


async def test_the_first_configuration_is_tagged_from_the_start(hive: Services, iris: Checkout) -> None:
    first = (await hive.agents.get("iris")).deployed_sha
    assert tags(hive) == {"deployed/0": first}
    assert iris.head() == first
    assert iris.git("status", "--porcelain") == ""
    assert applied(hive, "fsck", "--strict") == ""


async def test_approve_applies_exactly_the_commit_that_was_shown(hive: Services, iris: Checkout) -> None:
    first, sha = iris.head(), iris.commit(agent__toml=TOML)
    number = await ask_for(hive, sha)
    card = await hive.approvals.get(number)
    assert (card.payload["sha"], card.payload["base"]) == (sha, first)
    assert '\n-model = "sonnet"\n+model = "opus"' in card.payload["diff"]
    later = iris.commit(CLAUDE__md="Obey me.\n")
    iris.git("branch", "-f", sha)  # a branch that is named like the commit
    assert (await hive.agents.get("iris")).deployed_sha == first
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    agent = await hive.agents.get("iris")
    assert agent.deployed_sha == sha != later
    assert (agent.settings or {})["model"] == "opus"
    assert "Obey me." not in (agent.settings or {})["prompt"]
    steps = {f"{step}/{number}": sha for step in ("proposal", "approved", "deployed")}
    assert tags(hive) == {"deployed/0": first, **steps}
    assert applied(hive, "rev-parse", "main") == sha
    assert f"commit {sha} for iris: approved" in (await mail_of(hive, "hm1nd"))[-1]


async def test_the_card_of_a_commit_tells_its_effect_and_the_click_is_bound_to_it(
    hive: Services, iris: Checkout
) -> None:
    toml = 'program = "rehearsal"\nmodel = "opus"\ntools = ["Bash", "WebFetch"]\n'
    sha = iris.commit(agent__toml=toml, CLAUDE__md="You read.\nAnd write.\n")
    number = (await hive.gate.apply_commit.request(HM1ND, IRIS, sha, "more"))["approval"]
    card = await hive.approvals.get(number)
    assert card.effect is not None
    told = [(line["weight"], effect_line(line)) for line in card.effect["lines"]]
    assert told[:3] == [
        ("wide", "tools: + WebFetch"),
        ("plain", "tools: − Read, Edit, Write, Glob, Grep"),
        ("plain", "model: sonnet → opus"),
    ]
    assert told[3][1].startswith("prompt: ")
    assert card.effect["unknown"] == []
    other = {**card.effect, "lines": card.effect["lines"][1:]}
    await hive.store.write(lambda tx: show_again(tx, card, Shown(card.payload, other)))
    with refused("not what you were shown"):
        await hive.gate.approve(number, card.digest, "operator")


async def test_what_runs_and_cannot_be_read_any_more_makes_the_effect_unknown(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = CommitSha(applied(hive, "rev-parse", "main"))
    contents = hive.repos.contents

    async def of_this_release(name: AgentName, sha: CommitSha) -> Contents:
        if sha == base:
            raise Refusal("usage", "cannot use agent.toml: old_key: unknown key")
        return await contents(name, sha)

    monkeypatch.setattr(hive.repos, "contents", of_this_release)
    sha = iris.commit(agent__toml=TOML)
    card = await hive.approvals.get((await hive.gate.apply_commit.request(HM1ND, IRIS, sha, "x"))["approval"])
    assert card.effect is not None
    assert card.effect["unknown"] == ["what iris has now: cannot use agent.toml: old_key: unknown key"]
    assert ("model", None, "opus") in [(line["what"], line["before"], line["after"]) for line in card.effect["lines"]]


async def test_rewriting_the_repository_after_the_request_changes_nothing(hive: Services, iris: Checkout) -> None:
    sha = iris.commit(agent__toml=TOML)
    number = await ask_for(hive, sha)
    iris.git("reset", "-q", "--hard", "HEAD~1")
    iris.git("reflog", "expire", "--expire=now", "--all")
    iris.git("gc", "-q", "--prune=now")
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    assert (await hive.agents.get("iris")).deployed_sha == sha


async def test_a_denied_change_is_tagged_with_the_reason_and_changes_nothing(hive: Services, iris: Checkout) -> None:
    first, sha = iris.head(), iris.commit(agent__toml=TOML)
    number = await ask_for(hive, sha)
    await hive.gate.deny(number, "# too dear\nask again", "operator")
    assert tags(hive) == {"deployed/0": first, f"proposal/{number}": sha, f"denied/{number}": sha}
    assert "# too dear\nask again" in applied(
        hive, "for-each-ref", "--format=%(contents)", f"refs/tags/denied/{number}"
    )
    assert (await hive.agents.get("iris")).deployed_sha == first
    assert "too dear" in (await mail_of(hive, "hm1nd"))[-1]
    again = await ask_for(hive, sha)
    assert again != number
    async with serving(hive):
        assert (await approve(hive, again)).state == "done"


async def test_a_commit_that_waits_is_not_asked_for_again(hive: Services, iris: Checkout) -> None:
    sha = iris.commit(agent__toml=TOML)
    number = await ask_for(hive, sha, key="first")
    for key in (None, "second"):
        with refused(f"cannot ask for {sha[:12]}: approval {number} asks for it already and waits", "refused"):
            await ask_for(hive, sha, key=key)
    assert await ask_for(hive, sha, key="first") == number
    assert [card.id for card in await hive.approvals.pending()] == [number]
    await hive.gate.deny(number, "no", "operator")
    assert await ask_for(hive, sha) > number


async def test_of_two_who_ask_for_one_commit_at_once_one_is_refused(hive: Services, iris: Checkout) -> None:
    sha, said = iris.commit(agent__toml=TOML), list[object]()

    async def ask() -> None:
        try:
            said.append(await ask_for(hive, sha))
        except Refusal as refusal:
            said.append(refusal.code)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
    (card,) = await hive.approvals.pending()
    assert sorted(map(str, said)) == [str(card.id), "refused", "refused"]


async def test_a_request_that_is_refused_leaves_one_event_that_says_who_what_and_why(
    hive: Services, iris: Checkout, tmp_path: Path
) -> None:
    sha, before = iris.commit(agent__toml="sudo = true\n"), await hive.kinds()
    async with program_of(hive, "hm1nd", tmp_path) as client:
        said = await client.refusal("request_apply_commit", agent="iris", sha=sha, reason="more")
        assert said == "cannot use agent.toml: sudo: unknown key"
        assert (await hive.kinds())[len(before) :] == ["approval_refused"]
        (event,) = await newest_events(hive.store, 1)
        assert (event["actor"], event["agent"]) == ("hm1nd", "iris")
        assert event["data"] == {"what": "apply_commit", "reason": said, "sha": sha}
        assert await hive.approvals.pending() == []
        assert "no agent has that name" in await client.refusal(
            "request_apply_commit", agent="argus", sha=sha, reason="more eyes"
        )
    (event,) = await newest_events(hive.store, 1)
    assert (event["kind"], event["agent"], event["data"]["sha"]) == ("approval_refused", "argus", sha)


async def test_so_many_commits_of_one_agent_wait_and_no_more(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.procedures.kinds.apply_commit.WAITING_LIMIT", 2)
    first, *_ = [await ask_for(hive, iris.commit(agent__toml=TOML + f"# {n}\n")) for n in range(2)]
    sha = iris.commit(agent__toml=TOML)
    with refused("2 commits of iris wait already; let the operator decide them first"):
        await ask_for(hive, sha)
    await hive.gate.deny(first, "no", "operator")
    await ask_for(hive, sha)


async def test_a_proposal_is_compared_with_what_runs_what_was_approved_and_what_was_proposed_before(
    hive: Services, iris: Checkout
) -> None:
    async def compare(number: int, against: str) -> str:
        return (await hive.gate.apply_commit.diff(await hive.approvals.get(number), against))["diff"]

    one = await ask_for(hive, iris.commit(CLAUDE__md="one\n"))
    with refused("no commit was proposed for iris before it", "not_found"):
        await compare(one, "previous")
    async with serving(hive):
        assert (await approve(hive, one)).state == "done"
    two = await ask_for(hive, iris.commit(CLAUDE__md="two\n"))
    await hive.gate.deny(two, "no", "operator")
    three = await ask_for(hive, iris.commit(CLAUDE__md="three\n"))
    assert "\n-one\n+three\n" in await compare(three, "running")
    assert "\n-one\n+three\n" in await compare(three, "approved")
    assert "\n-two\n+three\n" in await compare(three, "previous")
    async with serving(hive):
        assert (await approve(hive, three)).state == "done"
    assert await compare(three, "running") == ""
    assert "\n-one\n+three\n" in await compare(three, "approved")


async def test_a_request_sent_again_gets_the_first_answer_even_after_its_end(hive: Services, iris: Checkout) -> None:
    sha = iris.commit(agent__toml=TOML)
    number = await ask_for(hive, sha, key="toolu_1")
    async with serving(hive):
        await approve(hive, number)
    assert await ask_for(hive, sha, key="toolu_1") == number
    assert await hive.approvals.pending() == []


async def test_a_change_that_is_beside_what_was_deployed_meanwhile_fails_with_the_reason(
    hive: Services, iris: Checkout
) -> None:
    first = iris.head()
    one = await ask_for(hive, iris.commit(agent__toml=TOML))
    iris.git("reset", "-q", "--hard", first)
    sha = iris.commit(CLAUDE__md="Read slowly.\n")
    other = await ask_for(hive, sha)
    async with serving(hive):
        assert (await approve(hive, one)).state == "done"
        with refused(f"cannot approve {other} any more: cannot apply {sha[:12]}: it is not based on", "conflict"):
            await approve(hive, other)
    failed = await hive.approvals.get(other)
    assert failed.state == "failed"
    assert "which iris runs; rebase it" in (failed.note or "")
    assert '\nreason: "cannot apply' in (await mail_of(hive, "hm1nd"))[-1]
    assert (await hive.agents.get("iris")).deployed_sha == (await hive.approvals.get(one)).payload["sha"]
    assert f"deployed/{other}" not in tags(hive)


async def is_other(hive: Services, card: Approval) -> bool:
    return (await hive.approvals.get(card.id)).digest != card.digest


@pytest.mark.parametrize("who_sees_it", ["the click", "the gate"])
async def test_a_change_on_top_of_one_that_was_deployed_meanwhile_is_shown_anew_before_it_can_be_approved(
    hive: Services, iris: Checkout, who_sees_it: str
) -> None:
    one = await ask_for(hive, iris.commit(agent__toml=TOML))
    two = await ask_for(hive, iris.commit(CLAUDE__md="Read slowly.\n"))
    before = await hive.approvals.get(two)
    assert "agent.toml" in before.payload["diff"]
    if who_sees_it == "the click":
        hive.gate.cards.serve = trio.sleep_forever  # type: ignore[method-assign]
    async with serving(hive):
        await approve(hive, one)
        if who_sees_it == "the click":
            with refused(f"cannot approve {two}: iris was changed meanwhile, .* look at it again", "conflict"):
                await approve(hive, two)
        else:
            await wait_until(hive.store, lambda: is_other(hive, before))
        with refused(f"cannot approve {two}: it is not what you were shown", "conflict"):
            await hive.gate.approve(two, before.digest, "operator")
        after = await hive.approvals.get(two)
        assert (after.state, after.payload["base"]) == ("pending", (await hive.approvals.get(one)).payload["sha"])
        assert "agent.toml" not in after.payload["diff"]
        assert (await approve(hive, two)).state == "done"
    assert [kind for kind in await hive.kinds() if kind == "approval_changed"] == ["approval_changed"]


async def test_a_card_that_changes_between_the_look_and_the_click_is_not_approved(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    card = await hive.approvals.get(number)
    look = hive.gate.apply_commit.show_now

    async def look_and_change(approval: Approval) -> Shown:
        shown = await look(approval)
        other = Shown({**card.payload, "diff": "another"})
        await hive.store.write(lambda tx: show_again(tx, card, other))
        return shown

    hive.gate.apply_commit.show_now = look_and_change  # type: ignore[method-assign]
    async with serving(hive):
        with refused("it is not what you were shown", "conflict"):
            await approve(hive, number)
    assert (await hive.approvals.get(number)).state == "pending"


async def test_whoever_asked_can_take_it_back_and_nobody_else_can(hive: Services, iris: Checkout) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    with refused(f"cannot cancel approval {number}: you have not asked for it", "not_found"):
        await hive.gate.cancel(number, "no", IRIS)
    assert (await hive.gate.cancel(number, "a better one comes", HM1ND)).state == "cancelled"
    assert (await hive.gate.cancel(number, "again", HM1ND)).note == "a better one comes"
    with refused("whoever asked for it took it back", "conflict"):
        await approve(hive, number)
    with refused("it is cancelled", "conflict"):
        await hive.gate.deny(number, "no", "operator")
    assert not [body for body in await mail_of(hive, "hm1nd") if f"approval {number}," in body]


async def test_what_nobody_decides_expires_and_its_asker_is_told(hive: Services, iris: Checkout) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    card = await hive.approvals.get(number)
    assert card.expires_at_ms == card.requested_at_ms + 7 * 86_400_000
    await hive.let_time_pass(6 * 86_400.0)
    assert (await hive.approvals.get(number)).state == "pending"
    await hive.let_time_pass(86_400.0)
    expired = await hive.approvals.get(number)
    asked = datetime.fromtimestamp(card.requested_at_ms // 1000, UTC)
    why = f"nobody decided it within 7 days (approval_ttl_s); it was asked for at {asked:%Y-%m-%d %H:%M:%S} UTC"
    assert (expired.state, expired.note) == ("expired", why)
    assert f'\nreason: "{why}; ask again if it is still wanted"' in (await mail_of(hive, "hm1nd"))[-1]
    (event,) = [event for event in await newest_events(hive.store, 50) if event["kind"] == "approval_expired"]
    assert event["data"]["note"] == why
    assert f"  note: {why}\n" in show_approval(expired.to_wire()) + "\n"
    with refused("it has expired", "conflict"):
        await approve(hive, number)


async def test_a_click_after_its_time_is_refused_also_before_the_clock_has_looked(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    hive.clock.ahead_s += 7 * 86_400.0  # and nobody looks at what is due
    async with serving(hive):
        with refused("it has expired", "conflict"):
            await approve(hive, number)
    assert (await hive.approvals.get(number)).state == "pending"
    await hive.let_time_pass(0.0)
    assert (await hive.approvals.get(number)).state == "expired"


async def test_a_request_of_an_instant_that_the_clock_has_still_to_reach_waits_as_long_as_ever(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    await hive.let_time_pass(-90 * 86_400.0)
    card = await hive.approvals.get(number)
    assert card.requested_at_ms <= hive.now_ms()
    assert card.expires_at_ms == card.requested_at_ms + 7 * 86_400_000


async def test_a_click_is_recorded_with_who_when_and_from_where(hive: Services, iris: Checkout) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    card = await hive.approvals.get(number)
    async with serving(hive):
        done = await hive.gate.approve(number, card.digest, "operator", "the dashboard, 127.0.0.1")
        again = await hive.gate.approve(number, card.digest, "operator", "host.sock, uid 0")
    assert (done.resolved_by, done.resolved_from) == ("operator", "the dashboard, 127.0.0.1")
    assert done.resolved_at_ms is not None
    assert again == done


async def test_an_older_configuration_does_not_come_back(hive: Services, iris: Checkout) -> None:
    first = iris.head()
    async with serving(hive):
        await approve(hive, await ask_for(hive, iris.commit(agent__toml=TOML)))
    with refused("it is not based on"):
        await ask_for(hive, first)
    iris.git("checkout", "-q", "--orphan", "other")
    with refused("it is not based on"):
        await ask_for(hive, iris.commit())


async def test_what_the_agent_runs_already_is_refused(hive: Services, iris: Checkout) -> None:
    with refused("it is what iris runs already"):
        await ask_for(hive, iris.head())


async def test_a_change_whose_daemon_died_after_the_click_is_finished(tmp_path: Path) -> None:
    for half_done in (False, True):
        state = tmp_path / str(half_done)
        state.mkdir()
        async with open_services(state) as hive, serving(hive):
            await hive.gate.ensure_manager("You manage.")
            await hive.gate.spawn.request(HM1ND, IRIS, "You read.", "r")
            await approve(hive, 1)
            iris = Checkout(state / "proposed" / "iris" / "config")
            first, sha = iris.head(), iris.commit(agent__toml=TOML)
            number = await ask_for(hive, sha)
        async with open_services(state) as hive:
            await click_and_die(hive, number)
            if half_done:
                await hive.repos.deploy(IRIS, number, sha, first)
        async with open_services(state) as hive, serving(hive):
            assert (await approve(hive, number)).state == "done"
            assert (await hive.agents.get("iris")).deployed_sha == sha
            assert tags(hive)[f"deployed/{number}"] == sha


async def test_the_next_daemon_knows_at_once_whose_change_was_taken_and_not_proven(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    card, settings = await hive.approvals.get(number), (await hive.agents.get("iris")).settings or {}
    await click_and_die(hive, number)
    on_trial = hive.gate.walk._reconciler.on_trial
    await hive.gate.load()
    assert on_trial == set()
    await hive.store.write(lambda tx: set_deployed(tx, IRIS, card.payload["sha"], settings))
    await hive.gate.load()
    assert on_trial == {IRIS}
    on_trial.clear()
    await hive.store.write(lambda tx: note_proof(tx, card, "healthy"))
    await hive.gate.load()
    assert on_trial == set()


async def test_a_lock_that_a_killed_git_left_fails_the_approval_and_not_the_daemon(
    hive: Services, iris: Checkout
) -> None:
    number = await ask_for(hive, iris.commit(agent__toml=TOML))
    (hive.state_dir / "applied" / "iris.git" / "refs" / "heads" / "main.lock").touch()
    async with serving(hive):
        failed = await approve(hive, number)
        assert failed.state == "failed"
        assert "main.lock" in (failed.note or "")
        assert (await approve(hive, await ask_for_argus(hive))).state == "done"


async def test_a_change_of_an_unknown_agent_is_refused(hive: Services) -> None:
    with refused("cannot find argus", "not_found"):
        await hive.gate.apply_commit.request(HM1ND, ARGUS, CommitSha("0" * 40), "r")


async def test_a_commit_that_is_not_there_is_refused_with_the_way_out(hive: Services, iris: Checkout) -> None:
    with refused("cannot fetch 0000.*commit it first"):
        await ask_for(hive, "0" * 40)
    assert await hive.approvals.pending() == []


# -- what a commit may hold -------------------------------------------------------------------------------------------


def a_link(checkout: Checkout) -> CommitSha:
    (checkout.path / "CLAUDE.md").unlink()
    (checkout.path / "CLAUDE.md").symlink_to("/etc/passwd")
    return checkout.commit()


def a_submodule(checkout: Checkout) -> CommitSha:
    checkout.git("update-index", "--cacheinfo", f"160000,{checkout.head()},CLAUDE.md")
    return checkout.commit_index()


def a_folder(checkout: Checkout) -> CommitSha:
    (checkout.path / "CLAUDE.md").unlink()
    (checkout.path / "CLAUDE.md").mkdir()
    (checkout.path / "CLAUDE.md" / "x").touch()
    return checkout.commit()


def a_link_named(name: str, target: str = "CLAUDE.md") -> Callable[[Checkout], CommitSha]:
    def make(checkout: Checkout) -> CommitSha:
        (checkout.path / name).symlink_to(target)
        return checkout.commit()

    return make


def a_missing_file(checkout: Checkout) -> CommitSha:
    (checkout.path / "CLAUDE.md").unlink()
    return checkout.commit()


def a_tag_object(checkout: Checkout) -> CommitSha:
    checkout.commit(agent__toml=TOML)
    checkout.git("tag", "-a", "-m", "a tag", "v1")
    return CommitSha(checkout.git("rev-parse", "v1"))


def a_tree(checkout: Checkout) -> CommitSha:
    return CommitSha(checkout.git("rev-parse", "HEAD^{tree}"))


def a_strange_name(checkout: Checkout) -> CommitSha:
    Path(os.fsdecode(os.fsencode(checkout.path) + b"/\xff\n\x1b[31m")).touch()
    return checkout.commit()


DEPLOYABLE = {
    "link": (a_link, "CLAUDE.md is a symbolic link; only regular files in directories are deployed"),
    "submodule": (a_submodule, "CLAUDE.md is a submodule; only regular files in directories are deployed"),
    "folder": (a_folder, "CLAUDE.md is missing"),
    "missing": (a_missing_file, "CLAUDE.md is missing"),
    "nix": (lambda checkout: checkout.commit(agent__nix="{ }"), "it changes agent.nix, and only containers of sandbox"),
    "nix link": (a_link_named("agent.nix"), "agent.nix is a symbolic link"),
    "link to a folder": (a_link_named("skills", ".."), "skills is a symbolic link"),
    "huge lock": (lambda checkout: checkout.commit(flake__lock="x" * (FILE_LIMIT_BYTES + 1)), "flake.lock is over the"),
    "nix that no card could show": (lambda checkout: checkout.commit(agent__nix="{ }\0"), "agent.nix holds a NUL"),
    "flake that no card could show": (
        lambda checkout: checkout.commit(flake__nix=b"\xff"),
        "flake.nix: it is not UTF-8",
    ),
    "nix of another case": (
        lambda checkout: checkout.commit(Agent__nix="{ }", agent__nix="{ }"),
        "Agent.nix and agent.nix differ by case at most",
    ),
    "attributes": (lambda checkout: checkout.commit(__gitattributes="* diff=x"), "it holds '.gitattributes'"),
    "strange": (a_strange_name, "it holds .*, a name that is not UTF-8"),
    "huge": (lambda checkout: checkout.commit(CLAUDE__md="x" * (READ_LIMIT_BYTES + 1)), "CLAUDE.md is over the limit"),
    "long prompt": (
        lambda checkout: checkout.commit(CLAUDE__md="x" * (PERSONA_LIMIT_BYTES + 1)),
        "the CLAUDE.md: it has",
    ),
    "empty prompt": (lambda checkout: checkout.commit(CLAUDE__md="\n"), "CLAUDE.md: it is empty"),
    "binary prompt": (lambda checkout: checkout.commit(CLAUDE__md=b"\xff\xfe"), "CLAUDE.md: it is not UTF-8"),
    "NUL": (lambda checkout: checkout.commit(CLAUDE__md="a\0b"), "NUL"),
    "bad toml": (lambda checkout: checkout.commit(agent__toml="model ="), r"cannot read agent\.toml"),
    "binary toml": (lambda checkout: checkout.commit(agent__toml=b"\xff"), r"agent\.toml: it is not UTF-8"),
    "deep toml": (lambda checkout: checkout.commit(agent__toml="a = " + "[" * 30_000), r"cannot read agent\.toml"),
    "long number": (lambda checkout: checkout.commit(agent__toml="a = " + "9" * 5_000), r"cannot read agent\.toml"),
    "unknown key": (lambda checkout: checkout.commit(agent__toml=TOML + "sudo = true\n"), "sudo: unknown key"),
    "bad value": (lambda checkout: checkout.commit(agent__toml='program = "sh"\n'), "program: "),
    "bad tool": (lambda checkout: checkout.commit(agent__toml='tools = ["--x"]\n'), r"tools\.0: "),
    "tag": (a_tag_object, "is not a commit"),
    "tree": (a_tree, "is not a commit"),
}


@pytest.mark.parametrize("case", DEPLOYABLE)
async def test_a_commit_that_holds_anything_else_is_refused_by_name_and_leaves_no_approval(
    hive: Services, iris: Checkout, case: str
) -> None:
    make, words = DEPLOYABLE[case]
    sha = make(iris)  # type: ignore[operator]
    before = await hive.kinds()
    with refused(words):
        await ask_for(hive, sha)
    assert await hive.approvals.pending() == []
    assert await hive.kinds() == before
    assert list(tags(hive)) == ["deployed/0"]


async def test_what_nix_would_build_is_carried_along_where_it_does_not_count(hive: Services, iris: Checkout) -> None:
    """A hive whose agents were in NixOS containers goes on with what their repositories hold."""
    with_nix = iris.commit(agent__nix="{ }", flake__nix="{ }")
    await hive.repos.fetch(IRIS, with_nix)
    await hive.repos.deploy(IRIS, 77, with_nix, (await hive.agents.get("iris")).deployed_sha)
    later = iris.commit(agent__toml=TOML, flake__lock="{ }")
    number = await ask_for(hive, later)
    assert "+{ }" in (await hive.approvals.get(number)).payload["diff"]
    async with serving(hive):
        assert (await approve(hive, number)).state == "done"
    with refused("it changes agent.nix"):
        await ask_for(hive, iris.commit(agent__nix="{ ... }: { }"))
    (iris.path / "agent.nix").unlink()
    assert await ask_for(hive, iris.commit()) > number


async def test_a_diff_that_is_too_long_to_read_is_refused_with_the_limit(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert DIFF_LIMIT_BYTES >= 2 * FILE_LIMIT_BYTES
    monkeypatch.setattr("hive_core.git.proposals.DIFF_LIMIT_BYTES", 100)
    with refused("its diff is over 100 bytes; split it"):
        await ask_for(hive, iris.commit(CLAUDE__md="Read slowly.\n" * 20))


async def test_the_diff_shows_every_line_that_changes(hive: Services, iris: Checkout) -> None:
    text = "".join(f"line {n}\n" for n in range(500))
    sha = iris.commit(CLAUDE__md=text, agent__toml=TOML)
    diff = (await hive.approvals.get(await ask_for(hive, sha))).payload["diff"]
    assert all(f"\n+line {n}\n" in f"{diff}\n" for n in range(500))
    assert '+model = "opus"' in diff
