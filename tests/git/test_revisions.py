"""What people call a commit, expanded to its id without asking the repository that agents write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from tests.checkouts import Checkout

IRIS = AgentName("iris")


@pytest.fixture
async def repos(tmp_path: Path) -> Repos:
    repos = Repos(tmp_path)
    await repos.create(IRIS, {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You read.\n"})
    return repos


@pytest.fixture
def iris(repos: Repos) -> Checkout:
    return Checkout(repos.proposed_dir / "iris" / "config")


@pytest.mark.parametrize("packed", [False, True])
async def test_a_branch_a_tag_head_and_an_abbreviation_are_expanded(repos: Repos, iris: Checkout, packed: bool) -> None:
    sha = iris.commit(CLAUDE__md="You read slowly.\n")
    iris.git("branch", "feature/slow-1.0")
    iris.git("tag", "v1")
    iris.git("tag", "-a", "-m", "a tag of its own", "v2")
    iris.git("symbolic-ref", "refs/heads/other", "refs/heads/feature/slow-1.0")
    if packed:
        iris.git("pack-refs", "--all")
        iris.git("gc", "-q")
    for given in ("main", "feature/slow-1.0", "v1", "v2", "other", "HEAD", sha[:7], sha[:12], sha):
        assert await repos.expand(IRIS, given) == sha
    iris.git("checkout", "-q", "--detach", "HEAD~1")
    assert await repos.expand(IRIS, "HEAD") == iris.head() != sha


async def test_a_branch_that_is_named_like_another_commit_is_not_guessed_at(repos: Repos, iris: Checkout) -> None:
    sha = iris.commit(CLAUDE__md="You read slowly.\n")
    iris.git("branch", sha[:8], "HEAD~1")
    with pytest.raises(Refusal, match=f"cannot tell which commit {sha[:8]} is") as caught:
        await repos.expand(IRIS, sha[:8])
    for each in (f"{sha[:12]} (an abbreviation)", f"{iris.git('rev-parse', 'HEAD~1')[:12]} (refs/heads/{sha[:8]})"):
        assert each in caught.value.message
    iris.git("branch", "-f", sha[:8], sha)
    assert await repos.expand(IRIS, sha[:8]) == sha


@pytest.mark.parametrize("given", ["", "-x", "a b", "../HEAD", "main~1", "main^{tree}", "@{-1}", "a\nb", None, 7])
async def test_what_is_no_name_is_refused(repos: Repos, given: object) -> None:
    with pytest.raises(Refusal, match="as a revision: give a branch, a tag, HEAD"):
        await repos.expand(IRIS, given)


@pytest.mark.parametrize("given", ["nothing", "0" * 7, "config", "heads/main"])
async def test_what_names_nothing_is_not_found(repos: Repos, given: str) -> None:
    with pytest.raises(Refusal, match=f"cannot find {given} in .*/proposed/iris/config"):
        await repos.expand(IRIS, given)


async def test_a_whole_id_is_itself_whatever_the_repository_is(repos: Repos, iris: Checkout) -> None:
    (iris.path / ".git").rename(iris.path / "gone")
    assert await repos.expand(IRIS, "a" * 40) == CommitSha("a" * 40)


async def test_nothing_in_the_place_of_a_ref_is_followed_or_waited_for(
    repos: Repos, iris: Checkout, tmp_path: Path
) -> None:
    heads = iris.path / ".git" / "refs" / "heads"
    (tmp_path / "secret").write_text(iris.head())
    (heads / "link").symlink_to(tmp_path / "secret")
    (heads / "folder").symlink_to(heads, target_is_directory=True)
    os.mkfifo(heads / "pipe")
    (heads / "self").write_text("ref: refs/heads/self\n")
    (heads / "out").write_text("ref: refs/../../../../../secret\n")
    (heads / "elsewhere").write_text(f"ref: {tmp_path}/secret\n")
    (heads / "long").write_text("f" * 100_000)
    for given in ("link", "folder/main", "pipe", "self", "out", "elsewhere", "long"):
        with pytest.raises(Refusal, match=f"cannot find {given}"):
            await repos.expand(IRIS, given)
