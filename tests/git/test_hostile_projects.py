"""What whoever pushes to a source, or to the hive, may try against a project and all who work on it."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import textwrap
from pathlib import Path

import pytest
import trio
import trio.testing

from hive_core.git import pushes
from hive_core.git.mirrors import NOTHING
from hive_core.sockets.git import AT_ONCE
from tests.git.test_pushes import SECRET, begin
from tests.project_hives import ARGUS, IRIS, SITE, commit, git, make_source, open_project_hive

# Names of branches that git takes, and that end or part a line, or a word, for other programs; and one of no UTF-8.
NAMES = (b"caf\xe9", "a\u00a0b".encode(), "a\u2028refs/heads/b".encode(), "a\u0085b".encode())


async def test_branches_of_any_name_that_git_takes_are_followed_and_stop_nobody(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        head = git(source, "rev-parse", "HEAD")
        for name in NAMES:
            place = os.path.join(os.fsencode(source / ".git" / "refs" / "heads"), name)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            Path(os.fsdecode(place)).write_text(f"{head}\n")
        git(source, "symbolic-ref", "HEAD", os.fsdecode(b"refs/heads/" + NAMES[1]))  # which people could not read
        assert (await hive.mirrors.fetch(SITE)).branch == "main"
        commit(clone, branch="iris/x")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")
        there = os.fsencode(git(hive.mirrors.path(SITE), "-c", "core.quotePath=false", "for-each-ref", "refs/heads"))
        assert all(b"refs/heads/" + name in there for name in NAMES)
        for name in NAMES:
            os.unlink(os.path.join(os.fsencode(source / ".git" / "refs" / "heads"), name))
        git(source, "symbolic-ref", "HEAD", "refs/heads/main")
        await hive.mirrors.fetch(SITE)
        assert set(git(hive.mirrors.path(SITE), "for-each-ref", "--format=%(refname)", "refs/heads").split()) == {
            "refs/heads/main",
            "refs/heads/iris/x",
        }


async def test_a_secret_is_found_in_lines_in_other_letters_and_in_a_branchs_name_and_told_nowhere(
    tmp_path: Path,
) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        folder = hive.services.state_dir / "credentials"
        folder.mkdir(mode=0o700)
        (folder / "claude-oauth-token").write_text(f"{SECRET}\n")
        clone = await begin(hive, source, push="*")
        in_lines = "\n  ".join(textwrap.wrap(SECRET, 20))
        texts = {
            "base64 with lines": base64.encodebytes(f"user:{SECRET}\n".encode()).decode(),
            "base64 of urls": base64.urlsafe_b64encode(f"{SECRET}ÿþÿ".encode()).decode(),
            "lines": f"token: |\n  {in_lines}\n",
            "UTF-16": f"a {SECRET} b".encode("utf-16").decode("latin-1"),
        }
        refused = 0
        for place, text in texts.items():
            git(clone, "checkout", "--quiet", "-B", "iris/x", "origin/main")
            (clone / "f").write_bytes(text.encode("latin-1") if place == "UTF-16" else text.encode())
            commit(clone)
            done = await hive.try_git(clone, "push", "origin", "iris/x")
            assert "f holds a secret of the hive's (" in done.stderr, place
            refused += 1
        # Where names are told, too.
        git(clone, "checkout", "--quiet", "-B", "iris/x", "origin/main")
        commit(clone, f"{SECRET}/{SECRET}", text=SECRET)
        done = await hive.try_git(clone, "push", "origin", "iris/x")
        assert "holds a secret of the hive's (" in done.stderr
        assert SECRET not in done.stderr
        done = await hive.try_git(clone, "push", "origin", f"origin/main:refs/heads/{SECRET}")
        assert "the name of a branch holds a secret of the hive's (" in done.stderr
        events = await hive.events("push_refused")
        assert len(events) == refused + 2
        assert not [event for event in events if SECRET in event["data"]]
        assert set(git(source, "for-each-ref", "--format=%(refname)").split()) == {"refs/heads/main"}


async def test_pushes_make_no_mirror_larger_than_it_may_be(tmp_path: Path) -> None:
    """Else no fetch would take it any more, and nobody could work on the project."""
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path, project_bytes=2**20) as hive:
        clone = await begin(hive, source)
        for branch, there in (("iris/a", True), ("iris/b", False)):
            (clone / branch.replace("/", "-")).write_bytes(os.urandom(700_000))
            commit(clone, branch=branch)
            done = await hive.try_git(clone, "push", "origin", branch)
            assert (done.returncode == 0) is there, done.stderr
        assert "its mirror would have 1.3 MiB, and project_bytes is 1.0 MiB; the operator can raise that" in done.stderr
        await hive.mirrors.fetch(SITE)


async def test_pushes_leave_a_source_room_for_its_own_branches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "PUSHED_REFS_LIMIT", 3)
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/a", "HEAD:refs/heads/iris/b")
        done = await hive.try_git(clone, "push", "origin", "HEAD:refs/heads/iris/c")
        assert "it would have more than 3 branches and tags; remove some" in done.stderr
        commit(clone)
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/a")


def push_signed(path: Path, certificate: list[bytes], pack: bytes) -> bytes:
    """A push as a client of its own would do it: what is signed comes with it though nobody asked for that."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b'{"service": "git-receive-pack", "project": "site"}\n')
        with client.makefile("rb") as said:
            assert said.readline() == b'{"ok":true}\n'
            while (size := int(said.read(4), 16)) > 0:
                said.read(size - 4)
            lines = [b"push-cert\0report-status\n", *certificate, b"push-cert-end\n"]
            client.sendall(b"".join(b"%04x%b" % (len(line) + 4, line) for line in lines) + b"0000" + pack)
            client.shutdown(socket.SHUT_WR)
            return said.read()


