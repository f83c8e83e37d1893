"""What was deployed, who set what, and the way back: by the gate and real git."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.procedures.deployments import Change, PlainDeployments
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, parse_deployed_tag
from hive_core.sockets.admin import AdminDesk
from tests.checkouts import Checkout
from tests.dashboards import hive_of
from tests.git.test_gate import approve, mail_of, serving
from tests.hives import Services, open_services, run_hive, serve

IRIS = AgentName("iris")


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """hm1nd and iris, served by nobody."""
    async with open_services(tmp_path) as services, serving(services):
        await services.gate.ensure_manager("You manage.")
        number = (await services.gate.spawn.request(MANAGER, IRIS, "You read.", "a reader"))["approval"]
        await approve(services, number)
        yield services


async def change(hive: Services, **files: str) -> Any:
    """A change of iris, carried out."""
    sha = Checkout(hive.repos.proposed_dir / "iris" / "config").commit(**files)
    asked = await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "a change")
    return await approve(hive, asked["approval"])


async def roll_back(hive: Services, tag: str | None = None) -> Any:
    tag = tag or await hive.gate.deploy_log.former(IRIS)
    asked = await hive.gate.apply_commit.request_back(IRIS, tag, "it was better before")
    return await approve(hive, asked["approval"])


async def model(hive: Services) -> str:
    agent = await hive.agents.get(IRIS)
    assert agent.settings is not None
    return str(agent.settings["model"])


OPUS, HAIKU = (f'program = "rehearsal"\nmodel = "{name}"\n' for name in ("opus", "haiku"))


async def test_a_rollback_is_a_commit_of_its_own_that_the_same_gate_shows_and_another_one_undoes_it(
    hive: Services,
) -> None:
    await change(hive, agent__toml=OPUS)
    await change(hive, agent__toml=HAIKU)
    main = await hive.repos.main(IRIS)
    back = await roll_back(hive)
    assert (back.state, back.kind, back.payload["back"]) == ("done", "apply_commit", "deployed/2")
    assert await model(hive) == "opus"
    assert back.payload["base"] == main
    assert back.payload["sha"] not in (main, await hive.repos.tagged(IRIS, "deployed/2"))
    assert '-model = "haiku"\n+model = "opus"' in back.payload["diff"]
    assert back.proof == "unproven: it is not served now"
    again = await roll_back(hive)
    assert (again.payload["back"], await model(hive)) == ("deployed/3", "haiku")
    first = await roll_back(hive, "deployed/0")
    assert (first.state, await model(hive)) == ("done", "sonnet")


async def test_a_rollback_that_is_shown_anew_is_one_still(hive: Services) -> None:
    await change(hive, agent__toml=OPUS)
    number = (await hive.gate.apply_commit.request_back(IRIS, "deployed/0"))["approval"]
    older = '{"lines": [], "unknown": [], "inputs": "those of another day"}'
    await hive.sql("UPDATE approvals SET effect = ?, digest = 'of another day' WHERE id = ?", older, number)
    with pytest.raises(Refusal, match="look at it again"):
        await approve(hive, number)
    card = await hive.approvals.get(number)
    assert (card.state, card.payload["back"]) == ("pending", "deployed/0")
    assert [line["what"] for line in (card.effect or {})["lines"]] == ["model"]


async def test_what_is_deployed_already_or_never_was_is_no_way_back(hive: Services) -> None:
    with pytest.raises(Refusal, match="it runs on its first commit"):
        await roll_back(hive)
    with pytest.raises(Refusal, match="iris has no tag 'deployed/7'; `hive history iris` shows them"):
        await roll_back(hive, "deployed/7")
    with pytest.raises(Refusal, match="it runs on the same files now"):
        await roll_back(hive, "deployed/0")
    assert await hive.approvals.pending() == []


async def test_a_way_back_that_is_refused_leaves_one_event(hive: Services, tmp_path: Path) -> None:
    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        for words in (["iris"], ["iris", "--to", "main"], ["nobody", "--to", "deployed/0"]):
            before = await hive.kinds()
            done = await run_hive(tmp_path, "rollback", *words)
            assert (await hive.kinds())[len(before) :] == ["approval_refused"], done.stderr
    assert await hive.approvals.pending() == []


@pytest.mark.parametrize("tag", ["deployed/", "deployed/1\n", "deployed/../x", "proposal/1", "deployed/²", None, 3])
def test_only_the_tag_of_a_deployment_names_one(tag: object) -> None:
    with pytest.raises(Refusal, match="give deployed/ID"):
        parse_deployed_tag(tag)


async def test_the_manager_goes_on_from_a_rollback_by_the_bundle_that_lies_beside_the_repository(
    hive: Services,
) -> None:
    await change(hive, agent__toml=OPUS)
    await roll_back(hive)
    (told,) = [body for body in await mail_of(hive, MANAGER) if body.startswith("rebuilt")]
    assert "with the files of deployed/0 again; what you propose next is to begin there: `git fetch /agents/" in told
    with pytest.raises(Refusal, match="it is not based on"):
        await change(hive, agent__toml=HAIKU)
    checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
    checkout.git("fetch", "-q", "../deployed.bundle", "main")
    checkout.git("reset", "-q", "--hard", "FETCH_HEAD")
    assert (await change(hive, agent__toml=HAIKU)).state == "done"
    assert await model(hive) == "haiku"


async def test_the_bundle_brings_every_commit_of_the_hives_own_however_many_came_since(hive: Services) -> None:
    await change(hive, agent__toml=OPUS)
    await roll_back(hive)
    await roll_back(hive)
    checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
    with pytest.raises(Refusal, match=r"`git fetch \.\./deployed\.bundle main` where git does not know that"):
        await change(hive, agent__toml=HAIKU)
    checkout.git("reset", "-q", "--hard", "HEAD~")
    checkout.git("pull", "-q", "--rebase", "../deployed.bundle", "main")
    assert (await change(hive, agent__toml=HAIKU)).state == "done"


async def test_what_the_manager_puts_in_the_way_of_the_bundle_hinders_no_rollback(
    hive: Services, tmp_path: Path
) -> None:
    await change(hive, agent__toml=OPUS)
    beside, elsewhere = hive.repos.proposed_dir / "iris", tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (beside / ".deployed.bundle.new").symlink_to(elsewhere)
    (beside / "deployed.bundle").mkdir()
    (beside / "deployed.bundle" / "full").touch()
    assert (await roll_back(hive)).state == "done"
    assert elsewhere.read_text() == "mine"


async def test_the_history_tells_what_was_deployed_and_what_failed_and_which_runs(hive: Services) -> None:
    done = await change(hive, agent__toml=OPUS)
    held = hive.state_dir / "applied/iris.git/refs/heads/main.lock"
    held.touch()
    failed = await change(hive, agent__toml=HAIKU)
    held.unlink()
    log = await hive.gate.deploy_log.of(IRIS)
    assert [(row.id, row.state, row.tag, row.runs) for row in log] == [
        (failed.id, "failed", f"failed/{failed.id}", False),
        (done.id, "done", f"deployed/{done.id}", True),
        (1, "done", "deployed/0", False),
    ]
    assert "cannot use the repository of iris" in (log[0].note or "")
    assert (log[1].by, log[1].requested_by, log[1].reason) == (OPERATOR, MANAGER, "a change")
    assert log[2].sha == await hive.repos.tagged(IRIS, "deployed/0")
    (first,) = await hive.gate.deploy_log.of(MANAGER)
    assert (first.id, first.tag, first.by, first.runs) == (None, "deployed/0", "system", True)
    with pytest.raises(Refusal, match="cannot find nobody: no agent has that name"):
        await hive.gate.deploy_log.of(AgentName("nobody"))


class Halfway(PlainDeployments):
    """Of which nothing is settled until it is let go."""

    reached, go_on = trio.Event(), trio.Event()

    async def settle(self, change: Change) -> None:
        self.reached.set()
        await self.go_on.wait()
        await super().settle(change)


async def test_the_history_tells_what_runs_also_while_that_is_on_trial(tmp_path: Path) -> None:
    Halfway.go_on = trio.Event()
    Halfway.go_on.set()

    def deployments(*parts: Any) -> Halfway:
        return Halfway(*parts, sandbox="bwrap")

    async with open_services(tmp_path, deployments=deployments) as hive, serving(hive):
        await hive.gate.ensure_manager("You manage.")
        await approve(hive, (await hive.gate.spawn.request(MANAGER, IRIS, "You read.", "a reader"))["approval"])
        assert [row.tag for row in await hive.gate.deploy_log.of(IRIS) if row.runs] == ["deployed/0"]
        Halfway.reached, Halfway.go_on = trio.Event(), trio.Event()
        sha = Checkout(hive.repos.proposed_dir / "iris" / "config").commit(agent__toml=OPUS)
        number = (await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "a change"))["approval"]
        card = await hive.approvals.get(number)
        await hive.gate.approve(number, card.digest, OPERATOR, patience_s=0)
        await Halfway.reached.wait()
        trial, before = await hive.gate.deploy_log.of(IRIS)
        assert (trial.id, trial.state, trial.tag, trial.sha, trial.runs) == (number, "approved", None, sha, True)
        assert (trial.note, before.tag, before.runs) == ("proving", "deployed/0", False)
        async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
            told = (await run_hive(tmp_path, "history", "iris")).stdout.decode().splitlines()[0]
        assert told.endswith(f"  on trial (approval {number})  {sha[:12]}  by operator for hm1nd  proving ← runs")
        with pytest.raises(Refusal, match="it runs on its first commit"):
            await hive.gate.deploy_log.former(IRIS)
        Halfway.go_on.set()
        await hive.approvals.wait_settled(number)
        done, _ = await hive.gate.deploy_log.of(IRIS)
        assert (done.state, done.tag, done.runs) == ("done", f"deployed/{number}", True)


async def test_the_history_tells_what_runs_also_when_that_is_older_than_all_that_is_asked_for(hive: Services) -> None:
    done = await change(hive, agent__toml=OPUS)
    held = hive.state_dir / "applied/iris.git/refs/heads/main.lock"
    held.touch()
    failed = await change(hive, agent__toml=HAIKU)
    held.unlink()
    log = await hive.gate.deploy_log.of(IRIS, 1)
    assert [(row.id, row.state, row.runs) for row in log] == [(failed.id, "failed", False), (done.id, "done", True)]


async def test_what_was_seeded_is_traced_to_its_card_and_is_no_way_back(hive: Services) -> None:
    argus = AgentName("argus")
    seeded = (await hive.gate.init_config.request(MANAGER, argus, "You watch.", "eyes"))["approval"]
    await approve(hive, seeded)
    sha = Checkout(hive.repos.proposed_dir / "argus" / "config").commit(CLAUDE__md="You watch the door.\n")
    created = (await hive.gate.apply_commit.request(OPERATOR, argus, sha, "shaped"))["approval"]
    assert (await approve(hive, created)).state == "done"
    log = await hive.gate.deploy_log.of(argus)
    assert [(row.id, row.what, row.tag, row.requested_by, row.runs) for row in log] == [
        (created, "apply_commit", f"deployed/{created}", OPERATOR, True),
        (seeded, "init_config", "deployed/0", MANAGER, False),
    ]
    assert (await hive.gate.deploy_log.blame(argus, "model"))["id"] == seeded
    assert (await hive.gate.deploy_log.blame(argus, "CLAUDE.md:1"))["id"] == created
    with pytest.raises(Refusal, match="it runs on its first commit"):
        await hive.gate.deploy_log.former(argus)


async def test_a_line_is_counted_as_git_counts_it(hive: Services) -> None:
    await change(hive, CLAUDE__md="one\x0cstill one\u2028and still\ntwo\n")
    assert (await hive.gate.deploy_log.blame(IRIS, "CLAUDE.md:2"))["value"] == "two"


async def test_a_setting_and_a_line_are_traced_to_the_approval_that_set_them(hive: Services) -> None:
    await change(hive, agent__toml=OPUS, CLAUDE__md="one\ntwo\nthree\n")
    await change(hive, agent__toml=OPUS + '[env]\nEDITOR = "ed"\n', CLAUDE__md="zero\none\ntwo\n3\n")
    log = hive.gate.deploy_log

    async def blamed(key: str) -> tuple[object, object]:
        found = await log.blame(IRIS, key)
        return found["id"], found["value"]

    assert await blamed("model") == (2, "opus")
    assert await blamed("program") == (1, "rehearsal")
    assert await blamed("env.EDITOR") == (3, "ed")
    assert [await blamed(f"CLAUDE.md:{line}") for line in (1, 2, 3, 4)] == [
        (3, "zero"),
        (2, "one"),
        (2, "two"),
        (3, "3"),
    ]
    await roll_back(hive, "deployed/2")
    assert await blamed("CLAUDE.md:3") == (4, "three")
    for key, why in [
        ("effort", "agent.toml does not set it"),
        ("CLAUDE.md:99", "has 3 lines"),
        ("nothing.md:1", "holds no 'nothing.md'"),
    ]:
        with pytest.raises(Refusal, match=why):
            await log.blame(IRIS, key)


async def test_of_another_agent_that_had_the_name_nothing_is_told_and_nothing_comes_back(hive: Services) -> None:
    await change(hive, agent__toml=OPUS)
    first_of_all = await hive.repos.main(IRIS)
    destruction = hive_of(hive).destruction

    async def rows() -> list[tuple[int | None, str, bool]]:
        return [(row.id, row.what, row.runs) for row in await hive.gate.deploy_log.of(IRIS)]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(destruction.serve)
        await destruction.destroy(IRIS, at_once=False)
        number = (await hive.gate.spawn.request(MANAGER, IRIS, "You write.", "a writer"))["approval"]
        await approve(hive, number)
        assert await rows() == [(number, "spawn", True)]
        with pytest.raises(Refusal, match="it runs on its first commit"):
            await roll_back(hive)
        assert (await hive.gate.deploy_log.blame(IRIS, "model"))["id"] == number
        done = await change(hive, agent__toml=HAIKU)
        for against in ("approved", "previous"):
            with pytest.raises(Refusal, match=r"no commit was (approved|proposed) for iris before it"):
                await hive.gate.apply_commit.diff(done, against)
        assert await rows() == [(done.id, "apply_commit", True), (number, "spawn", False)]
        await destruction.destroy(IRIS, at_once=False)
        with pytest.raises(Refusal, match=r"cannot find iris: it is destroyed; .*`hive revive iris` brings it back"):
            await rows()
        one, *_ = [each.label for each in await hive_of(hive).tombstones.all()][::-1]
        await destruction.revive(one)
        assert await rows() == [(2, "apply_commit", True), (1, "spawn", False)]
        assert await hive.repos.main(IRIS) == first_of_all
        again = await change(hive, agent__toml=HAIKU)
        for against in ("approved", "previous"):
            assert (await hive.gate.apply_commit.diff(again, against))["base"] == first_of_all
        nursery.cancel_scope.cancel()
