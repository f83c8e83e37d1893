"""Names that people give to commits of a repository that agents write, expanded to whole ids.

Refs are read by ourselves, as files: git, asked there, would heed what agents configured.
"""

from __future__ import annotations

import re
from pathlib import Path

from hive_core.git.commit_contents import kinds
from hive_core.git.quarantine import dot_git, quarantine, read_small
from hive_core.git.sterile_git import GitFailed, run_git
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha, shown

REF_LIMIT_BYTES = 4 * 1024
PACKED_LIMIT_BYTES = 4 * 1024**2
_HOPS = 5  # of a ref that names another
_ABBREVIATED = re.compile(r"[0-9a-f]{7,40}")
_NAME = re.compile(r"[A-Za-z0-9_@+][A-Za-z0-9_@+.-]*(/[A-Za-z0-9_@+][A-Za-z0-9_@+.-]*)*")
_SHA = re.compile(r"[0-9a-f]{40}")


def expand_revision(applied: Path, proposed: Path, name: AgentName, given: object) -> CommitSha:
    """The commit that a branch, a tag, HEAD, or the first digits of an id name in a proposed repository. Blocks.

    Raises Refusal when they name none, or more than one; and GitFailed.
    """
    if not isinstance(given, str) or len(given) > 200 or not _NAME.fullmatch(given):
        how = "give a branch, a tag, HEAD, or the id of a commit or its first 7 digits"
        raise Refusal("usage", f"cannot use {shown(given)} as a revision: {how}")
    if _SHA.fullmatch(given):
        return CommitSha(given)
    with dot_git(proposed, name) as theirs:
        named = {ref: sha for ref in _refs(given) if (sha := _read_ref(ref, theirs, _HOPS))}
        with quarantine(applied.parent / f".{name}.quarantine", applied, theirs, name) as held:
            found = {sha: ref for ref, at in named.items() if (sha := _commit(held, at))}
            found |= dict.fromkeys(_abbreviated(held, given), "an abbreviation")
    where = proposed / name / "config"
    if not found:
        raise Refusal("not_found", f"cannot find {given} in {where}: no branch, tag or commit is called so")
    if len(found) > 1:
        what = " and ".join(f"{sha[:12]} ({why})" for sha, why in sorted(found.items())[:3])
        raise Refusal("refused", f"cannot tell which commit {given} is in {where}: {what}; give the whole id")
    return CommitSha(next(iter(found)))


def _refs(given: str) -> list[str]:
    return ["HEAD"] if given == "HEAD" else [f"refs/heads/{given}", f"refs/tags/{given}"]


def _read_ref(ref: str, theirs: int, hops: int) -> str | None:
    """The id that a ref has; None when there is no such ref, or it is not one that we read."""
    try:
        said = read_small(ref, theirs, REF_LIMIT_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return _packed(ref, theirs)
    if _SHA.fullmatch(said):
        return said
    other = said.removeprefix("ref: ")
    if other == said or not hops or not other.startswith("refs/") or not _NAME.fullmatch(other):
        return None
    return _read_ref(other, theirs, hops - 1)


def _packed(ref: str, theirs: int) -> str | None:
    try:
        packed = read_small("packed-refs", theirs, PACKED_LIMIT_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    for line in packed.splitlines():
        sha, _, name = line.partition(" ")
        if name == ref and _SHA.fullmatch(sha):
            return sha
    return None


def _commit(held: Path, sha: str) -> str | None:
    """The commit that an id names, itself or by a tag."""
    try:
        return run_git(held, "rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}").decode().strip()
    except GitFailed as failed:
        if failed.code == 1:
            return None
        raise


def _abbreviated(held: Path, given: str) -> list[str]:
    """The commits whose ids begin so."""
    if not _ABBREVIATED.fullmatch(given):
        return []
    ids = run_git(held, "rev-parse", f"--disambiguate={given}").decode().split()
    return [sha for sha, (kind, _) in zip(ids, kinds(held, ids), strict=True) if kind == "commit"]
