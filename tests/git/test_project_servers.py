"""Projects of a server, by http and by ssh: their credentials are the host's, and go to their own server alone."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from hive_core.git import remotes
from hive_core.git.mirrors import remove
from hive_core.protocol.refusal import Refusal
from tests.git_servers import serve_http, serve_ssh
from tests.project_hives import SITE, commit, git, make_source, open_project_hive

TOKEN = "a-token-of-the-project-0123456789"


def make_bare(folder: Path) -> Path:
    """A bare repository site.git with one commit, which takes pushes over http."""
    source = make_source(folder / "source")
    git(folder, "clone", "--quiet", "--bare", str(source), str(folder / "served" / "site.git"))
    bare = folder / "served" / "site.git"
    git(bare, "config", "http.receivepack", "true")
    return bare


def refs(repository: Path, below: str = "refs") -> dict[str, str]:
    said = git(repository, "for-each-ref", "--format=%(refname) %(objectname)", below)
    return dict(line.split() for line in said.splitlines())


async def test_a_project_of_an_http_server_is_cloned_and_pushed_to_with_its_token(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_http(bare.parent, TOKEN) as server:
        async with open_project_hive(tmp_path) as hive:
            with pytest.raises(Refusal, match="cannot add site"):
                await hive.mirrors.add(SITE, f"{server.url}/site.git", {}, "operator")
            with pytest.raises(Refusal, match="cannot add site"):
                await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": "another-token"}, "operator")
            added = await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": TOKEN}, "operator")
            assert added.credential == "token"
            file = hive.services.state_dir / "credentials" / "projects" / "site.token"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            pushed = commit(clone, "fix", branch="iris/fix")
            await hive.git(clone, "push", "--quiet", "origin", "iris/fix")
            assert refs(bare)["refs/heads/iris/fix"] == pushed
            assert refs(hive.mirrors.path(SITE))["refs/source/heads/iris/fix"] == pushed
            # It is gone from the mirror once it is gone there.
            git(bare, "branch", "--delete", "--force", "iris/fix")
            await hive.mirrors.fetch(SITE)
            assert "refs/heads/iris/fix" not in refs(hive.mirrors.path(SITE))
            for path in (hive.mirrors.path(SITE), hive.lent(), clone):
                assert not [one for one in path.rglob("*") if one.is_file() and TOKEN.encode() in one.read_bytes()]
            (event,) = await hive.events("project_added")
            assert TOKEN not in event["data"]


async def test_a_branch_that_moved_on_the_server_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_http(bare.parent) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {}, "operator")
            await hive.list_projects({"name": "site", "push": "*", "force": True})
            clone = await hive.clone()
            commit(clone, text="iris\n")
            other = commit(tmp_path / "source", text="ada\n")
            git(tmp_path / "source", "push", "--quiet", str(bare), "main")
            for force in ([], ["--force"]):
                done = await hive.try_git(clone, "push", *force, "origin", "main")
                assert f"{server.url}/site.git has moved meanwhile; fetch, and push again" in done.stderr
                assert refs(bare)["refs/heads/main"] == other
            await hive.mirrors.fetch(SITE)
            await hive.git(clone, "pull", "--quiet", "--rebase", "--strategy-option=theirs")
            await hive.git(clone, "push", "--quiet", "origin", "main")
            assert refs(bare)["refs/heads/main"] == git(clone, "rev-parse", "HEAD")


async def test_a_servers_own_no_is_told_to_the_agent_and_moves_nothing(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    (bare / "hooks").mkdir(exist_ok=True)
    (bare / "hooks" / "pre-receive").write_text("#!/bin/sh\necho this branch is protected\nexit 1\n")
    (bare / "hooks" / "pre-receive").chmod(0o755)
    with serve_http(bare.parent) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {}, "operator")
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            commit(clone, branch="iris/x")
            done = await hive.try_git(clone, "push", "origin", "iris/x", "iris/x:iris/y")
            assert "this branch is protected" in done.stderr
            assert set(refs(hive.mirrors.path(SITE), "refs/heads")) == {"refs/heads/main"}
            (event,) = await hive.events("push_refused")
            assert "protected" in json.loads(event["data"])["reason"]


async def test_a_server_that_repeats_the_token_is_quoted_to_nobody(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    (bare / "hooks").mkdir(exist_ok=True)
    long = "x" * 380  # so that what is told would end within it
    (bare / "hooks" / "pre-receive").write_text(f"#!/bin/sh\necho {long} {TOKEN}\nexit 1\n")
    (bare / "hooks" / "pre-receive").chmod(0o755)
    with serve_http(bare.parent, TOKEN) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": TOKEN}, "operator")
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            commit(clone, branch="iris/x")
            done = await hive.try_git(clone, "push", "origin", "iris/x")
            assert "did not take it, and what it says holds a secret of the hive's" in done.stderr
            (event,) = await hive.events("push_refused")
            assert TOKEN[:8] not in done.stderr + event["data"]


@pytest.mark.parametrize("form", [TOKEN, base64.b64encode(f"hive:{TOKEN}".encode()).decode()])
async def test_a_server_that_repeats_the_token_to_a_fetch_is_quoted_to_nobody(tmp_path: Path, form: str) -> None:
    bare = make_bare(tmp_path)
    with serve_http(bare.parent, TOKEN) as server:
        async with open_project_hive(tmp_path) as hive:
            added = await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": TOKEN}, "operator")
            server.error = "not today"
            with pytest.raises(Refusal, match=r"cannot fetch site: .*not today"):
                await hive.mirrors.fetch(SITE)
            server.error = f"who is {form}?"
            with pytest.raises(Refusal, match=r"cannot fetch site: .* holds the project's own token") as caught:
                await hive.mirrors.fetch(SITE)
            assert form not in str(caught.value) + str((await hive.mirrors.projects.get(added.name)).trouble)


async def test_of_several_branches_the_server_takes_all_or_none(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    (bare / "hooks").mkdir(exist_ok=True)
    (bare / "hooks" / "update").write_text('#!/bin/sh\n[ "$1" != refs/heads/iris/y ]\n')
    (bare / "hooks" / "update").chmod(0o755)
    with serve_http(bare.parent) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {}, "operator")
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            commit(clone, branch="iris/x")
            assert (await hive.try_git(clone, "push", "origin", "iris/x", "iris/x:iris/y")).returncode != 0
            for repository in (bare, hive.mirrors.path(SITE)):
                assert set(refs(repository, "refs/heads")) == {"refs/heads/main"}


async def test_a_push_that_the_server_has_already_comes_to_its_end(tmp_path: Path) -> None:
    """As after a daemon that died between the server's yes and the mirror's."""
    bare = make_bare(tmp_path)
    with serve_http(bare.parent) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {}, "operator")
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            pushed = commit(clone, branch="iris/x")
            git(clone, "push", "--quiet", str(bare), "iris/x")
            await hive.git(clone, "push", "--quiet", "origin", "iris/x")
            assert refs(hive.mirrors.path(SITE))["refs/heads/iris/x"] == pushed


async def test_a_redirect_takes_no_token_anywhere(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_http(bare.parent, TOKEN) as server, serve_http(tmp_path, "x") as stranger:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": TOKEN}, "operator")
            server.elsewhere = stranger.url
            with pytest.raises(Refusal, match=r"cannot fetch site: .*give the url that it redirects to"):
                await hive.mirrors.fetch(SITE)
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            commit(clone, branch="iris/x")
            assert (await hive.try_git(clone, "push", "origin", "iris/x")).returncode != 0
            assert stranger.authorizations == []


async def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it takes all of project_fetch_s, and a place of the few that fetch at once."""
    monkeypatch.setattr(remotes, "STALL_S", 1)
    async with open_project_hive(tmp_path) as hive:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/site.git"
            with pytest.raises(Refusal, match="too slow"):
                await hive.mirrors.add(SITE, url, {}, "operator")


