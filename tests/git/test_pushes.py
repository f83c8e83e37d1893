"""A push from an agent: judged before anything moves, sent on, and seen by others at once."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_core.git.hive_secrets import forms_of
from hive_core.git.mirrors import NOTHING
from hive_core.git.pushes import ASK_LIMIT_BYTES, Judge, Push, Update, parse_push, put_hook
from hive_core.procedures.pushes import NOT_TAKEN, REFUSALS_TOLD
from hive_core.project_rules import Project
from hive_core.protocol.refusal import Refusal
from tests.project_hives import ARGUS, IRIS, SITE, ProjectHive, commit, git, make_source, open_project_hive

SECRET = "sk-ant-oat01-aVerySecretTokenOfTheHive-0123456789"


async def begin(hive: ProjectHive, source: Path, **project: object) -> Path:
    """Register the source, list it as iris's, and clone it."""
    await hive.mirrors.add(SITE, str(source), {}, "operator")
    await hive.list_projects({"name": "site", **project})
    return await hive.clone()


def refs(repository: Path, below: str = "refs") -> dict[str, str]:
    said = git(repository, "for-each-ref", "--format=%(refname) %(objectname)", below)
    return dict(line.split() for line in said.splitlines())


async def test_a_push_is_on_the_host_as_a_ref_of_the_agents_and_others_see_it_at_once(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        await hive.list_projects({"name": "site"}, agent=ARGUS)
        others = await hive.clone(agent=ARGUS)
        before = refs(source, "refs/heads"), git(source, "status", "--porcelain", "--branch")
        pushed = commit(clone, "fix", branch="iris/fix")
        done = await hive.try_git(clone, "push", "origin", "iris/fix")
        assert done.returncode == 0, done.stderr
        assert refs(source, "refs/hive") == {"refs/hive/iris/iris/fix": pushed}
        assert (refs(source, "refs/heads"), git(source, "status", "--porcelain", "--branch")) == before
        await hive.git(others, "fetch", "--quiet", agent=ARGUS)
        assert git(others, "rev-parse", "origin/iris/fix") == pushed
        # It is lent, too.
        assert git(hive.lent(agent=ARGUS), "cat-file", "-t", pushed) == "commit"
        (event,) = await hive.events("project_pushed")
        told = json.loads(event["data"])
        assert (event["agent"], told["project"]) == ("iris", "site")
        assert told["refs"] == [
            {"ref": "refs/heads/iris/fix", "old": "0" * 40, "new": pushed, "at": "refs/hive/iris/iris/fix"}
        ]


async def test_what_was_pushed_is_on_the_host_also_when_the_mirror_is_made_anew(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source, push="*", tags=True)
        git(clone, "tag", "v1")
        commit(clone, branch="iris/fix")
        await hive.git(clone, "push", "--quiet", "origin", "iris/fix", "iris/fix:main", "v1")
        mirror = hive.mirrors.path(SITE)
        before = refs(mirror, "refs/heads") | refs(mirror, "refs/tags")
        mirror.rename(tmp_path / "away")
        await hive.mirrors.fetch(SITE)
        # The branches of the source itself are what they are there.
        main = {"refs/heads/main": git(source, "rev-parse", "main")}
        assert refs(mirror, "refs/heads") | refs(mirror, "refs/tags") == before | main
        git(source, "update-ref", "-d", "refs/hive/iris/iris/fix")  # as whoever has merged it may do
        await hive.mirrors.fetch(SITE)
        assert set(refs(mirror, "refs/heads")) == {"refs/heads/main"}


# One hive for them all: each costs seconds.
NOT_TO_BE_PUSHED = {
    "main": "main cannot be pushed: only iris/* may be pushed",
    "argus/x": "only iris/* may be pushed",
    "refs/tags/v1": "tags may not be pushed",
    "refs/hive/iris/x": "it is no branch",
    "refs/source/heads/main": "hidden ref",
    "refs/notes/x": "it is no branch",
    "refs/heads/iris/über": "it is no branch whose name is taken here",
    "refs/heads/iris/.x": "",
}


async def test_a_ref_that_may_not_be_pushed_is_refused_in_one_line(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        commit(clone)
        before = refs(source), refs(hive.mirrors.path(SITE))
        for to, cause in NOT_TO_BE_PUSHED.items():
            done = await hive.try_git(clone, "push", "origin", f"HEAD:{to}")
            assert done.returncode != 0, to
            assert cause in done.stderr, to
            assert (refs(source), refs(hive.mirrors.path(SITE))) == before


async def test_of_several_branches_all_are_pushed_or_none(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        commit(clone, branch="iris/a")
        done = await hive.try_git(clone, "push", "origin", "HEAD:iris/a", "HEAD:main")
        assert done.returncode != 0
        assert set(refs(source)) == {"refs/heads/main"}
        (event,) = await hive.events("push_refused")
        assert "main cannot be pushed" in json.loads(event["data"])["reason"]
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:iris/a", "HEAD:iris/b")
        assert {"refs/hive/iris/iris/a", "refs/hive/iris/iris/b"} < set(refs(source))


async def test_a_push_by_force_and_a_removal_take_leave(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        for key in ("receive.denyNonFastForwards", "receive.denyDeletes"):
            git(source, "config", key, "true")  # which is about branches of its own
        first = commit(clone, branch="iris/fix")
        await hive.git(clone, "push", "--quiet", "origin", "iris/fix")
        git(clone, "commit", "--quiet", "--amend", "--allow-empty", "-m", "another")
        second = git(clone, "rev-parse", "HEAD")
        done = await hive.try_git(clone, "push", "--force", "origin", "iris/fix")
        assert "it would lose commits" in done.stderr
        done = await hive.try_git(clone, "push", "origin", ":iris/fix")
        assert "it would be removed" in done.stderr
        assert refs(source)["refs/hive/iris/iris/fix"] == first
        await hive.list_projects({"name": "site", "force": True, "push": "*"})
        await hive.git(clone, "push", "--quiet", "--force", "origin", "iris/fix")
        assert refs(source)["refs/hive/iris/iris/fix"] == second
        await hive.git(clone, "push", "--quiet", "origin", ":iris/fix")
        assert "refs/hive/iris/iris/fix" not in refs(source)
        done = await hive.try_git(clone, "push", "origin", ":main")
        assert "a clone begins with it" in done.stderr


async def test_tags_are_pushed_where_they_may_and_never_moved(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source, tags=True)
        git(clone, "tag", "-a", "v1", "-m", "one")
        await hive.git(clone, "push", "--quiet", "origin", "v1")
        assert "refs/hive/iris/tags/v1" in refs(source)
        commit(clone, text="again\n")
        git(clone, "tag", "--force", "v1")
        done = await hive.try_git(clone, "push", "--force", "origin", "v1")
        assert "the tag is there already" in done.stderr


async def test_a_secret_of_the_hive_is_found_wherever_it_stands(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        folder = hive.services.state_dir / "credentials"
        folder.mkdir(mode=0o700)
        (folder / "claude-oauth-token").write_text(f"{SECRET}\n")
        clone = await begin(hive, source)
        first, line = (base64.b64encode(data).decode() for data in (b"openssh-key-v1\0" + b"\0" * 30, os.urandom(48)))
        key = "\n".join(["-----BEGIN OPENSSH PRIVATE KEY-----", first, line, "-----END OPENSSH PRIVATE KEY-----", ""])
        hive.mirrors.keys.put(SITE, ".key", key)
        in_base64 = base64.b64encode(f"user:{SECRET}:x".encode()).decode()
        places: dict[str, Callable[[], object]] = {
            "a file": lambda: commit(clone, "deep/config", text=f"{'x' * 3_000_000}token={SECRET}\n"),
            "the edge of what is read at once": lambda: commit(clone, text=f"{'x' * (1024 * 1024 - 10)}{SECRET}"),
            "a name": lambda: commit(clone, f"a/{SECRET}/b"),
            "a message": lambda: git(clone, "commit", "--quiet", "--allow-empty", "-m", f"with {SECRET}"),
            "base64": lambda: commit(clone, text=in_base64),
            "a line of a key": lambda: commit(clone, text=f"x\n{line}\n"),
            "an older commit": lambda: [commit(clone, "old", text=SECRET), commit(clone, "old", text="gone\n")],
        }
        for place, put in places.items():
            git(clone, "checkout", "--quiet", "-B", "iris/x", "origin/main")
            put()
            done = await hive.try_git(clone, "push", "origin", "iris/x")
            assert done.returncode != 0, place
            assert "holds a secret of the hive's (" in done.stderr, place
            assert SECRET not in done.stderr
            names = {"a file": "deep/config holds", "an older commit": "old holds"}
            assert names.get(place, "") in done.stderr
        assert set(refs(source)) == {"refs/heads/main"}
        # Nothing of it stays.
        git(hive.mirrors.path(SITE), "fsck", "--strict")
        assert "iris/x" not in await hive.git(clone, "ls-remote")
        events = await hive.events("push_refused")
        assert len(events) == len(places)
        # What every key of a kind begins with is no secret, nor is the end of one.
        git(clone, "checkout", "--quiet", "-B", "iris/x", "origin/main")
        commit(clone, text=f"{key.splitlines()[0]}\n{first}\n{key.splitlines()[-1]}\n")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")
        assert not [event for event in events if SECRET in event["data"]]


def test_a_secret_in_base64_is_found_whatever_stands_around_it() -> None:
    forms = [form for _, form in forms_of({"x": SECRET.encode()})]
    for before in range(7):
        for after in range(4):
            text = base64.b64encode(b"a" * before + SECRET.encode() + b"b" * after)
            assert any(form in text for form in forms)


async def test_a_push_that_is_too_large_is_refused_also_when_it_is_small_before_it_is_unpacked(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path, push_bytes=1_000_000) as hive:
        clone = await begin(hive, source)
        git(clone, "checkout", "--quiet", "-b", "iris/x")
        (clone / "noise").write_bytes(os.urandom(1_500_000))
        commit(clone)
        done = await hive.try_git(clone, "push", "origin", "iris/x")
        assert "pack exceeds maximum allowed size" in done.stderr
        git(clone, "reset", "--quiet", "--hard", "HEAD~1")
        (clone / "zeros").write_bytes(b"\0" * 20_000_000)
        commit(clone)
        done = await hive.try_git(clone, "push", "origin", "iris/x")
        assert "more than 15.3 MiB when it is unpacked" in done.stderr
        assert set(refs(source)) == {"refs/heads/main"}
        git(clone, "reset", "--quiet", "--hard", "HEAD~1")
        commit(clone, text="small\n")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")


async def test_thousands_of_refs_are_refused_at_once(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        lines = "".join(f"create refs/heads/iris/{number} HEAD\n" for number in range(1_000))
        (clone / ".git" / "lines").write_text(lines)
        git(clone, "-c", "alias.x=!git update-ref --stdin <.git/lines", "x")
        done = await hive.try_git(clone, "push", "origin", "refs/heads/iris/*:refs/heads/iris/*")
        assert done.returncode != 0
        assert "the limit is 100" in done.stderr
        assert set(refs(hive.mirrors.path(SITE), "refs/heads")) == {"refs/heads/main"}


def test_of_a_question_that_is_cut_off_nothing_is_believed(tmp_path: Path) -> None:
    line = f"{'0' * 40} {'1' * 40} refs/heads/iris/{'x' * 4_000}\n"
    asked = f"\n{line * 20}".encode()[: ASK_LIMIT_BYTES + 1]
    with pytest.raises(Refusal, match="more is pushed at once than may be"):
        parse_push(asked, tmp_path)


async def test_a_branch_beside_which_another_cannot_be_is_refused_before_it_is_sent_on(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        commit(clone)
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/x")
        done = await hive.try_git(clone, "push", "origin", "HEAD:refs/heads/iris/x/y")
        assert "refs/heads/iris/x is there, and git keeps one of the two" in done.stderr
        assert "refs/hive/iris/iris/x/y" not in refs(source)


async def test_objects_that_git_warns_of_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        blob = git(clone, "rev-parse", "HEAD:README")
        for mode, name in (("100644", ".git"), ("100644", ".."), ("120000", ".gitmodules")):
            (clone / "tree").write_bytes(f"{mode} {name}\0".encode() + bytes.fromhex(blob))
            tree = git(clone, "hash-object", "-t", "tree", "-w", "--literally", "tree")
            bad = git(clone, "commit-tree", tree, "-p", "HEAD", "-m", "bad")
            done = await hive.try_git(clone, "push", "origin", f"{bad}:refs/heads/iris/bad")
            assert done.returncode != 0
            assert set(refs(source)) == {"refs/heads/main"}
        events = await hive.events("push_refused")
        assert [json.loads(event["data"])["reason"] for event in events] == [NOT_TAKEN] * 3
        # Who only looks pushes nothing.
        await hive.try_git(clone, "push", "origin", "main:main")
        assert len(await hive.events("push_refused")) == 3


async def test_a_submodule_and_a_pointer_to_a_large_file_are_data(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        git(clone, "checkout", "--quiet", "-b", "iris/x")
        git(clone, "update-index", "--add", "--cacheinfo", f"160000,{'1' * 40},sub")
        commit(clone, "big.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")
        assert "refs/hive/iris/iris/x" in refs(source)


async def test_hooks_of_the_host_and_of_the_mirror_do_not_run_for_a_push(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        fired = tmp_path / "fired"
        for folder in (source / ".git" / "hooks", hive.mirrors.path(SITE) / "hooks"):
            folder.mkdir(exist_ok=True)
            for hook in ("pre-receive", "update", "post-receive", "post-update", "reference-transaction", "pre-push"):
                (folder / hook).write_text(f"#!/bin/sh\ntouch {fired}\n")
                (folder / hook).chmod(0o755)
        git(source, "config", "receive.denyNonFastForwards", "true")
        git(source, "config", "core.alternateRefsCommand", f"touch {fired}; :")
        commit(clone, branch="iris/x")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")
        assert not fired.exists()


async def test_what_is_pushed_to_the_branch_that_is_checked_out_leaves_the_files_as_they_are(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source, push="main")
        head = git(source, "rev-parse", "HEAD")
        pushed = commit(clone, text="pushed\n")
        await hive.git(clone, "push", "--quiet", "origin", "main")
        assert refs(source) == {"refs/heads/main": head, "refs/hive/iris/main": pushed}
        assert (source / "README").read_text() == "hello\n"


async def test_a_repository_that_takes_nothing_leaves_the_mirror_as_it_was(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        commit(clone, branch="iris/x")
        source.rename(tmp_path / "away")
        done = await hive.try_git(clone, "push", "origin", "iris/x")
        assert done.returncode != 0
        assert "iris/x" not in await hive.git(clone, "ls-remote")
        (tmp_path / "away").rename(source)
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")


def test_a_hook_whose_daemon_is_gone_says_so_and_moves_nothing(tmp_path: Path) -> None:
    ask, hooks_ask = os.pipe()
    hooks_answer, answer = os.pipe()
    for descriptor in (ask, answer):
        os.close(descriptor)  # as a daemon that died leaves them
    os.set_inheritable(hooks_ask, True)
    os.set_inheritable(hooks_answer, True)
    done = subprocess.run(
        [put_hook(tmp_path / "hooks") / "pre-receive"],
        input="",
        env={**os.environ, "HIVE_ASK": str(hooks_ask), "HIVE_ANSWER": str(hooks_answer)},
        pass_fds=(hooks_ask, hooks_answer),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the hive's daemon went away before all was pushed; push again" in done.stderr


async def test_what_whoever_pushes_says_of_a_branch_before_is_not_believed(tmp_path: Path) -> None:
    """A client of its own could say that the branch is not there yet, and overwrite it without leave."""
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        first = commit(clone, branch="iris/x")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")
        git(clone, "commit", "--quiet", "--amend", "--allow-empty", "-m", "another")
        mirror = hive.mirrors.path(SITE)
        other = git(clone, "rev-parse", "HEAD")
        judge = Judge(mirror, Project(name="site"), IRIS, 2**20, 60.0, lambda: None)
        for claimed in (NOTHING, git(source, "rev-parse", "HEAD")):
            push = Push(None, (Update("refs/heads/iris/x", claimed, other),))
            with pytest.raises(Refusal, match="it has moved meanwhile"):
                judge.check(push, {})
        assert refs(source)["refs/hive/iris/iris/x"] == first


async def test_an_agent_that_is_stopped_fetches_and_pushes_nothing(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        commit(clone, branch="iris/x")
        await hive.services.agents.want(IRIS, "paused", "operator")
        for words in (("push", "origin", "iris/x"), ("fetch", "origin")):
            done = await hive.try_git(clone, *words)
            assert "iris is paused by the operator" in done.stderr
        await hive.services.agents.want(IRIS, "up", "operator")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")


async def test_refusals_without_end_are_counted_and_some_of_them_told(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        for _ in range(REFUSALS_TOLD + 2):
            await hive.try_git(clone, "push", "origin", "HEAD:refs/heads/no")
        events = await hive.events("push_refused")
        assert len(events) == REFUSALS_TOLD
        assert hive.git_services.untold(IRIS) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes the owner of a repository")
async def test_root_writes_a_repository_of_another_user_as_that_user(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hive-t-") as place:
        os.chmod(place, 0o755)
        source = make_source(Path(place) / "source")
        for path in (source, *source.rglob("*")):
            os.chown(path, 12_345, 12_345, follow_symlinks=False)
        async with open_project_hive(tmp_path) as hive:
            clone = await begin(hive, source)
            pushed = commit(clone, branch="iris/x")
            await hive.git(clone, "push", "--quiet", "origin", "iris/x")
            assert refs_of_another(source)["refs/hive/iris/iris/x"] == pushed
            assert {path.stat().st_uid for path in source.rglob("*")} == {12_345}


def refs_of_another(repository: Path) -> dict[str, str]:
    said = git(repository, "-c", "safe.directory=*", "for-each-ref", "--format=%(refname) %(objectname)")
    return dict(line.split() for line in said.splitlines())
