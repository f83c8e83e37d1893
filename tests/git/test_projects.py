"""Projects: a repository of the host is mirrored once, lent to agents by hard links, and followed as it moves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.git import mirrors
from hive_core.git.remotes import parse_source
from hive_core.limits import Limits
from hive_core.procedures.projects import ProjectMirrors
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import parse_project_name
from hive_core.sockets.admin_projects import project_streams
from tests.dashboards import hive_of
from tests.hives import open_services
from tests.project_hives import IRIS, SITE, commit, git, make_source, open_project_hive


async def test_a_repository_of_the_host_is_mirrored_with_its_branches_tags_and_head(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site", "trunk")
    git(source, "tag", "v1")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        added = await mirrors.add(SITE, str(source), {}, "operator")
        assert (added.branch, added.credential, added.trouble) == ("trunk", "none", None)
        refs = git(mirrors.path(SITE), "for-each-ref", "--format=%(refname)", "refs/heads", "refs/tags").split()
        assert refs == ["refs/heads/trunk", "refs/tags/v1"]
        assert added.bytes == sum(file.stat().st_size for file in (mirrors.path(SITE) / "objects" / "pack").iterdir())
        (event,) = await hive.events("project_added")
        assert event["actor"] == "operator"


async def test_a_fetch_follows_branches_that_move_come_and_go_and_leaves_what_agents_pushed(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    git(source, "branch", "old")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        mirror = mirrors.path(SITE)
        first = git(mirror, "rev-parse", "main")
        git(mirror, "update-ref", "refs/heads/iris/fix", first)  # as a push does it
        git(mirror, "update-ref", "refs/heads/old", first)
        git(source, "branch", "--delete", "old")
        git(source, "branch", "old/er")
        second = commit(source, text="again\n")
        await mirrors.fetch(SITE)
        said = git(mirror, "for-each-ref", "--format=%(refname:short) %(objectname)", "refs/heads").splitlines()
        assert said == [f"iris/fix {first}", f"main {second}", f"old/er {first}"]


async def test_an_empty_repository_is_taken_and_clones_begin_with_the_first_branch_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "site"
    git(tmp_path, "init", "--quiet", "--initial-branch=trunk", "site")
    monkeypatch.setattr("hive_core.procedures.projects.FRESH_S", 0.0)
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        (site,) = await hive.mirrors.of(IRIS)
        assert (site["branch"], site["trouble"]) == (None, None)
        commit(source)
        await hive.mirrors.of(IRIS)
        assert git(hive.mirrors.path(SITE), "symbolic-ref", "HEAD") == "refs/heads/trunk"


async def test_whoever_adds_a_project_is_told_how_much_has_come_and_then_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    monkeypatch.setattr("hive_core.sockets.admin_projects.PROGRESS_S", 0.0)
    async with open_services(tmp_path) as services:
        hive, told = hive_of(services), list[Any]()

        async def tell(answer: Any) -> None:
            told.append(answer)
            if answer.get("arrived_bytes"):
                raise trio.BrokenResourceError  # who asked has gone, and it goes on

        add, keys = project_streams(hive)["project_add"]
        assert keys == {"project", "source", "key", "token", "host_key"}
        await add({"project": "site", "source": str(source)}, tell)
        assert told[0] == {"arrived_bytes": 0}
        assert (told[-1]["name"], told[-1]["bytes"]) == ("site", hive.mirrors.arrived_bytes(SITE))
        with pytest.raises(Refusal, match="there is one of that name"):
            await add({"project": "site", "source": str(source)}, tell)


async def test_a_branch_that_an_agent_moved_is_the_sources_again_once_that_moves(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        mirror, first = mirrors.path(SITE), git(source, "rev-parse", "HEAD")
        tree = git(mirror, "rev-parse", "main^{tree}")
        pushed = git(mirror, "commit-tree", tree, "-p", first, "-m", "pushed")
        git(mirror, "update-ref", "refs/heads/main", pushed)
        await mirrors.fetch(SITE)
        assert git(mirror, "rev-parse", "main") == pushed
        second = commit(source, text="again\n")
        await mirrors.fetch(SITE)
        assert git(mirror, "rev-parse", "main") == second


async def test_a_branch_that_an_agent_moved_stays_when_the_source_removes_its_own(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    git(source, "branch", "old")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        mirror, first = hive.mirrors.path(SITE), git(source, "rev-parse", "HEAD")
        pushed = git(mirror, "commit-tree", f"{first}^{{tree}}", "-p", first, "-m", "pushed")
        git(mirror, "update-ref", "refs/heads/old", pushed)
        git(source, "branch", "--delete", "old")
        await hive.mirrors.fetch(SITE)
        assert git(mirror, "rev-parse", "old") == pushed


async def test_the_next_daemon_clears_up_what_one_that_died_left(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive, trio.open_nursery() as nursery:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        mirror = hive.mirrors.path(SITE)
        (mirror / "objects" / "tmp_objdir-incoming-x" / "pack").mkdir(parents=True)
        (mirror / "objects" / "pack" / "tmp_pack_x").write_bytes(b"PACK")
        (mirror / "refs" / "heads" / "main.lock").touch()
        (mirror.parent / ".other.new").mkdir()
        (mirror.parent / "other.git").mkdir()
        hive.mirrors.keys.put(parse_project_name("other"), ".token", "a-token-of-nobody")
        before = git(mirror, "rev-parse", "main")
        again = ProjectMirrors(hive.services.store, Limits(), hive.services.state_dir)
        await nursery.start(again.serve)
        assert [path.name for path in mirror.parent.iterdir()] == ["site.git"]
        assert not [*mirror.rglob("*.lock"), *mirror.rglob("tmp_*")]
        assert list(again.keys.names()) == []
        assert git(mirror, "rev-parse", "main") == before
        nursery.cancel_scope.cancel()


async def test_a_branch_beside_which_that_of_an_agent_cannot_be_stays_away_and_the_others_come(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        mirror = mirrors.path(SITE)
        git(mirror, "update-ref", "refs/heads/iris/fix", "main")
        git(source, "branch", "iris")
        git(source, "branch", "next")
        await mirrors.fetch(SITE)
        names = git(mirror, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()
        assert names == ["iris/fix", "main", "next"]


async def test_an_agent_is_lent_the_packs_of_what_it_lists_and_nothing_is_copied(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        await mirrors.add(parse_project_name("other"), str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        await mirrors.lend()
        packs = sorted((mirrors.path(SITE) / "objects" / "pack").iterdir())
        assert packs
        assert [file.stat().st_ino for file in packs] == [
            file.stat().st_ino for file in sorted((hive.lent() / "objects" / "pack").iterdir())
        ]
        assert os.listdir(hive.lent().parent) == ["site"]
        git(tmp_path, "clone", "--quiet", "--reference", str(hive.lent()), str(mirrors.path(SITE)), "clone")
        git(tmp_path / "clone", "fsck", "--strict")
        packed = (hive.lent() / "packed-refs").stat()
        await mirrors.lend()
        assert (hive.lent() / "packed-refs").stat() == packed  # by which its harness sees that there is nothing new
        # What is pushed or fetched later is lent as well, and what is not listed any more is taken back.
        commit(source, text="again\n")
        await mirrors.fetch(SITE)
        assert git(hive.lent(), "rev-parse", "main") == git(source, "rev-parse", "HEAD")
        await hive.list_projects()
        await mirrors.lend()
        assert os.listdir(hive.lent().parent) == []


async def test_clones_that_borrow_stay_whole_when_the_packs_are_packed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors_ = hive.mirrors
        await mirrors_.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        await mirrors_.lend()
        git(tmp_path, "clone", "--quiet", "--reference", str(hive.lent()), str(mirrors_.path(SITE)), "clone")
        monkeypatch.setattr(mirrors, "PACKS_MOST", 2)
        for number in range(4):
            commit(source, f"file{number}")
            await mirrors_.fetch(SITE)
        packs = [file for file in mirrors.packs(mirrors_.path(SITE)) if file.endswith(".pack")]
        assert len(packs) <= 3
        assert mirrors.packs(hive.lent()) == mirrors.packs(mirrors_.path(SITE))
        git(tmp_path / "clone", "fsck", "--strict")
        git(tmp_path / "clone", "pull", "--quiet")


@pytest.mark.parametrize("from_the_first", [True, False])
async def test_a_mirror_is_packed_anew_before_it_is_too_large_and_clones_keep_what_they_borrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_the_first: bool
) -> None:
    """With each fetch comes what it was made from, once more. A limit may also be lower than it was."""
    source = make_source(tmp_path / "source")
    lines = [os.urandom(30).hex() for _ in range(4_000)]
    async with open_project_hive(tmp_path, project_bytes=2 ** (20 if from_the_first else 30)) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        clone = await hive.clone()
        git(clone, "branch", "mine", "HEAD")
        git(source, "commit", "--quiet", "--amend", "--allow-empty", "-m", "This takes the place of what was borrowed")
        for number in range(9):
            lines[number] = "another"
            commit(source, "large", "\n".join(lines))
            await hive.mirrors.fetch(SITE)
        monkeypatch.setattr(hive.mirrors, "_limits", mirrors.MirrorLimits(2**20, 60))
        assert (await hive.mirrors.fetch(SITE)).bytes < 2**20
        git(clone, "fsck", "--strict")
        assert git(clone, "log", "-1", "--format=%s", "mine") == "Change README"


async def test_a_mirror_that_is_too_large_however_it_is_packed_says_so_and_is_packed_once(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path, project_bytes=2**20) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        for number in range(2):
            (source / f"noise{number}").write_bytes(os.urandom(2**20 // 4 * 3))
            commit(source)
            await hive.mirrors.fetch(SITE)
        packs = mirrors.packs(hive.mirrors.path(SITE))
        assert sum(file.endswith(".pack") for file in packs) == 1
        with pytest.raises(Refusal, match=r"its mirror has 1.5 MiB and project_bytes is 1.0 MiB; raise that"):
            await hive.mirrors.fetch(SITE)
        assert mirrors.packs(hive.mirrors.path(SITE)) == packs


async def test_what_cannot_be_fetched_is_told_with_the_project_and_not_twice(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"}, {"name": "gone"})
        source.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(Refusal, match="cannot fetch site"):
                await mirrors.fetch(SITE)
        assert len(await hive.events("project_fetch_failed")) == 1
        site, gone = await mirrors.of(IRIS)
        assert site["trouble"].startswith(f"site could not be fetched from {source}: ")
        assert "hive project add gone" in gone["trouble"]
        assert (site["path"], site["branch"], site["push"]) == ("/projects/site", None, "iris/*")
        (tmp_path / "away").rename(source)
        assert (await mirrors.fetch(SITE)).trouble is None


async def test_a_turn_that_begins_has_its_projects_fetched_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors_ = hive.mirrors
        await mirrors_.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        second = commit(source, text="again\n")
        assert (await mirrors_.of(IRIS))[0]["trouble"] is None
        assert git(mirrors_.path(SITE), "rev-parse", "main") != second  # it was fetched a moment ago
        monkeypatch.setattr("hive_core.procedures.projects.FRESH_S", 0.0)
        assert (await mirrors_.of(IRIS))[0]["trouble"] is None
        assert git(mirrors_.path(SITE), "rev-parse", "main") == second


async def test_a_repository_that_nobody_has_thought_of_is_its_own_trouble_and_ends_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(make_source(tmp_path / "site")), {}, "operator")
        await hive.list_projects({"name": "site"})
        monkeypatch.setattr("hive_core.procedures.projects.FRESH_S", 0.0)
        with monkeypatch.context() as patched:
            patched.setattr(mirrors.Mirror, "fetch", lambda _: b"\xff".decode())
            (site,) = await hive.mirrors.of(IRIS)
        assert "UnicodeDecodeError" in site["trouble"]
        (site,) = await hive.mirrors.of(IRIS)
        assert site["trouble"] is None


async def test_what_could_not_be_added_leaves_nothing(tmp_path: Path) -> None:
    async with open_project_hive(tmp_path, project_bytes=2**20) as hive:
        mirrors = hive.mirrors
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(Refusal, match="cannot add site"):
            await mirrors.add(SITE, str(empty), {}, "operator")
        for place, why in (("/nowhere/site", "create it"), ("/home/you/site", "sees no home directories")):
            with pytest.raises(Refusal, match=f"cannot add site: {place}: there is no such file or directory; .*{why}"):
                await mirrors.add(SITE, place, {}, "operator")
        large = make_source(tmp_path / "large")
        (large / "blob").write_bytes(os.urandom(2 * 2**20))
        commit(large)
        with pytest.raises(Refusal, match="more than 1,048,576 bytes"):
            await mirrors.add(SITE, str(large), {}, "operator")
        assert await mirrors.projects.all() == []
        assert not mirrors.path(SITE).exists()
        with pytest.raises(Refusal, match="tokens are for https"):
            await mirrors.add(SITE, str(large), {"token": "t" * 20}, "operator")
        assert not (hive.services.state_dir / "credentials" / "projects").exists()


async def test_a_project_is_removed_when_nobody_lists_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        with pytest.raises(Refusal, match="there is one of that name"):
            await mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        with pytest.raises(Refusal, match="iris works on it"):
            await mirrors.remove(SITE, "operator")
        await hive.list_projects()
        await mirrors.remove(SITE, "operator")
        assert not mirrors.path(SITE).exists()
        with pytest.raises(Refusal, match="there is no project site"):
            await mirrors.fetch(SITE)


async def test_hooks_and_configuration_of_a_repository_of_the_host_run_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "site")
    fired = tmp_path / "fired"
    trap = tmp_path / "trap"
    trap.write_text(f"#!/bin/sh\ntouch {fired}\nexec cat\n")
    trap.chmod(0o755)
    for hook in ("pre-receive", "update", "post-update", "reference-transaction", "post-checkout"):
        (source / ".git" / "hooks").mkdir(exist_ok=True)
        (source / ".git" / "hooks" / hook).symlink_to(trap)
    for key in ("uploadpack.packObjectsHook", "core.fsmonitor", "core.sshCommand", "core.alternateRefsCommand"):
        git(source, "config", key, str(trap))
    async with open_project_hive(tmp_path) as hive:
        mirrors = hive.mirrors
        await mirrors.add(SITE, str(source), {}, "operator")
        commit(source, text="again\n")
        fired.unlink(missing_ok=True)  # of our own commit
        await mirrors.fetch(SITE)
        assert not fired.exists()


@pytest.mark.parametrize(
    "raw",
    [
        "ext::sh -c id",
        "file:///etc",
        "-oProxyCommand=id",
        "ssh://-oProxyCommand=id/x",
        "https://ada:secret@host/x",
        "https://host/x?y",
        "https://ho st/x",
        "https://host/-x",
        "https://hóst/x",
        "git://host/x",
        "ada@-host:x",
        "-ada@host:x",
        "host:-x",
        "relative/path",
        "http://",
        "ssh://host",
        "fd::17",
        "https://host:0/x",
        "a\nb",
        "",
        None,
    ],
)
def test_what_git_would_take_for_more_than_a_place_is_refused(raw: object) -> None:
    with pytest.raises(Refusal) as refused:
        parse_source(raw)
    assert "secret" not in refused.value.message


@pytest.mark.parametrize(
    ("raw", "kind", "host", "user"),
    [
        ("/srv/site", "path", "", ""),
        ("/srv/../srv/site", "path", "", ""),
        ("https://Git.Example/ada/site.git", "http", "git.example", ""),
        ("http://127.0.0.1:3000/ada/site", "http", "127.0.0.1", ""),
        ("ssh://git@git.example:2222/ada/site.git", "ssh", "git.example", "git"),
        ("git@git.example:ada/site.git", "ssh", "git.example", "git"),
        ("ssh://git@[::1]/site", "ssh", "::1", "git"),
    ],
)
def test_a_place_is_taken_apart(raw: str, kind: str, host: str, user: str) -> None:
    source = parse_source(raw)
    assert (source.kind, source.host, source.user) == (kind, host, user)
