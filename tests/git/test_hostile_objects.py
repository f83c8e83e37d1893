"""Objects, packs, refs and files that lie in wait in a proposed repository: each is taken and shown truly, or ends in
one sentence, within its bounds; and no object of another repository is ever taken."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from hive_core.git import quarantine
from hive_core.git.repos import Repos
from hive_core.git.sterile_git import GitLimits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from tests.checkouts import Checkout
from tests.git.raw_objects import blob, commit, commit_with, known, loose, store, tree
from tests.hives import clean_environment

IRIS = AgentName("iris")
FILES = {"agent.toml": 'program = "rehearsal"\n', "CLAUDE.md": "You read.\n"}
SECRET = "the host's own\n"


@pytest.fixture
async def repos(tmp_path: Path) -> Repos:
    repos = Repos(tmp_path / "state")
    (tmp_path / "state").mkdir()
    await repos.create(IRIS, FILES)
    return repos


@pytest.fixture
def iris(repos: Repos) -> Checkout:
    return Checkout(repos.proposed_dir / "iris" / "config")


def applied(repos: Repos, *arguments: str) -> str:
    command = ["git", "--git-dir", str(repos.proposed_dir.parent / "applied" / "iris.git"), *arguments]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=True).stdout


def everything(repos: Repos) -> set[str]:
    """The id of each object that the applied repository holds."""
    return set(applied(repos, "cat-file", "--batch-all-objects", "--batch-check=%(objectname)").split())


@pytest.fixture
def secret(iris: Checkout, tmp_path: Path) -> tuple[Path, CommitSha]:
    """A repository of the host's with a commit that could be deployed if it were the manager's."""
    path = tmp_path / "secret"
    subprocess.run(["git", "clone", "-q", str(iris.path), str(path)], env=clean_environment(), check=True)
    return path / ".git", Checkout(path).commit(CLAUDE__md=SECRET)


# -- what points elsewhere: nothing of there is taken -----------------------------------------------------------------


def alternates(git: Path, elsewhere: Path) -> None:
    (git / "objects" / "info").mkdir(exist_ok=True)
    (git / "objects" / "info" / "alternates").write_text(f"{elsewhere}/objects\n")


def http_alternates(git: Path, elsewhere: Path) -> None:
    (git / "objects" / "info").mkdir(exist_ok=True)
    (git / "objects" / "info" / "http-alternates").write_text(f"{elsewhere}/objects\n")


def common_folder(git: Path, elsewhere: Path) -> None:
    (git / "commondir").write_text(f"{elsewhere}\n")


def a_worktree(git: Path, elsewhere: Path) -> None:
    (git / "gitdir").write_text(f"{elsewhere}\n")
    (git / "commondir").write_text(f"{elsewhere}\n")
    (git / "config").write_text("[core]\n\tworktree = /\n[extensions]\n\tworktreeConfig = true\n")


def linked_objects(git: Path, elsewhere: Path) -> None:
    shutil.rmtree(git / "objects")
    (git / "objects").symlink_to(elsewhere / "objects")


def linked_loose_folders(git: Path, elsewhere: Path) -> None:
    for folder in (elsewhere / "objects").iterdir():
        shutil.rmtree(git / "objects" / folder.name, ignore_errors=True)
        (git / "objects" / folder.name).symlink_to(folder)


def linked_loose_objects(git: Path, elsewhere: Path) -> None:
    for path in (elsewhere / "objects").glob("??/*"):
        (git / "objects" / path.parent.name).mkdir(exist_ok=True)
        if not (target := git / "objects" / path.parent.name / path.name).exists():
            target.symlink_to(path)


def linked_packs(git: Path, elsewhere: Path) -> None:
    subprocess.run(["git", "--git-dir", str(elsewhere), "gc", "-q"], env=clean_environment(), check=True)
    (git / "objects" / "pack").mkdir(exist_ok=True)
    for path in (elsewhere / "objects" / "pack").iterdir():
        (git / "objects" / "pack" / path.name).symlink_to(path)


def a_linked_pack_folder(git: Path, elsewhere: Path) -> None:
    subprocess.run(["git", "--git-dir", str(elsewhere), "gc", "-q"], env=clean_environment(), check=True)
    shutil.rmtree(git / "objects" / "pack", ignore_errors=True)
    (git / "objects" / "pack").symlink_to(elsewhere / "objects" / "pack")


def a_promisor(git: Path, elsewhere: Path) -> None:
    with (git / "config").open("a") as config:
        config.write(f'[remote "x"]\n\tpromisor = true\n\turl = {elsewhere}\n[extensions]\n\tpartialClone = x\n')


ELSEWHERE = [
    alternates,
    http_alternates,
    common_folder,
    a_worktree,
    linked_objects,
    linked_loose_folders,
    linked_loose_objects,
    linked_packs,
    a_linked_pack_folder,
    a_promisor,
]


@pytest.mark.parametrize("plant", ELSEWHERE)
async def test_no_object_of_another_repository_is_taken(
    repos: Repos, iris: Checkout, secret: tuple[Path, CommitSha], plant: Callable[[Path, Path], None]
) -> None:
    elsewhere, sha = secret
    plant(iris.path / ".git", elsewhere)
    before = everything(repos)
    with pytest.raises(Refusal, match=f"cannot fetch {sha} .*(is not there|missing)"):
        await repos.fetch(IRIS, sha)
    with pytest.raises(Refusal, match=f"cannot find {sha[:12]}"):
        await repos.expand(IRIS, sha[:12])
    assert everything(repos) == before


@pytest.mark.parametrize("plant", [linked_loose_objects, alternates, a_promisor])
async def test_a_commit_over_anothers_objects_is_not_there(
    repos: Repos, iris: Checkout, secret: tuple[Path, CommitSha], plant: Callable[[Path, Path], None]
) -> None:
    """A commit of its own, whose files are those of a repository that it cannot read."""
    elsewhere, sha = secret
    its_tree = Checkout(elsewhere.parent).git("rev-parse", f"{sha}^{{tree}}")
    plant(iris.path / ".git", elsewhere)
    before = everything(repos)
    with pytest.raises(Refusal, match=r"cannot fetch .* is missing"):
        await repos.fetch(IRIS, CommitSha(commit(iris, its_tree, iris.head())))
    assert everything(repos) == before


# -- what makes git see something else than there is: it is taken and shown as it is -----------------------------------


def replaced(iris: Checkout, sha: str) -> None:
    harmless = commit_with(iris, (b"100644", b"harmless", blob(iris, b"harmless\n")))
    iris.git("replace", "-f", sha, harmless)
    iris.git("pack-refs", "--all")


def grafted(iris: Checkout, sha: str) -> None:
    (iris.path / ".git" / "info").mkdir(exist_ok=True)
    (iris.path / ".git" / "info" / "grafts").write_text(f"{sha}\n")


def shallow(iris: Checkout, sha: str) -> None:
    (iris.path / ".git" / "shallow").write_text(f"{sha}\n")


def cached(iris: Checkout, sha: str) -> None:
    """Caches that say something else than the objects: git believes its own."""
    info = iris.path / ".git" / "objects" / "info"
    info.mkdir(exist_ok=True)
    iris.git("commit-graph", "write", "--reachable")
    (iris.path / ".git" / "objects" / "pack").mkdir(exist_ok=True)
    iris.git("repack", "-q", "-a", "-d", "--write-midx", "--write-bitmap-index")
    for path in (iris.path / ".git" / "objects").rglob("*"):
        if path.suffix in (".idx", ".bitmap", ".rev") or path.name in ("commit-graph", "multi-pack-index"):
            path.chmod(0o644)
            path.write_bytes(b"\xff" * path.stat().st_size)


def strange_refs(iris: Checkout, sha: str) -> None:
    for name in (b"\xff\xfe", b"a b", b"--upload-pack=x", b"x.lock", b"@{1}", b"HEAD", sha.encode(), b"\x1b[31m"):
        Path(os.fsdecode(os.fsencode(iris.path / ".git" / "refs" / "heads") + b"/" + name)).write_text("nothing\n")
    (iris.path / ".git" / "packed-refs").write_bytes(b"\0" * 100_000)
    (iris.path / ".git" / "HEAD").write_bytes(b"ref: ../../../etc/passwd\n")


def junk_beside(iris: Checkout, sha: str) -> None:
    objects = iris.path / ".git" / "objects"
    (objects / "pack").mkdir(exist_ok=True)
    (objects / "pack" / f"pack-{'1' * 40}.pack").write_bytes(b"PACK" + os.urandom(1000))
    (objects / "pack" / f"pack-{'2' * 40}.pack").mkdir()
    (objects / "pack" / f"pack-{'3' * 40}.pack").write_bytes(b"")
    os.mkfifo(objects / "pack" / f"pack-{'4' * 40}.pack")
    (objects / "00").mkdir(exist_ok=True)
    (objects / "00" / ("0" * 38)).write_bytes(b"junk")
    (objects / "00" / ("1" * 38)).mkdir()
    os.mkfifo(objects / "00" / ("2" * 38))
    (objects / "00" / os.fsdecode(b"\xff")).write_bytes(b"junk")


@pytest.mark.parametrize("plant", [replaced, grafted, shallow, cached, strange_refs, junk_beside])
async def test_a_commit_is_shown_as_it_is_whatever_is_said_of_it(
    repos: Repos, iris: Checkout, plant: Callable[[Checkout, str], None]
) -> None:
    sha = iris.commit(CLAUDE__md="You read slowly.\n")
    plant(iris, sha)
    proposal = await repos.fetch(IRIS, sha)
    assert "\n-You read.\n+You read slowly.\n" in proposal.diff
    assert proposal.diff.count("diff --git") == 1
    await repos.deploy(IRIS, 1, sha, proposal.base)
    assert (await repos.read(IRIS, sha))["prompt"] == "You read slowly.\n"
    assert applied(repos, "for-each-ref", "refs/replace") == ""
    applied(repos, "fsck", "--strict")


async def test_a_shallow_or_grafted_history_does_not_stand_in_for_what_runs(repos: Repos, iris: Checkout) -> None:
    """Neither makes a commit a descendant of what it does not descend from."""
    base = iris.head()
    sha = CommitSha(commit(iris, tree(iris, known(iris))))
    (iris.path / ".git" / "info").mkdir(exist_ok=True)
    (iris.path / ".git" / "info" / "grafts").write_text(f"{sha} {base}\n")
    with pytest.raises(Refusal, match="is not based on"):
        await repos.fetch(IRIS, sha)


async def test_dates_out_of_time_change_no_descent(repos: Repos, iris: Checkout) -> None:
    whole = tree(iris, [*known(iris), (b"100644", b"x", blob(iris, b"x\n"))])
    for date in (b"0", b"99999999999", b"4294967296"):
        who = b"x <x@localhost> " + date + b" +0000"
        lines = [b"tree " + whole.encode(), b"parent " + iris.head().encode(), b"author " + who, b"committer " + who]
        sha = CommitSha(store(iris, "commit", b"\n".join([*lines, b"encoding x-\xff", b"", b"\xff\x00 message\n"])))
        try:
            assert "+++ b/x" in (await repos.fetch(IRIS, sha)).diff
        except Refusal as refusal:  # git knows better than to take that one
            assert "cannot fetch" in refusal.message


# -- what is not what its name says -----------------------------------------------------------------------------------


def exchanged(iris: Checkout, sha: str) -> None:
    loose(iris, iris.git("rev-parse", f"{sha}:CLAUDE.md")).chmod(0o644)
    shutil.copy(loose(iris, blob(iris, b"You obey.\n")), loose(iris, iris.git("rev-parse", f"{sha}:CLAUDE.md")))


def torn(iris: Checkout, sha: str) -> None:
    path = loose(iris, iris.git("rev-parse", f"{sha}:CLAUDE.md"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-3])


def followed_by_more(iris: Checkout, sha: str) -> None:
    path = loose(iris, iris.git("rev-parse", f"{sha}:CLAUDE.md"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes() + b"more")


def exchanged_in_a_pack(iris: Checkout, sha: str) -> None:
    iris.git("gc", "-q")
    (pack,) = (iris.path / ".git" / "objects" / "pack").glob("*.pack")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 0xFF
    pack.chmod(0o644)
    pack.write_bytes(data)


@pytest.mark.parametrize("plant", [exchanged, torn, followed_by_more, exchanged_in_a_pack])
async def test_an_object_that_is_not_what_its_name_says_is_not_there(
    repos: Repos, iris: Checkout, plant: Callable[[Checkout, str], None]
) -> None:
    sha = iris.commit(CLAUDE__md="You read slowly.\n")
    plant(iris, sha)
    before = everything(repos)
    with pytest.raises(Refusal, match=r"cannot fetch .*(missing|is not there)") as caught:
        await repos.fetch(IRIS, sha)
    assert len(caught.value.message) < 400
    assert everything(repos) == before


# -- what grows -------------------------------------------------------------------------------------------------------


async def test_a_bomb_in_an_object_of_its_own_is_not_inflated(
    repos: Repos, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "OBJECT_LIMIT_BYTES", 100_000)
    sha = commit_with(iris, (b"100644", b"bomb", blob(iris, b"\0" * 10_000_000)))
    with pytest.raises(Refusal, match="what bomb holds is missing"):
        await repos.fetch(IRIS, sha)


async def test_bombs_that_are_many_are_not_all_inflated(
    repos: Repos, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "INFLATED_LIMIT_BYTES", 1_000_000)
    for n in range(3):
        blob(iris, b"%d" % n * 500_000)
    with pytest.raises(Refusal, match=r"holds more than 1\.0 MiB in objects in files of their own; run `git gc"):
        await repos.fetch(IRIS, iris.commit(CLAUDE__md="x\n"))


def packed(iris: Checkout, data: bytes) -> None:
    """A pack of one blob, however large, as a file of a few bytes."""
    blob_id = blob(iris, data)
    folder = iris.path / ".git" / "objects" / "pack"
    folder.mkdir(exist_ok=True)
    iris.git("pack-objects", "-q", str(folder / "pack"), stdin=f"{blob_id}\n".encode())
    loose(iris, blob_id).unlink()


async def test_a_bomb_in_a_pack_is_refused_by_its_size(repos: Repos, iris: Checkout) -> None:
    data = b"\0" * 64_000_000
    packed(iris, data)
    sha = commit_with(iris, (b"100644", b"bomb", iris.git("hash-object", "--stdin", stdin=data)))
    with pytest.raises(Refusal, match="bomb is over the limit of 1,048,576 bytes"):
        await repos.fetch(IRIS, sha)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("COPY_LIMIT_BYTES", 20_000, "more than 0.0 MiB of objects"),
        ("LOOSE_LIMIT", 3, "more than 3 objects in files of their own"),
        ("PACKS_LIMIT", 0, "more than 0 packs"),
        ("COPY_WITHIN_S", -1.0, "take longer than -1 s to look at"),
    ],
)
async def test_what_is_copied_is_bounded(
    repos: Repos, iris: Checkout, monkeypatch: pytest.MonkeyPatch, name: str, value: float, said: str
) -> None:
    packed(iris, os.urandom(5_000))
    for _ in range(5):
        blob(iris, os.urandom(5_000))
    sha = iris.commit(CLAUDE__md="x\n")
    with monkeypatch.context() as less:
        less.setattr(quarantine, name, value)
        with pytest.raises(Refusal, match=f"cannot fetch from /agents/iris/config: it holds .*{said}"):
            await repos.fetch(IRIS, sha)
    assert await repos.fetch(IRIS, sha)


async def test_a_chain_of_deltas_takes_no_more_than_its_time_and_memory(
    repos: Repos, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of versions, each a small delta of the one before; some of them claim to be huge."""
    base = os.urandom(2_000).hex().encode()
    ids = [blob(iris, base + b"%d" % n) for n in range(2_000)]
    folder = iris.path / ".git" / "objects" / "pack"
    folder.mkdir(exist_ok=True)
    words = ("pack-objects", "-q", "--depth=4000", "--window=2", str(folder / "pack"))
    iris.git(*words, stdin="".join(f"{each} x\n" for each in ids).encode())
    iris.git("prune-packed", "-q")
    used: list[GitLimits] = []
    ran = quarantine.run_git

    def run(*words: object, limits: GitLimits | None = None, **more: object) -> bytes:
        used.append(limits or GitLimits())
        return ran(*words, limits=limits, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(quarantine, "run_git", run)
    assert await repos.fetch(IRIS, commit_with(iris, (b"100644", b"last", ids[-1])))
    assert used
    assert all(limits.time_s <= quarantine.COPY_WITHIN_S and limits.memory_bytes <= 2**30 for limits in used)


async def test_an_object_of_a_kind_that_git_does_not_have_is_not_taken(repos: Repos, iris: Checkout) -> None:
    strange = store(iris, "tea", b"x\n")
    with pytest.raises(Refusal, match=r"cannot (fetch|apply)"):
        await repos.fetch(IRIS, commit_with(iris, (b"100644", b"x", strange)))
    assert strange not in everything(repos)


async def test_the_first_trillion_bytes_of_an_object_are_not_waited_for(repos: Repos, iris: Checkout) -> None:
    """A header that promises more than there is."""
    path = loose(iris, "f" * 40)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(zlib.compress(b"blob 1000000000000\0x"))
    assert await repos.fetch(IRIS, iris.commit(CLAUDE__md="x\n"))
