"""Whatever the manager's container writes into a proposed repository, none of it runs as the daemon."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from tests.hives import PATIENCE_S, Services, clean_environment, open_services

HM1ND, IRIS, OPERATOR = AgentName("hm1nd"), AgentName("iris"), AgentName("operator")
FILES = {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You read.\n"}
HOOKS = [
    "applypatch-msg",
    "pre-applypatch",
    "post-applypatch",
    "pre-commit",
    "pre-merge-commit",
    "prepare-commit-msg",
    "commit-msg",
    "post-commit",
    "pre-rebase",
    "post-checkout",
    "post-merge",
    "pre-push",
    "pre-receive",
    "update",
    "proc-receive",
    "post-receive",
    "post-update",
    "reference-transaction",
    "push-to-checkout",
    "pre-auto-gc",
    "post-rewrite",
    "fsmonitor-watchman",
    "post-index-change",
    "post-upload-pack",
]


class Planted:
    """A proposed repository in which a trap waits; `fired` says whether any of its code has run."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.dot_git = path / ".git"
        self.marker = folder / "fired"
        self.trap = folder / "trap"
        self.trap.write_text(f"#!/bin/sh\ntouch {self.marker}\n")
        self.trap.chmod(0o755)

    @property
    def fired(self) -> bool:
        return self.marker.exists()

    def git(self, *arguments: str, check: bool = True, said: str = "") -> str:
        """Plain git, as a careless daemon would run it."""
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            input=said,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout.strip()

    def config(self, **values: str) -> None:
        """Set configuration; a key's `__` is its dot."""
        for key, value in values.items():
            self.set(key.replace("__", "."), value)

    def set(self, key: str, value: str) -> None:
        self.git("config", key, value)

    def attributes(self, text: str) -> None:
        (self.dot_git / "info").mkdir(exist_ok=True)
        (self.dot_git / "info" / "attributes").write_text(text)

    def change(self) -> CommitSha:
        (self.path / "CLAUDE.md").write_text("You read slowly.\n")
        self.git("commit", "-q", "-a", "-m", "a change")
        return CommitSha(self.git("rev-parse", "HEAD"))


