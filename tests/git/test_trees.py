"""What a commit may hold: any reasonable tree of text, shown whole; and what is not is refused by name and limit."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_core.git import commit_contents, proposals
from hive_core.git.commit_contents import DEPTH_LIMIT, FILE_LIMIT_BYTES, FILES_LIMIT, PATH_LIMIT_BYTES
from hive_core.git.proposals import COMMITS_LIMIT
from hive_core.git.repos import Repos
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from tests.checkouts import Checkout
from tests.git.raw_objects import blob, commit, commit_with, known, raw_tree, store, tree
from tests.hives import clean_environment

IRIS = AgentName("iris")
FILES = {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You read.\n"}


@pytest.fixture
async def repos(tmp_path: Path) -> Repos:
    repos = Repos(tmp_path)
    await repos.create(IRIS, FILES)
    return repos


@pytest.fixture
def iris(repos: Repos) -> Checkout:
    return Checkout(repos.proposed_dir / "iris" / "config")


def fill(checkout: Checkout, files: dict[str, str]) -> CommitSha:
    for name, text in files.items():
        (path := checkout.path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return checkout.commit()


def applied(repos: Repos, *arguments: str) -> str:
    command = ["git", "--git-dir", str(repos.proposed_dir.parent / "applied" / "iris.git"), *arguments]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout


async def test_a_commit_of_500_files_in_folders_is_shown_whole_and_taken_as_it_is(repos: Repos, iris: Checkout) -> None:
    files = {f"skills/s{n % 25}/step {n}/SKILL.md": f"Do {n} naïvely.\n" * 5 for n in range(500)}
    fill(iris, files)
    script = iris.path / "tools" / "rün.sh"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    sha = iris.commit()
    proposal = await repos.fetch(IRIS, sha)
    assert all(f"+++ b/{name}" in proposal.diff for name in files)
    assert proposal.diff.count("naïvely.") == 2500
    assert "b/tools/rün.sh\nnew file mode 100755" in proposal.diff
    await repos.deploy(IRIS, 1, sha, proposal.base)
    assert applied(repos, "ls-tree", "-r", "main") == iris.git("ls-tree", "-r", "HEAD") + "\n"
    assert (await repos.read(IRIS, sha))["prompt"] == FILES["CLAUDE.md"]


async def test_a_file_that_goes_and_one_whose_mode_changes_are_shown(repos: Repos, iris: Checkout) -> None:
    first = fill(iris, {"prompts/a.md": "a\n", "prompts/b.sh": "b\n"})
    base = (await repos.fetch(IRIS, first)).base
    await repos.deploy(IRIS, 1, first, base)
    (iris.path / "prompts" / "a.md").unlink()
    (iris.path / "prompts" / "b.sh").chmod(0o755)
    diff = (await repos.fetch(IRIS, iris.commit())).diff
    assert "deleted file mode 100644" in diff
    assert "old mode 100644\nnew mode 100755" in diff


async def test_as_much_as_the_limits_allow_is_taken(repos: Repos, iris: Checkout) -> None:
    deep = "/".join("d" * DEPTH_LIMIT)
    long = "x" * (PATH_LIMIT_BYTES - 4)
    entry = blob(iris, b"x\n")
    many = tree(iris, [(b"100644", b"%d" % n, entry) for n in range(FILES_LIMIT - 4)])
    fill(iris, {deep: "deep\n", f"abc/{long}": "long\n"})
    listed = iris.git("ls-tree", "HEAD").splitlines()
    folders = [line.split() for line in listed if line.startswith("040000")]
    kept = [(b"40000", name.encode(), object_id) for _, _, object_id, name in folders]
    proposal = await repos.fetch(IRIS, commit_with(iris, *kept, (b"40000", b"many", many)))
    assert proposal.diff.count("\nnew file mode") + proposal.diff.startswith("new file") == FILES_LIMIT - 2


def nested(checkout: Checkout, depth: int, wide: int = 1) -> CommitSha:
    """Directories within directories, each held `wide` times: little to store, and much to walk."""
    inner = tree(checkout, [(b"100644", b"x", blob(checkout, b"x\n"))])
    for _ in range(depth - 1):
        inner = tree(checkout, [(b"40000", b"%d" % n, inner) for n in range(wide)])
    return commit_with(checkout, (b"40000", b"bomb", inner))


def named(name: bytes, mode: bytes = b"100644") -> Callable[[Checkout], CommitSha]:
    return lambda checkout: commit_with(checkout, (mode, name, blob(checkout, b"x\n")))


def below(name: bytes) -> Callable[[Checkout], CommitSha]:
    def make(checkout: Checkout) -> CommitSha:
        inner = tree(checkout, [(b"100644", name, blob(checkout, b"x\n"))])
        return commit_with(checkout, (b"40000", b"skills", inner))

    return make


def twice(first: bytes, second: bytes) -> Callable[[Checkout], CommitSha]:
    def make(checkout: Checkout) -> CommitSha:
        one, other = blob(checkout, b"one\n"), blob(checkout, b"other\n")
        entries = sorted([*known(checkout), (b"100644", first, one), (b"100644", second, other)], key=lambda e: e[1])
        return CommitSha(commit(checkout, raw_tree(checkout, entries), checkout.head()))

    return make


def too_many(checkout: Checkout) -> CommitSha:
    entry = blob(checkout, b"x\n")
    many = tree(checkout, [(b"100644", b"%d" % n, entry) for n in range(FILES_LIMIT - 1)])
    return commit_with(checkout, (b"40000", b"many", many))


def too_many_folders(checkout: Checkout) -> CommitSha:
    """Of each path nothing is left but its length: a tree of empty trees has no file that could be counted."""
    empty = tree(checkout, [])
    many = tree(checkout, [(b"40000", b"%d" % n, empty) for n in range(FILES_LIMIT)])
    return commit_with(checkout, (b"40000", b"many", many))


def too_large(checkout: Checkout) -> CommitSha:
    return commit_with(checkout, (b"100644", b"large", blob(checkout, b"x" * (FILE_LIMIT_BYTES + 1))))


def too_large_together(checkout: Checkout) -> CommitSha:
    entry = blob(checkout, b"x" * FILE_LIMIT_BYTES)
    return commit_with(checkout, *((b"100644", b"f%d" % n, entry) for n in range(17)))


def no_tree(checkout: Checkout) -> CommitSha:
    return CommitSha(commit(checkout, blob(checkout, b"x\n"), checkout.head()))


def a_link(checkout: Checkout) -> CommitSha:
    return commit_with(checkout, (b"120000", b"notes.md", blob(checkout, b"CLAUDE.md")))


def a_submodule(checkout: Checkout) -> CommitSha:
    return commit_with(checkout, (b"160000", b"lib", checkout.head()))


def a_tree_that_is_cut(checkout: Checkout) -> CommitSha:
    whole = b"100644 x\0" + bytes.fromhex(blob(checkout, b"x\n"))
    return commit_with(checkout, (b"40000", b"cut", store(checkout, "tree", whole[:-1])))


def a_blob_for_a_tree(checkout: Checkout) -> CommitSha:
    as_a_tree = b"100644 x\0" + bytes.fromhex(blob(checkout, b"x\n"))
    return commit_with(checkout, (b"40000", b"false", blob(checkout, as_a_tree)))


def a_commit_for_a_tree(checkout: Checkout) -> CommitSha:
    return CommitSha(commit(checkout, checkout.head(), checkout.head()))


def a_tree_for_a_blob(checkout: Checkout) -> CommitSha:
    return commit_with(checkout, (b"100644", b"false", tree(checkout, known(checkout))))


def a_commit_of_a_megabyte(checkout: Checkout) -> CommitSha:
    header = b"x-note " + b"x" * 1_000_000 + b"\n"
    return CommitSha(commit(checkout, tree(checkout, known(checkout)), checkout.head(), header=header))


def ten_thousand_parents(checkout: Checkout) -> CommitSha:
    parents = [checkout.head()] * 10_000
    return CommitSha(commit(checkout, tree(checkout, known(checkout)), *parents))


def a_long_history(checkout: Checkout) -> CommitSha:
    head, whole = checkout.head(), tree(checkout, [*known(checkout), (b"100644", b"x", blob(checkout, b"x"))])
    for _ in range(COMMITS_LIMIT + 1):
        head = CommitSha(commit(checkout, whole, head))
    return head


def a_large_file_in_history(checkout: Checkout) -> CommitSha:
    checkout.commit(huge="x" * (FILE_LIMIT_BYTES + 1))
    (checkout.path / "huge").unlink()
    return checkout.commit(CLAUDE__md="You read slowly.\n")


REGULAR = "only regular files in directories are deployed"
PLAIN = "a name that is not plain"
REFUSED: dict[str, tuple[Callable[[Checkout], CommitSha], str]] = {
    "too many files": (too_many, "it holds more than 2,000 files"),
    "too many directories": (too_many_folders, "it holds more than 2,000 files or directories"),
    "too deep": (lambda checkout: nested(checkout, DEPTH_LIMIT), "is more than 12 directories deep"),
    "ten million paths by shared trees": (lambda checkout: nested(checkout, 8, 10), "it holds more than 2,000"),
    "too long a path": (named(b"x" * (PATH_LIMIT_BYTES + 1)), "over the limit of 240 bytes"),
    "too large a file": (too_large, r"large is over the limit of 1,048,576 bytes \(it has 1,048,577\)"),
    "too much together": (too_large_together, "the limit is 16,777,216"),
    "a link": (a_link, f"notes.md is a symbolic link; {REGULAR}"),
    "a submodule": (a_submodule, f"lib is a submodule; {REGULAR}"),
    "a mode of old": (named(b"x", b"100664"), f"x is of mode 100664; {REGULAR}"),
    "a mode that is none": (named(b"x", b"0100644"), "x is of mode 0100644"),
    "two entries of one name": (twice(b"x", b"x"), "x and x differ by case at most"),
    "two names that differ by case": (twice(b"Skill.md", b"skill.md"), "Skill.md and skill.md differ by case"),
    "two names that look alike": (twice("e\u0301".encode(), "\u00e9".encode()), "differ by case at most"),
    "not UTF-8": (named(b"\xff"), "a name that is not UTF-8"),
    "a newline": (named(b"a\nb"), PLAIN),
    "an escape": (named(b"a\x1b[31m"), PLAIN),
    "a slash": (named(b"a/b"), PLAIN),
    "a backslash": (named(b"a\\b"), PLAIN),
    "dots": (named(b".."), PLAIN),
    "bidi": (named("a\u202eb".encode()), PLAIN),
    "a blank at the end": (named(b"agent.nix "), PLAIN),
    "a dot at the end": (named(b"agent.nix."), PLAIN),
    "a stream of NTFS": (named(b".git::$INDEX_ALLOCATION"), PLAIN),
    ".git as HFS+ reads it": (named(".g\u200cit".encode()), PLAIN),
    ".git": (below(b".git"), "'.git', which git would read for itself"),
    ".GIT": (below(b".GIT"), "'.GIT', which git would read for itself"),
    "git~1": (below(b"git~1"), "'git~1', which git"),
    "attributes": (below(b".gitattributes"), "'.gitattributes', which git"),
    "attributes of another case": (named(b".GitAttributes"), "'.GitAttributes', which git"),
    "short attributes": (named(b"GITATT~1"), "'GITATT~1', which git"),
    "modules": (named(b".gitmodules"), "'.gitmodules', which git"),
    "a tree that is none": (no_tree, "cannot (fetch|apply)"),
    "a tree that is cut": (a_tree_that_is_cut, "its tree cut/ is not as git writes one"),
    "a blob that reads as a tree": (a_blob_for_a_tree, "cannot fetch .* not a tree"),
    "a commit in the place of its tree": (a_commit_for_a_tree, "cannot fetch .* not a tree"),
    "a tree in the place of a file": (a_tree_for_a_blob, "false is a tree by another name"),
    "a commit of a megabyte": (a_commit_of_a_megabyte, "the commit itself has .* and the limit is 65,536"),
    "ten thousand parents": (ten_thousand_parents, "the commit itself has"),
    "a long history": (a_long_history, "more than 1,000 commits after"),
    "a large file in its history": (a_large_file_in_history, "one holds an object of 1,048,577 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_no_card_could_show_is_refused_by_name_and_nothing_of_it_arrives(
    repos: Repos, iris: Checkout, case: str
) -> None:
    make, words = REFUSED[case]
    sha = make(iris)
    before = applied(repos, "count-objects", "-v")
    with pytest.raises(Refusal, match=words) as caught:
        await repos.fetch(IRIS, sha)
    assert caught.value.code == "refused"
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()
    assert applied(repos, "count-objects", "-v") == before
    assert applied(repos, "for-each-ref", "refs/proposed") == ""
    assert [path.name for path in (repos.proposed_dir.parent / "applied").iterdir()] == ["iris.git"]


async def test_a_gitignore_is_a_file_like_any_other(repos: Repos, iris: Checkout) -> None:
    assert "+*.log" in (await repos.fetch(IRIS, iris.commit(__gitignore="*.log\n"))).diff


async def test_a_diff_says_what_is_there_when_git_would_call_it_binary(repos: Repos, iris: Checkout) -> None:
    """Text that is not like text: control characters, no newline, a line of its own that begins like a header."""
    sha = iris.commit(data="\x01\x02\x7f\r+++ b/CLAUDE.md")
    assert "\n+\x01\x02\x7f\r+++ b/CLAUDE.md\n\\ No newline" in (await repos.fetch(IRIS, sha)).diff


async def test_the_limits_are_said_where_they_are_set() -> None:
    """Each measure is one constant; a sentence that names another would lie."""
    assert (commit_contents.FILES_LIMIT, commit_contents.DEPTH_LIMIT) == (2_000, 12)
    assert proposals.DIFF_LIMIT_BYTES == 2 * FILE_LIMIT_BYTES