async def test_a_push_that_is_signed_is_refused_leaves_nothing_and_has_no_program_run(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    fired = tmp_path / "fired"
    for name in ("gpg", "ssh-keygen"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {fired}\n")
        (tmp_path / name).chmod(0o700)
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        new = commit(clone, branch="iris/x")
        pack = clone / "pushed"
        git(clone, "-c", "alias.x=!echo HEAD | git pack-objects --revs --stdout >pushed", "x")
        for kind in ("PGP", "SSH"):
            certificate = ["certificate version 0.1", "pusher iris", "nonce 1", "x" * 5000, ""]
            certificate += [f"{NOTHING} {new} refs/heads/iris/x"]
            certificate += [f"-----BEGIN {kind} SIGNATURE-----", "x", f"-----END {kind} SIGNATURE-----"]
            lines = [f"{line}\n".encode() for line in certificate]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
                said = await trio.to_thread.run_sync(push_signed, hive.sockets[IRIS], lines, pack.read_bytes())
            assert b"ng refs/heads/iris/x pre-receive hook declined" in said
        assert not fired.exists()
        assert "count: 0\n" in git(hive.mirrors.path(SITE), "count-objects", "-v")
        await hive.git(clone, "push", "--quiet", "origin", "iris/x")


def ask(path: Path) -> socket.socket:
    """A connection that has asked for site, and whose answer nobody has read."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(path))
    client.sendall(b'{"service": "git-upload-pack", "project": "site"}\n')
    return client


async def test_whoever_waits_for_its_turn_gets_nothing_that_was_taken_off_its_list_meanwhile(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        await begin(hive, source)
        with contextlib.ExitStack() as held:
            served = [held.enter_context(ask(hive.sockets[IRIS])) for _ in range(AT_ONCE)]
            for client in served:
                assert await trio.to_thread.run_sync(client.recv, 12) == b'{"ok":true}\n'
            waiting = held.enter_context(ask(hive.sockets[IRIS]))
            await trio.testing.wait_all_tasks_blocked()  # so it was read, and waits
            await hive.list_projects()
            served[0].close()
            assert b"it is not in `projects` of your agent.toml" in await trio.to_thread.run_sync(waiting.recv, 4096)


async def test_a_branch_that_another_agent_removed_does_not_come_back_with_the_next_fetch(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source, push="*")
        await hive.list_projects({"name": "site", "push": "*", "force": True}, agent=ARGUS)
        commit(clone, branch="shared")
        await hive.git(clone, "push", "--quiet", "origin", "shared")
        await hive.mirrors.fetch(SITE)
        others = await hive.clone(agent=ARGUS)
        await hive.git(others, "push", "--quiet", "origin", ":shared", agent=ARGUS)
        await hive.mirrors.fetch(SITE)
        assert "shared" not in await hive.git(clone, "ls-remote")
        assert "refs/hive/iris/shared" in git(source, "for-each-ref")  # what iris gave is the operator's to remove
        commit(clone)
        await hive.git(clone, "push", "--quiet", "origin", "shared")
        assert "shared" in await hive.git(others, "ls-remote", agent=ARGUS)