def plant_hooks(repo: Planted, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in HOOKS:
        shutil.copy(repo.trap, folder / name)


def plant_ext(repo: Planted) -> str:
    repo.config(protocol__ext__allow="always", protocol__allow="always")
    return f"ext::{repo.trap} %S"


def hooks(repo: Planted) -> None:
    plant_hooks(repo, repo.dot_git / "hooks")


def hooks_path(repo: Planted) -> None:
    plant_hooks(repo, repo.dot_git / "elsewhere")
    repo.config(core__hooksPath=str(repo.dot_git / "elsewhere"))


def fsmonitor(repo: Planted) -> None:
    repo.config(core__fsmonitor=str(repo.trap))


def filters(repo: Planted) -> None:
    repo.attributes("* filter=trap\n")
    repo.config(filter__trap__clean=str(repo.trap), filter__trap__smudge=str(repo.trap), filter__trap__required="true")


def filter_process(repo: Planted) -> None:
    repo.attributes("* filter=trap\n")
    repo.config(filter__trap__process=str(repo.trap))


def attributes_file(repo: Planted) -> None:
    (repo.dot_git / "more").write_text("* diff=trap\n")
    repo.config(core__attributesFile=str(repo.dot_git / "more"), diff__trap__textconv=str(repo.trap))


def textconv(repo: Planted) -> None:
    repo.attributes("* diff=trap\n")
    repo.config(diff__trap__textconv=str(repo.trap))


def external_diff(repo: Planted) -> None:
    repo.config(diff__external=str(repo.trap))


def diff_driver(repo: Planted) -> None:
    repo.attributes("* diff=trap\n")
    repo.config(diff__trap__command=str(repo.trap))


def merge_driver(repo: Planted) -> None:
    repo.attributes("* merge=trap\n")
    repo.config(merge__trap__driver=str(repo.trap))


def pack_objects_hook(repo: Planted) -> None:
    repo.config(uploadpack__packObjectsHook=str(repo.trap))


def alternate_refs_command(repo: Planted) -> None:
    other = repo.dot_git / "other.git"
    repo.git("clone", "-q", "--bare", str(repo.path), str(other))
    (repo.dot_git / "objects" / "info").mkdir(exist_ok=True)
    (repo.dot_git / "objects" / "info" / "alternates").write_text(f"{other}/objects\n")
    repo.config(core__alternateRefsCommand=str(repo.trap))


def instead_of(repo: Planted) -> None:
    repo.set(f"url.{plant_ext(repo)}.insteadOf", "/")


def promisor(repo: Planted) -> None:
    """An object is missing, and the place to get it from is a command."""
    repo.git("repack", "-q", "-a", "-d")
    url = plant_ext(repo)
    blob = repo.git("rev-parse", "HEAD:CLAUDE.md")
    repo.git("unpack-objects", "-q", check=False)
    for pack in (repo.dot_git / "objects" / "pack").glob("*.pack"):
        moved = pack.rename(repo.dot_git / "old.pack")
        for rest in (repo.dot_git / "objects" / "pack").iterdir():
            rest.unlink()
        with moved.open("rb") as stream:
            subprocess.run(
                ["git", "unpack-objects", "-q"], cwd=repo.path, stdin=stream, env=clean_environment(), check=True
            )
    (repo.dot_git / "objects" / blob[:2] / blob[2:]).unlink()
    repo.config(
        core__repositoryFormatVersion="1",
        extensions__partialClone="evil",
        remote__evil__promisor="true",
        remote__evil__url=url,
        remote__evil__partialclonefilter="blob:none",
    )


def include(repo: Planted) -> None:
    (repo.dot_git / "more").write_text(f"[core]\n\tfsmonitor = {repo.trap}\n")
    repo.config(include__path=str(repo.dot_git / "more"))


def commands(repo: Planted) -> None:
    trap = str(repo.trap)
    repo.config(
        core__sshCommand=trap,
        core__gitProxy=trap,
        core__askPass=trap,
        core__editor=trap,
        core__pager=trap,
        gpg__program=trap,
        log__showSignature="true",
        credential__helper=f"!{trap}",
        remote__origin__uploadpack=trap,
        remote__origin__proxy=trap,
        interactive__diffFilter=trap,
        gc__auto="1",
        gc__recentObjectsHook=trap,
        maintenance__auto="true",
    )


# Each trap, and the plain git command inside the repository that steps on it (none: git closed that hole by itself).
TRAPS: dict[str, tuple[Callable[[Planted], None], list[str] | None]] = {
    "hooks": (hooks, ["commit", "-q", "--allow-empty", "-m", "x"]),
    "hooks path": (hooks_path, ["commit", "-q", "--allow-empty", "-m", "x"]),
    "fsmonitor": (fsmonitor, ["status"]),
    "filters": (filters, ["add", "--renormalize", "."]),
    "filter process": (filter_process, ["add", "--renormalize", "."]),
    "attributes file": (attributes_file, ["log", "-p"]),
    "textconv": (textconv, ["log", "-p"]),
    "external diff": (external_diff, ["diff", "HEAD~1"]),
    "diff driver": (diff_driver, ["diff", "HEAD~1"]),
    "merge driver": (merge_driver, None),
    "pack-objects hook": (pack_objects_hook, None),
    "alternate refs": (alternate_refs_command, ["fetch", "-q", "origin", "+refs/heads/*:refs/heads/new-*"]),
    "insteadOf ext::": (instead_of, ["fetch", "-q", "/anywhere"]),
    "promisor ext::": (promisor, ["cat-file", "-p", "HEAD:CLAUDE.md"]),
    "include": (include, ["status"]),
    "commands": (commands, ["fetch", "-q", "origin"]),
}


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    (tmp_path / "state").mkdir()
    async with open_services(tmp_path / "state") as services, trio.open_nursery() as nursery:
        nursery.start_soon(services.gate.serve)
        number = (await services.gate.spawn.request(OPERATOR, IRIS, "You read.", "r"))["approval"]
        card = await services.approvals.get(number)
        assert (await services.gate.approve(number, card.digest, "operator")).state == "done"
        yield services
        nursery.cancel_scope.cancel()


@pytest.fixture
def iris(hive: Services, tmp_path: Path) -> Planted:
    return Planted(hive.repos.proposed_dir / "iris" / "config", tmp_path)


@pytest.mark.parametrize("name", TRAPS)
async def test_a_trap_in_the_proposed_repository_never_runs(hive: Services, iris: Planted, name: str) -> None:
    plant, _ = TRAPS[name]
    sha = iris.change()
    plant(iris)
    iris.marker.unlink(missing_ok=True)  # planting it may have set it off
    for end in ("deny", "approve"):
        try:
            number = (await hive.gate.apply_commit.request(OPERATOR, IRIS, sha, "r"))["approval"]
        except Refusal as refusal:
            # The one repository that is not whole.
            assert (name, "cannot fetch" in refusal.message) == ("promisor ext::", True)
            break
        card = await hive.approvals.get(number)
        assert "+You read slowly." in card.payload["diff"]
        if end == "deny":
            await hive.gate.deny(number, "no", "operator")
        else:
            assert (await hive.gate.approve(number, card.digest, "operator")).state == "done"
    await hive.repos.create(IRIS, FILES)
    assert not iris.fired


@pytest.mark.parametrize("name", [name for name, (_, control) in TRAPS.items() if control])
def test_the_same_trap_does_run_for_a_git_that_works_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "origin").mkdir()
    origin = Planted(tmp_path / "origin", tmp_path)
    origin.git("init", "-q", "-b", "main")
    for file, text in FILES.items():
        (origin.path / file).write_text(text)
    origin.git("add", "-A")
    origin.git("commit", "-q", "-m", "first")
    origin.git("clone", "-q", "--no-hardlinks", "--template=", str(origin.path), str(tmp_path / "config"))
    repo = Planted(tmp_path / "config", tmp_path)
    repo.change()
    plant, control = TRAPS[name]
    assert control is not None
    plant(repo)
    repo.marker.unlink(missing_ok=True)
    repo.git(*control, check=False)
    assert repo.fired


