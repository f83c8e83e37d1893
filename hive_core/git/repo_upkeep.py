"""An applied repository as its rows have it: the tags that a daemon which died did not set, and nothing of proposals
that nobody needs any more. Everything here blocks; whoever calls sees to it that nothing else writes there meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hive_core.git.commit_contents import kinds
from hive_core.git.sterile_git import GitLimits, run_git
from hive_core.protocol.words import AgentName, CommitSha

LOOSE_MOST = 2_000  # objects in files of their own, before all are packed
PACKS_MOST = 20
_PACKING = GitLimits(time_s=120.0, file_bytes=64 * 1024**3)


@dataclass(frozen=True, slots=True)
class Tag:
    """name: such as denied/12. note: why, where there is something to say."""

    name: str
    sha: CommitSha
    note: str = ""


@dataclass(frozen=True, slots=True)
class Needed:
    """commits: whose pins stay. numbers: of the approvals whose tags stay; what was deployed keeps its tag anyway."""

    commits: frozenset[str]
    numbers: frozenset[int]


def set_tags(repository: Path, tags: Sequence[Tag]) -> None:
    """Set those that are missing, of commits that are there. A tag that is there is left as it is."""
    known = set(_refs(repository, "refs/tags"))
    missing = [tag for tag in tags if f"refs/tags/{tag.name}" not in known]
    there = kinds(repository, [tag.sha for tag in missing])
    for tag, (kind, _) in zip(missing, there, strict=True):
        if kind == "commit":
            message = ("-a", "--cleanup=verbatim", "-m", tag.note) if tag.note else ()
            run_git(repository, "tag", *message, tag.name, tag.sha)


def deployed_tags(repository: Path) -> dict[str, CommitSha]:
    """The tags of what was deployed, and their commits."""
    listed = run_git(repository, "for-each-ref", "--format=%(refname:lstrip=2) %(objectname)", "refs/tags/deployed")
    return {tag: CommitSha(sha) for tag, sha in (line.split() for line in listed.decode().splitlines())}


def clear_leavings(repository: Path, name: AgentName) -> None:
    """Remove what a git or a daemon that was killed left: locks, and half a repository."""
    for lock in (repository / "HEAD.lock", repository / "packed-refs.lock", *(repository / "refs").rglob("*.lock")):
        lock.unlink(missing_ok=True)
    for left in (f".{name}.quarantine", f".{name}.new"):
        shutil.rmtree(repository.parent / left, ignore_errors=True)


def tidy(repository: Path, needed: Needed) -> bool:
    """Drop the pins and tags that are not needed, and the objects that nothing holds then.

    False when a backup reads the repositories just now: nothing is done.
    """
    with alone(repository.parent) as ours:
        if not ours:
            return False
        dropped = [ref for ref in _refs(repository, "refs/proposed", "refs/tags") if not _is_needed(ref, needed)]
        if dropped:
            lines = "".join(f"delete {ref}\n" for ref in dropped)
            run_git(repository, "update-ref", "--no-deref", "--stdin", stdin=lines.encode())
        if dropped or _is_scattered(repository):
            run_git(repository, "repack", "-a", "-d", "-q", limits=_PACKING)
            run_git(repository, "prune", "--expire=now", limits=_PACKING)
        return True


@contextmanager
def alone(applied_dir: Path, *, reading: bool = False) -> Iterator[bool]:
    """Whether nobody reads the applied repositories while objects go (or nobody drops any, while they are read).

    Whoever reads waits for that; whoever tidies does so another time. Between processes: a backup is one of its own.
    """
    folder = os.open(applied_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_SH if reading else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        with contextlib.suppress(OSError):
            os.close(folder)


def _refs(repository: Path, *where: str) -> list[str]:
    return run_git(repository, "for-each-ref", "--format=%(refname)", *where).decode().split()


def _is_needed(ref: str, needed: Needed) -> bool:
    if ref.startswith("refs/proposed/"):
        return ref.removeprefix("refs/proposed/") in needed.commits
    tag = re.fullmatch(r"refs/tags/([a-z]+)/(\d+)", ref)
    return tag is None or tag[1] == "deployed" or int(tag[2]) in needed.numbers


def _is_scattered(repository: Path) -> bool:
    said = dict(re.findall(r"^([a-z-]+): (\d+)$", run_git(repository, "count-objects", "-v").decode(), re.MULTILINE))
    return int(said["count"]) > LOOSE_MOST or int(said["packs"]) > PACKS_MOST
