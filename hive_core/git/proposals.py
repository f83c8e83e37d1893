"""One commit from a repository that agents write into the applied one, when it may be deployed; and what it changes.

All of it is read in the quarantine, so that of a commit that is refused nothing arrives. Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hive_core.git.commit_contents import FILE_LIMIT_BYTES, NIX_FILES, kinds, read_contents, read_files
from hive_core.git.quarantine import dot_git, quarantine
from hive_core.git.sterile_git import GitFailed, GitLimits, run_git
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import mib
from hive_core.protocol.words import AgentName, CommitSha

DIFF_LIMIT_BYTES = 2 * 1024**2
COMMITS_LIMIT = 1_000  # from what an agent runs to what is proposed
HISTORY_LIMIT_BYTES = 64 * 1024**2  # of all that they bring
_DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--text", "--src-prefix=a/")


@dataclass(frozen=True, slots=True)
class Proposal:
    """A commit that was fetched and found deployable, and what it changes against `base`.

    changed   the files of NIX_FILES that it brings, or brings otherwise
    """

    sha: CommitSha
    base: CommitSha
    changed: tuple[str, ...]
    diff: str


def pin_of(sha: CommitSha) -> str:
    """The ref that keeps a proposal's commit in the applied repository."""
    return f"refs/proposed/{sha}"


def fetch_proposal(applied: Path, proposed: Path, name: AgentName, sha: CommitSha) -> Proposal:
    """Take a commit into the applied repository, pinned. Raises Refusal when it cannot be deployed, and GitFailed."""
    try:
        with (
            dot_git(proposed, name) as theirs,
            quarantine(applied.parent / f".{name}.quarantine", applied, theirs, name) as held,
        ):
            proposal = check_proposal(held, applied, name, sha)
            # Hashed and checked once more on arrival, by git; what nothing of the commit needs stays behind.
            words = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(held), f"{sha}:{pin_of(sha)}")
            run_git(applied, *words, limits=GitLimits(file_bytes=2 * HISTORY_LIMIT_BYTES))
            return proposal
    except GitFailed as failed:
        why = f"{failed}; `git fsck` in it may say more"
        raise Refusal("refused", f"cannot fetch {sha} from the configuration of {name}: {why}") from None


def check_proposal(held: Path, applied: Path, name: AgentName, sha: CommitSha) -> Proposal:
    """What a commit that is held somewhere is, against what its agent runs now. Raises as `fetch_proposal` does."""
    base = main_of(applied)
    if sha == base:
        raise Refusal("refused", f"cannot apply {sha[:12]}: it is what {name} runs already")
    (kind, _), *_ = kinds(held, [sha])
    if not kind:
        raise Refusal(
            "refused", f"cannot fetch {sha} from the configuration of {name}: it is not there; commit it first"
        )
    if kind != "commit":
        raise Refusal("refused", f"cannot apply {sha[:12]}: it is not a commit (`git rev-parse HEAD` gives one)")
    if not _is_ancestor(held, base, sha):
        fetch = "`git fetch ../deployed.bundle main` where git does not know that"
        why = f"it is not based on {base[:12]}, which {name} runs; rebase it ({fetch})"
        raise Refusal("refused", f"cannot apply {sha[:12]}: {why}")
    files, before = read_contents(held, sha).files, read_files(applied, base)
    _check_history(held, base, sha)
    changed = tuple(name for name in NIX_FILES if name in files and files[name] != before.get(name))
    return Proposal(sha, base, changed, diff_between(held, base, sha))


def diff_between(repository: Path, base: CommitSha, sha: CommitSha) -> str:
    """The whole difference between two commits. Raises Refusal when it is over DIFF_LIMIT_BYTES, and GitFailed."""
    try:
        words = ("-c", "core.quotePath=false", *_DIFF, "--dst-prefix=b/", base, sha)
        shown = run_git(repository, *words, limits=GitLimits(output_bytes=DIFF_LIMIT_BYTES))
    except GitFailed as failed:
        if failed.over == "output":
            raise Refusal(
                "refused", f"cannot apply {sha[:12]}: its diff is over {DIFF_LIMIT_BYTES:,} bytes; split it"
            ) from None
        raise
    return shown.decode("utf-8", "replace")


def main_of(repository: Path) -> CommitSha:
    return commit_at(repository, "refs/heads/main")


def commit_at(repository: Path, ref: str) -> CommitSha:
    """The commit that a ref of ours names. Raises GitFailed when there is none."""
    return CommitSha(run_git(repository, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}").decode().strip())


def _is_ancestor(repository: Path, base: CommitSha, sha: CommitSha) -> bool:
    # Not by rev-list, which believes the dates of commits.
    try:
        run_git(repository, "merge-base", "--is-ancestor", base, sha)
    except GitFailed as failed:
        if failed.code == 1:
            return False
        raise
    return True


def _check_history(held: Path, base: CommitSha, sha: CommitSha) -> None:
    """What comes along with a commit: few commits after `base`, and of them no object that no file could be."""
    most = f"--max-count={COMMITS_LIMIT + 1}"
    if int(run_git(held, "rev-list", "--count", most, sha, f"^{base}")) > COMMITS_LIMIT:
        raise Refusal(
            "refused",
            f"cannot apply {sha[:12]}: it is more than {COMMITS_LIMIT:,} commits after {base[:12]}; squash them",
        )
    objects = run_git(held, "rev-list", "--objects", "--no-object-names", sha, f"^{base}")
    said = run_git(held, "cat-file", "--batch-check=%(objectsize)", stdin=objects).decode()
    _check_measures(sha, base, [int(size) for size in said.split() if size.isdigit()])


def _check_measures(sha: CommitSha, base: CommitSha, sizes: Sequence[int]) -> None:
    since = f"cannot apply {sha[:12]}: of the commits since {base[:12]}"
    if (largest := max(sizes)) > FILE_LIMIT_BYTES:
        why = f"one holds an object of {largest:,} bytes, and the limit is {FILE_LIMIT_BYTES:,}"
        raise Refusal("refused", f"{since} {why}; take it out of each of them (`git rebase`)")
    if (whole := sum(sizes)) > HISTORY_LIMIT_BYTES:
        why = f"all together bring {mib(whole)}, and the limit is {mib(HISTORY_LIMIT_BYTES)}"
        raise Refusal("refused", f"{since} {why}; squash them")