async def test_no_trap_of_another_place_is_brought_along(
    hive: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's own git settings and templates are not the daemon's."""
    trap = Planted(tmp_path / "none", tmp_path)
    plant_hooks(trap, tmp_path / "template")
    plant_hooks(trap, tmp_path / "hooks")
    settings = f"[core]\n\thooksPath = {tmp_path}/hooks\n\tfsmonitor = {trap.trap}\n"
    settings += f"[init]\n\ttemplateDir = {tmp_path}/template\n"
    (tmp_path / ".gitconfig").write_text(settings)
    (tmp_path / ".config" / "git").mkdir(parents=True)
    (tmp_path / ".config" / "git" / "config").write_text(settings)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    await hive.repos.create(AgentName("argus"), FILES)
    assert not trap.fired
    assert not (hive.state_dir / "applied" / "argus.git" / "hooks").exists()
    assert not (hive.state_dir / "proposed" / "argus" / "config" / ".git" / "hooks").exists()


def objects_of(folder: Path) -> dict[tuple[int, int], os.stat_result]:
    found = [path.stat() for path in folder.rglob("*") if path.is_file() and "objects" in path.parts]
    assert found
    return {(entry.st_dev, entry.st_ino): entry for entry in found}


async def test_no_object_of_the_applied_repository_can_be_written_through_the_proposed_one(
    hive: Services, iris: Planted
) -> None:
    await hive.gate.apply_commit.request(OPERATOR, IRIS, iris.change(), "r")
    applied, proposed = objects_of(hive.state_dir / "applied" / "iris.git"), objects_of(iris.path)
    assert not set(applied) & set(proposed)
    assert all(entry.st_nlink == 1 for entry in (applied | proposed).values())
    assert not (hive.state_dir / "applied" / "iris.git" / "objects" / "info" / "alternates").exists()
    assert not (iris.dot_git / "objects" / "info" / "alternates").exists()


async def test_the_applied_repositories_are_for_the_daemon_alone(hive: Services) -> None:
    for folder in (hive.state_dir / "applied", hive.repos.proposed_dir, hive.repos.proposed_dir / "iris"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("target", ["victim", "gone"])
async def test_a_link_where_a_new_agents_folder_goes_is_refused_and_not_followed(
    hive: Services, tmp_path: Path, target: str
) -> None:
    victim = tmp_path / "victim"
    (victim / ".new").mkdir(parents=True)
    (hive.repos.proposed_dir / "argus").symlink_to(tmp_path / target)
    with pytest.raises(Refusal, match="/agents/argus of the manager is no directory"):
        await hive.repos.create(AgentName("argus"), FILES)
    assert [entry.name for entry in victim.iterdir()] == [".new"]
    assert not (tmp_path / "gone").exists()
    (hive.repos.proposed_dir / "argus").unlink()
    await hive.repos.create(AgentName("argus"), FILES)


async def test_what_the_manager_put_where_the_clone_is_made_is_not_used(hive: Services, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    room = hive.repos.proposed_dir / "argus"
    room.mkdir()
    (room / ".new").symlink_to(victim)
    await hive.repos.create(AgentName("argus"), FILES)
    assert list(victim.iterdir()) == []
    assert (room / "config" / "CLAUDE.md").read_text() == FILES["CLAUDE.md"]


def secret_repository(folder: Path, base: Path) -> tuple[Path, CommitSha]:
    """A repository of the host's that the manager must not read, based on iris's so that it could be deployed."""
    path = folder / "secret"
    subprocess.run(["git", "clone", "-q", str(base), str(path)], env=clean_environment(), check=True)
    secret = Planted(path, folder)
    (path / "CLAUDE.md").write_text("a secret\n")
    return path, secret.change()


@pytest.mark.parametrize("way", ["config", ".git", "gitfile", "folder"])
async def test_a_proposed_repository_that_points_elsewhere_is_not_followed(
    hive: Services, iris: Planted, tmp_path: Path, way: str
) -> None:
    secret, sha = secret_repository(tmp_path, iris.path)
    match way:
        case "config":
            shutil.rmtree(iris.path)
            iris.path.symlink_to(secret)
        case ".git":
            shutil.rmtree(iris.dot_git)
            iris.dot_git.symlink_to(secret / ".git")
        case "gitfile":
            shutil.rmtree(iris.dot_git)
            iris.dot_git.write_text(f"gitdir: {secret}/.git\n")
        case _:
            shutil.rmtree(iris.path.parent)
            (tmp_path / "room").mkdir()
            secret.rename(tmp_path / "room" / "config")
            iris.path.parent.symlink_to(tmp_path / "room")
    with pytest.raises(Refusal, match="no directory of its own"):
        await hive.gate.apply_commit.request(OPERATOR, IRIS, sha, "r")
    assert await hive.approvals.pending() == []


async def test_a_broken_configuration_of_the_proposed_repository_means_nothing(hive: Services, iris: Planted) -> None:
    sha = iris.change()
    (iris.dot_git / "config").write_text("[core\n")
    assert await hive.gate.apply_commit.request(OPERATOR, IRIS, sha, "r")


async def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(hive: Services, iris: Planted) -> None:
    sha = iris.change()
    for name in ("HEAD", "config", "packed-refs", "index", f"objects/{sha[:2]}/{'0' * 38}"):
        (iris.dot_git / name).unlink(missing_ok=True)
        os.mkfifo(iris.dot_git / name)
    (iris.dot_git / "objects" / "pack").mkdir(exist_ok=True)
    os.mkfifo(iris.dot_git / "objects" / "pack" / f"pack-{'0' * 40}.pack")
    with trio.fail_after(PATIENCE_S):
        assert await hive.gate.apply_commit.request(OPERATOR, IRIS, sha, "r")


async def test_an_object_that_git_would_not_check_out_safely_is_refused(hive: Services, iris: Planted) -> None:
    blob = iris.git("rev-parse", "HEAD:CLAUDE.md")
    tree = iris.git("mktree", said=f"100644 blob {blob}\t.git\n")
    sha = iris.git("commit-tree", tree, "-p", "HEAD", "-m", "x")
    with pytest.raises(Refusal, match="which git would read for itself"):
        await hive.gate.apply_commit.request(OPERATOR, IRIS, CommitSha(sha), "r")
