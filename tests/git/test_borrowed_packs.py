"""What clones of agents borrow of a mirror."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hive_core.git.mirrors import export
from tests.hives import clean_environment
from tests.project_hives import IRIS, SITE, make_source, open_project_hive


def git(*words: str | Path, said: str | None = None, **variables: str) -> str:
    environment = {**clean_environment(), **variables}
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *map(str, words)]
    done = subprocess.run(command, env=environment, input=said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit(repository: Path, word: str, branch: str = "main") -> str:
    """Another commit of a bare repository, in a pack of its own."""
    lines = f"commit refs/heads/{branch}\ncommitter a <a@b> 1 +0000\ndata 1\nx\n"
    parent = subprocess.run(
        ["git", "--git-dir", repository, "rev-parse", "-q", "--verify", branch], capture_output=True
    )
    lines += f"from refs/heads/{branch}^0\n" if parent.returncode == 0 else ""
    git("--git-dir", repository, "fast-import", "--quiet", said=f"{lines}M 100644 inline {word}\ndata 1\n{word}\n")
    return git("--git-dir", repository, "rev-parse", branch)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    mirror = tmp_path / "mirrors" / "x.git"
    git("init", "-q", "--bare", "-b", "main", mirror)
    git("--git-dir", mirror, "config", "fastimport.unpackLimit", "0")
    commit(mirror, "a")
    return mirror


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "agents" / "iris" / "mirrors" / "x"


def clone(mirror: Path, place: Path, target: Path) -> None:
    git("clone", "-q", "--reference", place, mirror.as_uri(), target)


def test_a_clone_that_borrows_has_all_that_the_mirror_has_and_no_object_of_its_own(
    tmp_path: Path, mirror: Path, place: Path
) -> None:
    export(mirror, place)
    clone(mirror, place, tmp_path / "clone")
    assert (tmp_path / "clone" / "a").read_text() == "a"
    counted = git("-C", tmp_path / "clone", "count-objects", "-v").splitlines()
    assert counted[:4] == ["count: 0", "size: 0", "in-pack: 0", "packs: 0"], "nothing was sent"
    linked = list((place / "objects" / "pack").glob("*.pack"))
    assert [file.stat().st_nlink for file in linked] == [2], "nothing was copied"


def test_what_comes_later_is_fetched_without_a_pack_and_found_by_a_git_that_reads_since_before(
    tmp_path: Path, mirror: Path, place: Path
) -> None:
    export(mirror, place)
    clone(mirror, place, tmp_path / "clone")
    reading = subprocess.Popen(
        ["git", "-C", tmp_path / "clone", "cat-file", "--batch-check", "--buffer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reading.stdin is not None
    old = git("-C", tmp_path / "clone", "rev-parse", "HEAD")
    print(old, file=reading.stdin, flush=True)
    new = commit(mirror, "b")
    git("--git-dir", mirror, "repack", "-q", "-a", "-d")
    export(mirror, place)
    assert len(list((place / "objects" / "pack").glob("*.pack"))) == 1, "those that were packed anew are gone"
    said, _ = reading.communicate(f"{old}^{{tree}}\n{new}\n")
    assert [line.split()[1] for line in said.splitlines()] == ["commit", "tree", "commit"]
    git("-C", tmp_path / "clone", "fetch", "-q")
    assert git("-C", tmp_path / "clone", "rev-parse", "origin/main") == new
    assert not list((tmp_path / "clone" / ".git" / "objects" / "pack").iterdir())
    git("-C", tmp_path / "clone", "fsck", "--strict")


def test_where_no_link_can_be_made_the_packs_are_copied(
    mirror: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    export(mirror, place)
    assert git("--git-dir", place, "log", "--format=%s") == "x"


async def test_an_agent_whose_turn_begins_is_lent_what_it_lacks_before_it_is_told_of_its_projects(
    tmp_path: Path,
) -> None:
    async with open_project_hive(tmp_path) as hive:
        await hive.mirrors.add(SITE, str(make_source(tmp_path / "source")), {}, "operator")
        await hive.list_projects({"name": "site"})
        # As behind a revival, or before the daemon came to it after the deployment.
        shutil.rmtree(hive.lent())
        await hive.mirrors.of(IRIS)
        assert git("--git-dir", hive.lent(), "log", "--format=%s") == "Change README"
