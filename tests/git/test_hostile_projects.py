"""What whoever pushes to a source, or to the hive, may try against a project and all who work on it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.git.test_pushes import begin
from tests.project_hives import SITE, commit, git, make_source, open_project_hive

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
