"""The walk of a change where containers are built from agents' flakes, by real nix and real git."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from hive_core.containers.mounts import agent_dirs
from hive_core.destinations import TUNNEL
from hive_core.procedures import gate
from hive_core.procedures.deployments import Change
from hive_core.procedures.flake_deployments import CHECKS_WAITING, FlakeDeployments
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.together import Click, Together
from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, CommitSha, StorePath
from hive_core.services.approvals import Approval, settle
from hive_core.services.systems import system_of
from hive_core.services.tombstones import Tombstones, forget, keep
from hive_core.store.bus import APPROVED
from tests.checkouts import Checkout
from tests.hives import Services, open_services, wait_until
from tests.nix.house import House, mended, nothing, serving, with_nixpkgs
from tests.scripted_driver import ScriptedDriver


class ForgettingDriver(ScriptedDriver):
    """Nothing runs, and of a destroyed agent there is no container any more."""

    def __init__(self, house: House) -> None:
        super().__init__()
        self._house = house

    async def destroy(self, name: AgentName) -> None:
        kept = json.loads(self._house.systems.file.read_text())
        self._house.systems.file.write_text(json.dumps({who: what for who, what in kept.items() if who != name}))


HM1ND, IRIS = AgentName("hm1nd"), AgentName("iris")
MORE = """
{ pkgs, ... }:
{
  hyperhive.settings = fromTOML (builtins.readFile ./agent.toml);
  hyperhive.persona = "Read.";
  %s
}
"""
HAIKU = 'program = "rehearsal"\nmodel = "haiku"\n'
OPUS = MORE % 'hyperhive.effort = "high"; environment.systemPackages = [ pkgs.strace ];'


@pytest.fixture
def house(tmp_path: Path, hyperhive: Path, store: Path) -> House:
    return House(tmp_path / "state", hyperhive, store)


@pytest.fixture
async def hive(house: House) -> AsyncIterator[Services]:
    """hm1nd and iris, built."""
    house.folder.mkdir()
    async with house.open() as services, serving(services):
        await mended(services, HM1ND)
        assert (await spawn(services)).state == "done"
        yield services


async def spawn(services: Services, name: AgentName = IRIS) -> Approval:
    number = (await services.gate.spawn.request(OPERATOR, name, "You read.", "a reader"))["approval"]
    return await approve(services, number)


async def approve(services: Services, number: int) -> Approval:
    card = await services.approvals.get(number)
    return await services.gate.approve(number, card.digest, OPERATOR)


async def ask(services: Services, sha: CommitSha, name: AgentName = IRIS) -> int:
    return (await services.gate.apply_commit.request(HM1ND, name, sha, "a change"))["approval"]


def checkout(services: Services, name: str = IRIS) -> Checkout:
    return Checkout(services.repos.proposed_dir / name / "config")


def lock(house: House) -> dict[str, str]:
    """The commit of each agent that the meta flake has."""
    nodes = json.loads((house.folder / "meta" / "flake.lock").read_text())["nodes"]
    return {name.removeprefix("agent-"): node["locked"]["rev"] for name, node in nodes.items() if "agent-" in name}


async def what_is(services: Services, house: House, name: AgentName = IRIS) -> dict[str, object]:
    """Everything of an agent that a change may touch, which a change that failed has to leave."""
    agent = await services.agents.get(name)
    return {
        "sha": agent.deployed_sha,
        "settings": agent.settings,
        "current": await house.systems.current(name),
        "row": await system_of(services.store, name),
        "meta": house.tree(),
        "status": house.git("status", "--porcelain"),
        "log": house.log(),
    }


# -- what goes well ---------------------------------------------------------------------------------------------------


async def test_a_new_agent_is_built_before_it_is_one_and_its_flake_is_in_its_first_commit(
    house: House, hive: Services
) -> None:
    card = await hive.approvals.get(1)
    assert sorted(card.payload["files"]) == ["CLAUDE.md", "agent.nix", "agent.toml", "flake.nix"]
    iris = await hive.agents.get(IRIS)
    assert iris.settings is not None
    assert iris.settings["prompt"] == card.payload["files"]["CLAUDE.md"]
    assert house.systems.done == [("build", HM1ND), ("switch", HM1ND), ("build", IRIS), ("switch", IRIS)]
    assert house.log()[0] == "iris: deployed/0"
    assert lock(house) == {"hm1nd": (await hive.agents.get(HM1ND)).deployed_sha, "iris": iris.deployed_sha}
    assert hive.gate.hindrance(IRIS) is None
    held = [path.name for path in checkout(hive).path.iterdir() if path.is_file()]
    assert sorted(held) == sorted(card.payload["files"])


async def test_what_agent_nix_says_is_shown_and_is_what_the_agent_runs_on(house: House, hive: Services) -> None:
    before = await house.systems.current(IRIS)
    sha = checkout(hive).commit(agent__nix=OPUS)
    number = await ask(hive, sha)
    diff = (await hive.approvals.get(number)).payload["diff"]
    assert "+++ b/agent.nix" in diff
    assert '+  hyperhive.persona = "Read.";' in diff
    assert (await hive.agents.get(IRIS)).deployed_sha != sha
    assert (await approve(hive, number)).state == "done"
    iris = await hive.agents.get(IRIS)
    assert iris.settings is not None
    assert (iris.deployed_sha, iris.settings["effort"], iris.settings["prompt"]) == (sha, "high", "Read.")
    assert await house.systems.current(IRIS) not in (before, None)
    assert house.log()[0] == f"iris: deployed/{number}"
    assert lock(house)["iris"] == sha
    assert house.git("status", "--porcelain") == ""
    row = await system_of(hive.store, IRIS)
    assert row is not None
    assert (row.sha, row.path) == (sha, await house.systems.current(IRIS))


async def test_agent_nix_sees_the_whole_tree_that_was_shown_as_git_holds_it(house: House, hive: Services) -> None:
    """Also what lies in folders, and whatever git would substitute or leave out where attributes could say so."""
    repository = checkout(hive)
    for name, text in {"modules/more.nix": OPUS, "skills/read/SKILL.md": "$Format:%H$ $Id$\r\n"}.items():
        (path := repository.path / name).parent.mkdir(parents=True)
        path.write_bytes(text.encode().replace(b"./agent.toml", b"../agent.toml"))
    persona = "builtins.readFile ./skills/read/SKILL.md"
    module = f"{{ lib, ... }}: {{ imports = [ ./modules/more.nix ]; hyperhive.persona = lib.mkForce ({persona}); }}"
    number = await ask(hive, repository.commit(agent__nix=module))
    card = await hive.approvals.get(number)
    assert "+++ b/modules/more.nix" in card.payload["diff"]
    assert "+++ b/skills/read/SKILL.md" in card.payload["diff"]
    assert (await approve(hive, number)).state == "done"
    settings = (await hive.agents.get(IRIS)).settings or {}
    assert (settings["prompt"], settings["effort"]) == ("$Format:%H$ $Id$\r\n", "high")


async def test_a_daemon_that_starts_again_builds_nothing_that_is_as_it_was_deployed(
    house: House, hive: Services
) -> None:
    built = list(house.systems.done)
    async with house.open() as again, serving(again):
        assert again.gate.hindrance(IRIS) == "its container is being built"
        await mended(again, HM1ND, IRIS)
    assert house.systems.done == built


async def test_a_container_that_somebody_took_away_or_switched_is_built_again(house: House, hive: Services) -> None:
    ours = await house.systems.current(IRIS)
    house.systems.file.write_text(json.dumps({"iris": ["/nix/store/somebody-elses"]}))
    async with house.open() as again, serving(again):
        await mended(again, HM1ND)
        with again.store.bus.listen("deployed") as listener:
            while await house.systems.current(IRIS) != ours:
                await listener.wait()
    assert await house.systems.current(HM1ND)


async def test_another_release_of_hyperhive_reaches_every_container(
    house: House, hive: Services, tmp_path: Path
) -> None:
    copied = tmp_path / "newer"
    shutil.copytree(house.sources.hyperhive, copied)
    with (copied / "hive_core/protocol/__init__.py").open("a") as code:
        code.write("# newer\n")
    newer = House(house.folder, copied, Path(str(house.nix._store)))
    async with newer.open() as again, serving(again):
        await again.store.row("SELECT 1")
        with again.store.bus.listen("deployed") as listener:
            while {(await system_of(again.store, name)).inputs for name in (HM1ND, IRIS)} != {newer.meta.inputs}:  # type: ignore[union-attr]
                await listener.wait()
    assert [step for step in newer.systems.done if step[0] == "build"] == [("build", HM1ND), ("build", IRIS)]
    assert str(copied) in newer.tree()[str(house.folder / "meta/flake.nix")].decode()


async def test_an_agent_that_comes_back_from_its_tombstone_is_built_again(house: House, hive: Services) -> None:
    iris, tombstones, away = await hive.agents.get(IRIS), Tombstones(hive.store), house.folder / "away"
    applied = house.folder / "applied" / "iris.git"
    tombstone = await tombstones.destroy(IRIS, OPERATOR, at_once=True)
    applied.rename(away)
    house.systems.file.write_text("{}")  # as the driver forgets it
    await hive.store.write(lambda tx: keep(tx, tombstone, 0))
    assert await system_of(hive.store, IRIS) is None
    assert (await spawn(hive, AgentName("argus"))).state == "done"
    assert "iris" not in lock(house)
    with hive.store.bus.listen("wanted") as listener:
        await tombstones.revive(tombstone, OPERATOR, range(8100, 8200))
        # What is deployed meanwhile lets it be looked at while its files are not back.
        sha = checkout(hive, "argus").commit(agent__toml="")
        assert (await approve(hive, await ask(hive, sha, AgentName("argus")))).state == "done"
        while "cannot be built" not in (hive.gate.hindrance(IRIS) or ""):
            await listener.wait()
    away.rename(applied)
    await hive.store.write(lambda tx: forget(tx, tombstone, "revived", OPERATOR))
    await mended(hive, IRIS)
    assert await house.systems.current(IRIS)
    assert lock(house)["iris"] == iris.deployed_sha


class Builds:
    """Builds that begin, and come to their end when they may."""

    def __init__(self, house: House) -> None:
        self.begun: list[AgentName] = []
        self.may_end = trio.Event()
        self._send, self._receive = trio.open_memory_channel[AgentName](10)
        self._build = house.systems.build
        house.systems.build = self.build

    async def build(self, name: AgentName, derivation: StorePath) -> StorePath:
        self.begun.append(name)
        self._send.send_nowait(name)
        await self.may_end.wait()
        built: StorePath = await self._build(name, derivation)
        return built

    async def next(self) -> AgentName:
        return await self._receive.receive()


async def test_what_needs_no_build_is_done_while_as_many_are_built_as_may_be(house: House, hive: Services) -> None:
    argus = AgentName("argus")
    hive.gate._deployments._building.total_tokens = 1  # type: ignore[attr-defined]
    change = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    new = (await hive.gate.spawn.request(OPERATOR, argus, "You watch.", "a watcher"))["approval"]
    settings = await ask(hive, checkout(hive, HM1ND).commit(agent__toml=HAIKU), HM1ND)
    builds, before = Builds(house), await house.systems.current(HM1ND)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(approve, hive, change)
        assert await builds.next() == IRIS
        nursery.start_soon(approve, hive, new)
        assert (await approve(hive, settings)).state == "done"
        assert ((await hive.agents.get(HM1ND)).settings or {})["model"] == "haiku"
        assert await house.systems.current(HM1ND) == before
        assert builds.begun == [IRIS]
        builds.may_end.set()
    assert [(await hive.approvals.get(card)).state for card in (change, new)] == ["done", "done"]
    assert builds.begun == [IRIS, argus]
    assert lock(house) == {name: (await hive.agents.get(name)).deployed_sha for name in (HM1ND, IRIS, argus)}


async def test_what_is_logged_while_the_rows_of_a_new_agent_are_not_written_yet_has_that_agent_too(
    house: House, hive: Services
) -> None:
    argus, deployments = AgentName("argus"), hive.gate._deployments
    settle, settled, may_go_on = deployments.settle, trio.Event(), trio.Event()
    change = await ask(hive, checkout(hive).commit(agent__toml=HAIKU))

    async def settle_and_wait(change: Change) -> None:
        await settle(change)
        if change.agent == argus:
            settled.set()
            await may_go_on.wait()

    deployments.settle = settle_and_wait  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(spawn, hive, argus)
        await settled.wait()
        assert (await approve(hive, change)).state == "done"
        may_go_on.set()
    assert lock(house) == {name: (await hive.agents.get(name)).deployed_sha for name in (HM1ND, IRIS, argus)}


async def test_a_change_of_an_agent_is_not_approved_while_another_one_is_built(house: House, hive: Services) -> None:
    repository = checkout(hive)
    base = repository.head()
    first = await ask(hive, repository.commit(agent__nix=OPUS))
    repository.git("reset", "--quiet", "--hard", base)
    second = await ask(hive, repository.commit(agent__nix=OPUS.replace("Read.", "Write.")))
    builds = Builds(house)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(approve, hive, first)
        assert await builds.next() == IRIS
        with pytest.raises(Refusal, match=rf"approval {first} changes iris now \(building\); once that is over"):
            await approve(hive, second)
        builds.may_end.set()
    failed = await wait_until(hive.store, lambda: is_failed(hive, second))
    assert (await hive.approvals.get(first)).state == "done"
    assert "which iris runs; rebase it" in (failed.note or "")
    assert builds.begun == [IRIS]


async def is_failed(hive: Services, number: int) -> Approval | None:
    found = await hive.approvals.get(number)
    return found if found.state == "failed" else None


async def test_checks_that_wait_are_bounded(hive: Services) -> None:
    proposal, said = await hive.repos.fetch(IRIS, checkout(hive).commit(agent__nix=OPUS)), list[str]()

    async def check_once() -> None:
        try:
            await hive.gate._deployments.check(IRIS, proposal)
            said.append("good")
        except Refusal as refusal:
            said.append(refusal.message)

    async with trio.open_nursery() as nursery:
        for _ in range(CHECKS_WAITING + 3):
            nursery.start_soon(check_once)
    assert said.count("good") == CHECKS_WAITING + 1
    refused = f"{CHECKS_WAITING} others wait to be evaluated; ask again in a minute"
    assert said.count(f"cannot check {proposal.sha[:12]} of iris: {refused}") == 2


# -- a hive that changes what its agents run in -----------------------------------------------------------------------


async def test_agents_of_a_hive_without_nix_go_on_as_nixos_containers_and_back(house: House) -> None:
    house.folder.mkdir()
    async with open_services(house.folder) as plain, serving(plain):
        await plain.gate.ensure_manager("You manage.")
        assert (await spawn(plain)).state == "done"
        first = await plain.agents.get(IRIS)
        with pytest.raises(Refusal, match="it changes agent"):
            await ask(plain, checkout(plain).commit(agent__nix=OPUS))
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND, IRIS)
        same = await hive.agents.get(IRIS)
        assert (same.deployed_sha, same.settings) == (first.deployed_sha, first.settings)
        # What was refused a moment ago is fine now.
        assert (await approve(hive, await ask(hive, checkout(hive).head()))).state == "done"
        assert ((await hive.agents.get(IRIS)).settings or {})["effort"] == "high"
    async with open_services(house.folder) as plain, serving(plain):
        with plain.store.bus.listen("deployed") as listener:
            while "effort" in ((await plain.agents.get(IRIS)).settings or {}):
                await listener.wait()
        assert await system_of(plain.store, IRIS) is None
    async with house.open() as hive, serving(hive):
        with hive.store.bus.listen("deployed") as listener:
            while "effort" not in ((await hive.agents.get(IRIS)).settings or {}):
                await listener.wait()


# -- what goes wrong --------------------------------------------------------------------------------------------------


async def test_a_module_that_is_no_good_is_refused_before_there_is_a_card(house: House, hive: Services) -> None:
    before, kinds = await what_is(hive, house), await hive.kinds()
    for module, said in [
        ("{ hyperhive.model = ; }", "syntax error"),
        ('{ fileSystems."/host".device = "/"; }', 'it mounts "/host"'),
        ("{ hyperhive.persona = builtins.readFile /etc/passwd; }", "it reads /etc/passwd of the host"),
        (MORE % "environment.systemPackages = [ pkgs.nothing ];", "nothing"),
        (
            MORE % 'hyperhive.availableModels = [ "opus" ];',
            "hyperhive.model is sonnet, and hyperhive.availableModels has opus",
        ),
    ]:
        with pytest.raises(Refusal, match=r"^cannot use agent\.nix of iris: ") as caught:
            await ask(hive, checkout(hive).commit(agent__nix=module))
        assert said in caught.value.message
    assert await hive.approvals.pending() == []
    assert await what_is(hive, house) == before
    assert await hive.kinds() == kinds


async def test_the_hosts_network_is_given_by_agent_toml_alone(house: House, hive: Services) -> None:
    sets = MORE.replace("./agent.toml)", './agent.toml) // { network = "host"; }') % ""
    reads_none = MORE.replace("fromTOML (builtins.readFile ./agent.toml)", "{ }") % ""
    for module, toml, said in (
        (sets, HAIKU, "private, and agent.nix makes it host"),
        (reads_none, f'{HAIKU}network = "host"\n', "host, and agent.nix makes it private"),
    ):
        with pytest.raises(Refusal, match=f"agent.toml says network = {said}; let agent.toml alone say it"):
            await ask(hive, checkout(hive).commit(agent__nix=module, agent__toml=toml))
    checkout(hive).git("reset", "--hard", "--quiet", "HEAD~2")
    toml = (checkout(hive).path / "agent.toml").read_text()
    number = await ask(hive, checkout(hive).commit(agent__toml=f'{toml}network = "host"\n'))
    (line,) = [line for line in ((await hive.approvals.get(number)).effect or {})["lines"] if line["what"] == "network"]
    assert line["weight"] == "wide"


async def test_nothing_that_lies_in_wait_in_a_repository_runs_or_changes_what_is_evaluated(
    house: House, hive: Services, tmp_path: Path
) -> None:
    trap, fired, repository = tmp_path / "trap", tmp_path / "fired", checkout(hive)
    trap.write_text(f"#!/bin/sh\ntouch {fired}\ncat\n")
    trap.chmod(0o755)
    persona = "$Format:%H$ $Id$\\r"
    sha = repository.commit(agent__nix=OPUS.replace("Read.", persona))
    for hook in ("post-checkout", "reference-transaction", "post-index-change", "pre-receive", "update", "fsmonitor"):
        shutil.copy(trap, tmp_path / hook)
    for key in ("core.fsmonitor", "filter.x.clean", "filter.x.smudge", "filter.x.process", "diff.x.textconv"):
        repository.git("config", key, str(trap))
    repository.git("config", "core.hooksPath", str(tmp_path))
    (repository.path / ".git/info").mkdir(exist_ok=True)
    (repository.path / ".git/info/attributes").write_text("* filter=x diff=x export-subst ident text eol=crlf\n")
    (repository.path / ".git/objects/info").mkdir(exist_ok=True)
    (repository.path / ".git/objects/info/alternates").write_text(f"{house.folder}/applied/hm1nd.git/objects\n")
    assert (await approve(hive, await ask(hive, sha))).state == "done"
    assert ((await hive.agents.get(IRIS)).settings or {})["prompt"] == "$Format:%H$ $Id$\r"
    assert not fired.exists()


async def test_without_its_agent_toml_a_module_could_not_be_run_elsewhere_and_is_refused(hive: Services) -> None:
    (checkout(hive).path / "agent.toml").unlink()
    with pytest.raises(Refusal, match=r"agent\.toml is missing"):
        await ask(hive, checkout(hive).commit(agent__nix=OPUS))


@pytest.mark.parametrize("step", ["build", "built", "switch", "switched"])
async def test_what_fails_leaves_everything_as_it_was_and_the_next_change_goes_through(
    house: House, hive: Services, step: str
) -> None:
    before = await what_is(hive, house)
    number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))

    def fail(now: str) -> None:
        if now == step:
            house.systems.at = nothing
            raise Refusal("failed", f"cannot do it at {now}: the last lines")

    house.systems.at = fail
    failed = await approve(hive, number)
    assert (failed.state, failed.note) == ("failed", f"cannot do it at {step}: the last lines")
    after = await what_is(hive, house)
    assert {**after, "meta": None} == {**before, "meta": None}
    assert await house.systems.current(HM1ND)
    assert (await approve(hive, await ask(hive, checkout(hive).commit(agent__toml="")))).state == "done"


@pytest.mark.parametrize("when", ["destroying", "kept"])
async def test_an_agent_that_is_destroyed_while_it_is_built_is_given_no_container(
    house: House, hive: Services, when: str
) -> None:
    number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    tombstones, build = Tombstones(hive.store), house.systems.build

    async def build_while_it_is_destroyed(name: AgentName, derivation: StorePath) -> StorePath:
        built: StorePath = await build(name, derivation)
        tombstone = await tombstones.destroy(IRIS, OPERATOR, at_once=True)
        house.systems.file.write_text("{}")  # as the driver forgets it
        (house.folder / "applied/iris.git").rename(house.folder / "away")
        if when == "kept":
            await hive.store.write(lambda tx: keep(tx, tombstone, 0))
        return built

    house.systems.build = build_while_it_is_destroyed
    failed = await approve(hive, number)
    assert (failed.state, failed.note) == ("failed", "cannot deploy iris: it was destroyed meanwhile")
    assert await house.systems.current(IRIS) is None
    house.systems.build = build
    assert (await spawn(hive, AgentName("argus"))).state == "done"


async def test_a_destruction_waits_for_the_switch_that_is_under_way_and_then_leaves_no_container(
    house: House, hive: Services
) -> None:
    number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    switch, driver, gone = house.systems.switch, ForgettingDriver(house), trio.Event()
    dirs = partial(agent_dirs, house.folder, house.folder / "run")
    reconciler = Reconciler(hive.store, hive.agents, driver, dirs, nothing, nothing, nothing, locks=hive.locks)  # type: ignore[arg-type]

    async def leave() -> None:
        await reconciler.leave(IRIS, at_once=True)
        gone.set()

    async with trio.open_nursery() as nursery:

        async def switch_while_it_is_destroyed(name: AgentName, system: StorePath) -> None:
            await Tombstones(hive.store).destroy(IRIS, OPERATOR, at_once=True)
            nursery.start_soon(leave)
            await trio.testing.wait_all_tasks_blocked()
            await switch(name, system)

        house.systems.switch = switch_while_it_is_destroyed
        done = await approve(hive, number)
        await gone.wait()
    assert (done.state, done.note) == ("failed", "cannot deploy iris: it was destroyed meanwhile")
    assert await house.systems.current(IRIS) is None
    house.systems.switch = switch
    assert (await spawn(hive, AgentName("argus"))).state == "done"


async def test_a_repository_whose_main_cannot_move_gives_the_former_system_back(house: House, hive: Services) -> None:
    before = await what_is(hive, house)
    number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    held = house.folder / "applied/iris.git/refs/heads/main.lock"
    held.touch()
    failed = await approve(hive, number)
    assert failed.state == "failed"
    assert "cannot use the repository of iris" in (failed.note or "")
    held.unlink()
    assert ("switch", IRIS) in house.systems.done[4:]
    assert {**await what_is(hive, house), "meta": None} == {**before, "meta": None}


async def test_a_log_that_cannot_be_written_keeps_no_agent_from_what_was_approved(house: House, hive: Services) -> None:
    number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    held = house.folder / "meta/.git/refs/heads/main.lock"
    house.systems.at = lambda step: held.mkdir() if step == "switched" else None
    assert (await approve(hive, number)).state == "done"
    assert ((await hive.agents.get(IRIS)).settings or {})["effort"] == "high"
    assert house.log()[0] == "iris: deployed/0"
    house.systems.at = nothing
    held.rmdir()
    assert (await approve(hive, await ask(hive, checkout(hive).commit(agent__toml="")))).state == "done"
    assert lock(house)["iris"] == (await hive.agents.get(IRIS)).deployed_sha
    assert house.log()[0] == "iris: deployed/3"


async def test_an_agent_whose_container_cannot_be_built_waits_and_says_why(house: House) -> None:
    house.folder.mkdir()

    def fail(step: str) -> None:
        raise Refusal("failed", "cannot build hm1nd: the last lines")

    house.systems.at = fail
    async with house.open() as hive, serving(hive):
        with hive.store.bus.listen("wanted") as listener:
            while (why := hive.gate.hindrance(HM1ND)) == "its container is being built":
                await listener.wait()
        assert why is not None
        assert why.startswith("its container cannot be built: cannot build hm1nd: the last lines; ")
    house.systems.at = nothing
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)


async def test_who_has_the_containers_may_be_away_when_the_daemon_starts_and_is_asked_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_AWAY_S", 0.05)
    house.folder.mkdir()
    systems, asked = house.systems, []
    current = systems.current

    async def away(name: AgentName) -> StorePath | None:
        asked.append(name)
        if len(asked) < 4:
            raise Refusal("unavailable", "cannot reach the helper")
        found: StorePath | None = await current(name)
        return found

    systems.current = away
    async with house.open() as hive, serving(hive):
        with hive.store.bus.listen("wanted") as listener:
            while (why := hive.gate.hindrance(HM1ND)) == "its container is being built":
                await listener.wait()
        assert why in ("cannot reach the helper", None)
        await mended(hive, HM1ND)
    assert asked[:4] == [HM1ND] * 4


# -- a daemon that dies -----------------------------------------------------------------------------------------------

STEPS = ["build", "built", "switch", "switched", "moved", "committed"]


def told(house: House) -> list[str]:
    """The log of deployments, newest first, behind how the hive and hm1nd began."""
    return house.log()[:-2]


async def die_at(house: House, step: str) -> dict[str, object]:
    """A change of iris is approved, and the daemon is killed right after a step; what was there before."""
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
        await spawn(hive)
        before = await what_is(hive, house)
        number = await ask(hive, checkout(hive).commit(agent__nix=OPUS))
    async with house.open() as hive:
        card = await hive.approvals.get(number)
        await hive.store.write(lambda tx: settle(tx, card, "approved", None, OPERATOR))
    await house.carry_out_and_die(step)
    return before


@pytest.mark.parametrize("step", STEPS)
async def test_a_daemon_that_is_killed_after_any_step_is_followed_by_one_that_finishes(house: House, step: str) -> None:
    house.folder.mkdir()
    await die_at(house, step)
    async with house.open() as hive, serving(hive):
        done = await approve(hive, 2)
        assert done.state == "done"
        iris = await hive.agents.get(IRIS)
        assert iris.deployed_sha == checkout(hive).head() == lock(house)["iris"]
        row = await system_of(hive.store, IRIS)
        assert row is not None
        assert row.path == await house.systems.current(IRIS)
    assert house.git("status", "--porcelain") == ""
    assert told(house) == ["iris: deployed/2", "iris: deployed/0"]


@pytest.mark.parametrize("step", ["switched", "committed"])
async def test_a_new_agent_is_told_of_once_in_the_log_whenever_the_daemon_that_makes_it_dies(
    house: House, step: str
) -> None:
    house.folder.mkdir()
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
    async with house.open() as hive:
        number = (await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"]
        card = await hive.approvals.get(number)
        await hive.store.write(lambda tx: settle(tx, card, "approved", None, OPERATOR))
    await house.carry_out_and_die(step)
    async with house.open() as hive, serving(hive):
        assert (await approve(hive, number)).state == "done"
    assert told(house) == ["iris: deployed/0"]
    assert lock(house).keys() == {"hm1nd", "iris"}


async def test_an_agent_that_another_ones_deployment_left_out_is_in_the_flake_again(house: House) -> None:
    house.folder.mkdir()
    async with house.open() as hive:
        async with serving(hive):
            await mended(hive, HM1ND)
            assert (await spawn(hive)).state == "done"
        # Not served any more: the gate would mend iris by itself, before or after us.
        deployments = hive.gate._deployments
        assert isinstance(deployments, FlakeDeployments)
        await hive.sql("DELETE FROM systems WHERE agent = 'iris'")  # as before it was written
        deployments.forget(IRIS)
        manager, iris = [CommitSha(str((await hive.agents.get(name)).deployed_sha)) for name in (HM1ND, IRIS)]
        await deployments.settle(Change(HM1ND, 9, manager, None))
        assert lock(house).keys() == {"hm1nd"}
        for _ in range(2):
            await deployments.settle(Change(IRIS, 1, iris, None))
        assert lock(house).keys() == {"hm1nd", "iris"}
        assert told(house) == ["iris is in the flake again", "hm1nd: deployed/0", "iris: deployed/0"]


async def test_an_agent_that_is_built_anew_is_told_of_once_in_the_log_when_the_daemon_dies_behind_it(
    house: House, tmp_path: Path
) -> None:
    house.folder.mkdir()
    async with house.open() as hive, serving(hive):
        await mended(hive, HM1ND)
    later = with_nixpkgs(house, tmp_path / "later", "-2")
    await later.carry_out_and_die("mended")
    before = told(house)
    assert len(before) == 1
    async with later.open() as hive, serving(hive):
        await mended(hive, HM1ND)
    assert told(house) == before


@pytest.mark.parametrize("step", ["build", "switched"])
async def test_what_cannot_be_finished_after_a_death_is_put_back(house: House, step: str) -> None:
    house.folder.mkdir()
    before = await die_at(house, step)
    held = house.folder / "applied/iris.git/refs/heads/main.lock"
    held.touch()
    async with house.open() as hive, serving(hive):
        failed = await approve(hive, 2)
        assert failed.state == "failed"
        assert "cannot use the repository of iris" in (failed.note or "")
        await mended(hive, IRIS)
        after = await what_is(hive, house)
    assert (after["current"], after["sha"], after["status"]) == (before["current"], before["sha"], "")


async def test_of_two_commits_that_would_make_an_agent_the_second_touches_nothing_of_it(
    hive: Services, house: House
) -> None:
    argus = AgentName("argus")
    seeded = await hive.gate.init_config.request(HM1ND, argus, "You watch.", "eyes")
    assert (await approve(hive, seeded["approval"])).state == "done"
    one = checkout(hive, argus).commit(agent__nix=MORE % "environment.systemPackages = [ pkgs.strace ];")
    first = await ask(hive, one, argus)
    second = await ask(hive, checkout(hive, argus).commit(agent__nix=MORE % ""), argus)
    # Both clicks come before either is carried out.
    cards = [await hive.approvals.get(number) for number in (first, second)]
    await hive.store.write(lambda tx: [settle(tx, card, "approved", None, OPERATOR) for card in cards] and None)
    hive.store.bus.publish([APPROVED])
    assert (await hive.approvals.wait_settled(first)).state == "done"
    made = await what_is(hive, house, argus)
    switches = len(house.systems.done)
    failed = await hive.approvals.wait_settled(second)
    assert (failed.state, one[:12] in (failed.note or "")) == ("failed", True)
    assert await what_is(hive, house, argus) == made
    assert ("switch", argus) not in house.systems.done[switches:]


async def test_what_an_agent_tried_to_reach_is_in_the_evaluated_settings_of_the_commit_that_lets_it(
    hive: Services,
) -> None:
    said = await hive.gate.egress.wish(IRIS, TUNNEL, "git.example.org", 443)
    (card,) = [one for one in await hive.approvals.pending() if one.kind == "egress"]
    assert said.startswith(f"asked the operator (approval {card.id})")
    assert [effect_line(line) for line in (card.effect or {})["lines"]] == ["egress: + git.example.org:443"]
    await hive.gate.egress.wish(IRIS, TUNNEL, "example.org", 443)
    (other,) = [one for one in await hive.approvals.pending() if one.kind == "egress" and one.id != card.id]
    clicks = [Click(one.id, one.digest) for one in (card, other)]
    outcomes = await Together(hive.store, hive.approvals, hive.gate).approve(clicks, OPERATOR)
    assert [one.approval and one.approval.state for one in outcomes] == ["done", "done"], outcomes
    policy = json.loads(await hive.value("SELECT policy FROM agents WHERE name = 'iris'"))
    assert policy["egress"] == [{"to": "git.example.org:443"}, {"to": "example.org:443"}]


async def test_an_agent_whose_module_reads_no_agent_toml_gets_no_card_by_trying(hive: Services) -> None:
    own = MORE % ""
    module = own.replace("fromTOML (builtins.readFile ./agent.toml)", '{ program = "rehearsal"; model = "haiku"; }')
    checkout = Checkout(hive.repos.proposed_dir / "iris" / "config")
    sha = checkout.commit(agent__nix=module, agent__toml=HAIKU)
    asked = await hive.gate.apply_commit.request(HM1ND, IRIS, sha, "its own settings")
    assert (await approve(hive, asked["approval"])).state == "done"
    with pytest.raises(Refusal, match=r"does not take egress from agent\.toml; let hm1nd propose it"):
        await hive.gate.egress.wish(IRIS, TUNNEL, "git.example.org", 443)
