"""git.sock: an agent fetches what it lists, and nothing else."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import trio

from tests.project_hives import ARGUS, IRIS, SITE, commit, git, make_source, open_project_hive


def say(path: Path, line: bytes) -> dict[str, object]:
    """What the socket answers a line with."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(line)
        said = client.makefile("rb").readline()
        answer: dict[str, object] = json.loads(said)
        return answer


async def test_an_agent_clones_what_it_lists_and_borrows_its_objects(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        clone = await hive.clone()
        assert git(clone, "rev-parse", "HEAD") == git(source, "rev-parse", "HEAD")
        assert git(clone, "count-objects", "-v").splitlines()[:4] == [
            "count: 0",
            "size: 0",
            "in-pack: 0",
            "packs: 0",
        ]
        second = commit(source, text="again\n")
        await hive.mirrors.fetch(SITE)
        await hive.git(clone, "pull", "--quiet")
        assert git(clone, "rev-parse", "HEAD") == second
        # It borrows, and could do without.
        alone = tmp_path / "alone"
        await hive.git(tmp_path, "clone", "--quiet", "hive://site", str(alone))
        git(alone, "fsck", "--strict")


async def test_nobody_is_shown_what_the_source_has_beside_branches_and_tags(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    git(source, "tag", "v1")
    git(source, "update-ref", "refs/notes/x", "HEAD")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        said = await hive.git(tmp_path, "ls-remote", "hive://site")
        assert {line.split()[1] for line in said.splitlines()} == {"HEAD", "refs/heads/main", "refs/tags/v1"}


async def test_what_an_agent_does_not_list_is_refused_with_the_way_to_it(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        done = await hive.try_git(tmp_path, "ls-remote", "hive://site", agent=ARGUS)
        assert done.returncode != 0
        assert "it is not in `projects` of your agent.toml (none); ask hm1nd" in done.stderr
        await hive.list_projects({"name": "gone"}, agent=ARGUS)
        done = await hive.try_git(tmp_path, "ls-remote", "hive://gone", agent=ARGUS)
        assert "there is no project gone" in done.stderr


ASK_FOR_SOMETHING_ELSE = [
    b"junk\n",
    b"[]\n",
    b"{}\n",
    b'{"service": "git-upload-archive", "project": "site"}\n',
    b'{"service": "git-upload-pack", "project": "../site"}\n',
    b'{"service": ["git-upload-pack"], "project": "site"}\n',
    b'{"service": "git-upload-pack", "project": "site"}\n0000',
    b'{"service": "git-upload-pack", "project": "' + b"s" * 8192 + b'"}\n',
]


async def test_a_line_that_asks_for_something_else_is_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        for line in ASK_FOR_SOMETHING_ELSE:
            answer = await trio.to_thread.run_sync(say, hive.sockets[IRIS], line)
            assert answer["ok"] is False


async def test_a_protocol_that_is_not_gits_is_left_out(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        line = b'{"service": "git-upload-pack", "project": "site", "protocol": "version=2\\nX=1"}\n'
        assert (await trio.to_thread.run_sync(say, hive.sockets[IRIS], line))["ok"] is True


async def test_a_mirror_that_is_not_there_is_made_anew_for_whoever_clones(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", "trunk")
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(source), {}, "operator")
        await hive.list_projects({"name": "site"})
        hive.mirrors.path(SITE).rename(tmp_path / "away")
        assert "refs/heads/trunk" in await hive.git(tmp_path, "ls-remote", "hive://site")