async def test_a_token_goes_over_no_wire_that_others_read(tmp_path: Path) -> None:
    async with open_project_hive(tmp_path) as hive:
        for host in ("git.example", "localhost.git.example", "127.0.0.1.git.example"):
            with pytest.raises(Refusal, match="use https"):
                await hive.mirrors.add(SITE, f"http://{host}/site.git", {"token": TOKEN}, "operator")


async def test_a_project_of_an_ssh_server_is_cloned_and_pushed_to_with_its_key(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_ssh(tmp_path / "sshd") as server:
        async with open_project_hive(tmp_path) as hive:
            url, key = f"{server.url}{bare}", server.key.read_text()
            with pytest.raises(Refusal, match="give --key FILE"):
                await hive.mirrors.add(SITE, url, {}, "operator")
            other = (tmp_path / "sshd" / "host").read_text()
            with pytest.raises(Refusal, match="Permission denied"):
                await hive.mirrors.add(SITE, url, {"key": other}, "operator")
            added = await hive.mirrors.add(SITE, url, {"key": key}, "operator")
            assert added.credential == "key"
            known = hive.services.state_dir / "credentials" / "projects" / "site.known_hosts"
            assert server.host_key in known.read_text()
            await hive.list_projects({"name": "site"})
            clone = await hive.clone()
            pushed = commit(clone, "fix", branch="iris/fix")
            await hive.git(clone, "push", "--quiet", "origin", "iris/fix")
            assert refs(bare)["refs/heads/iris/fix"] == pushed


async def test_a_disk_that_is_full_takes_no_other_credential_and_leaves_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    bare = make_bare(tmp_path)
    with serve_http(bare.parent, TOKEN) as server:
        async with open_project_hive(tmp_path) as hive:
            await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": TOKEN}, "operator")
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", full)
                with pytest.raises(Refusal, match="cannot reach site: no space is left"):
                    await hive.mirrors.add(SITE, f"{server.url}/site.git", {"token": "another-token"}, "operator")
            await hive.mirrors.fetch(SITE)


async def test_a_project_is_given_another_token_while_agents_work_on_it(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_http(bare.parent, TOKEN) as server:
        async with open_project_hive(tmp_path) as hive:
            mirrors, url = hive.mirrors, f"{server.url}/site.git"
            await mirrors.add(SITE, url, {"token": TOKEN}, "operator")
            await hive.list_projects({"name": "site"})
            server.token = another = "another-token-of-the-project"
            with pytest.raises(Refusal, match=r"Authentication failed.*`hive project add NAME URL --token FILE`"):
                await mirrors.fetch(SITE)
            with pytest.raises(Refusal, match=r"cannot reach site: .*Authentication failed"):
                await mirrors.add(SITE, url, {"token": "a-token-that-is-wrong"}, "operator")
            file = hive.services.state_dir / "credentials" / "projects" / "site.token"
            assert file.read_text() == f"{TOKEN}\n"
            for place, given in ((url, {}), (f"{server.url}/other.git", {"token": another})):
                with pytest.raises(Refusal, match="there is one of that name"):
                    await mirrors.add(SITE, place, given, "operator")
            assert (await mirrors.add(SITE, url, {"token": another}, "operator")).trouble is None
            assert len(await hive.events("project_credential_changed")) == 1
            clone = await hive.clone()
            commit(clone, "fix", branch="iris/fix")
            await hive.git(clone, "push", "--quiet", "origin", "iris/fix")


async def test_a_hive_without_its_keys_as_behind_a_backup_is_given_them_again(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_ssh(tmp_path / "sshd") as server:
        async with open_project_hive(tmp_path) as hive:
            mirrors, url, key = hive.mirrors, f"{server.url}{bare}", server.key.read_text()
            await mirrors.add(SITE, url, {"key": key}, "operator")
            shutil.rmtree(hive.services.state_dir / "credentials")
            remove(mirrors.path(SITE))
            with pytest.raises(Refusal, match="--host-key"):
                await mirrors.fetch(SITE)
            assert (await mirrors.add(SITE, url, {"key": key}, "operator")).trouble is None
            assert refs(mirrors.path(SITE), "refs/heads") == refs(bare, "refs/heads")


async def test_a_host_key_is_the_one_that_was_given_or_seen_first(tmp_path: Path) -> None:
    bare = make_bare(tmp_path)
    with serve_ssh(tmp_path / "sshd") as server:
        async with open_project_hive(tmp_path) as hive:
            url, key = f"{server.url}{bare}", server.key.read_text()
            other = " ".join((tmp_path / "sshd" / "user.pub").read_text().split()[:2])
            with pytest.raises(Refusal, match="Host key verification failed"):
                await hive.mirrors.add(SITE, url, {"key": key, "host_key": other}, "operator")
            await hive.mirrors.add(SITE, url, {"key": key, "host_key": f"example.org {server.host_key}"}, "operator")
            known = hive.services.state_dir / "credentials" / "projects" / "site.known_hosts"
            known.write_text(known.read_text().replace(server.host_key, other))
            with pytest.raises(Refusal, match="Host key verification failed"):
                await hive.mirrors.fetch(SITE)


async def test_a_key_or_token_that_cannot_be_one_is_not_quoted(tmp_path: Path) -> None:
    async with open_project_hive(tmp_path) as hive:
        for given in (
            {"key": "hunter2-hunter2"},
            {"key": "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nhunter2"},
            {"key": 7},
        ):
            with pytest.raises(Refusal) as refused:
                await hive.mirrors.add(SITE, "git@git.example:site", given, "operator")
            assert "hunter2" not in refused.value.message
        for token in ("hunter2", "hunter2 hunter2", "hunter2hünter2", ["hunter2"]):
            with pytest.raises(Refusal) as refused:
                await hive.mirrors.add(SITE, "https://git.example/site", {"token": token}, "operator")
            assert "hunter2" not in refused.value.message
        given = {"key": "-----BEGIN X PRIVATE KEY-----\nAAAA\n", "host_key": "* ssh-ed25519 junk"}
        with pytest.raises(Refusal, match="cannot use this host key"):
            await hive.mirrors.add(SITE, "git@git.example:site", given, "operator")
