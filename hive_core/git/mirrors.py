"""Mirrors: of each project's repository one bare copy of ours, which agents clone from and push to.

    refs/heads, refs/tags   what agents see: what the source has, and what agents pushed
    refs/source             what the source had when it was fetched last; nobody is shown it

A fetch moves of the first what has moved in the second. So a branch that an agent pushed stays, also where the source
is a repository of this host and has it elsewhere (forwarding.py). All objects are packs, and none is ever dropped:
clones of agents borrow them by hard links. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hive_core.git.hive_secrets import find_secret, forms_of
from hive_core.git.remotes import Access, better_told, their_git
from hive_core.git.sterile_git import GitFailed, GitLimits, Setting, run_git
from hive_core.protocol.paths import sync_folder
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides, mib
from hive_core.protocol.words import ProjectName

HEADS, TAGS, SOURCE = "refs/heads/", "refs/tags/", "refs/source/"
HIVE = "refs/hive/"  # in a repository of this host: refs/hive/AGENT/BRANCH, refs/hive/AGENT/tags/TAG
PACKS_MOST = 50  # before they are packed together
REFS_LIMIT = 50_000
LOOSE_MOST = 100  # refs that move at once and stay files of their own
MEMORY_BYTES = 4 * 1024**3
PUSH_MEMORY_BYTES = MEMORY_BYTES // 2  # of each program that takes a push in
NOTHING = "0" * 40
Look = Callable[[], None]


@dataclass(frozen=True, slots=True)
class MirrorLimits:
    bytes: int  # of all packs
    fetch_s: float

    def git(self) -> GitLimits:
        return GitLimits(self.fetch_s, MEMORY_BYTES, self.bytes)


@dataclass(frozen=True, slots=True)
class Fetched:
    """
    moved      how many branches and tags have come, moved or gone
    kept_back  those of the source that could not be taken, since an agent's branch has a part of the name
    repacked   whether the packs are others now
    """

    moved: int
    kept_back: tuple[str, ...] = ()
    repacked: bool = False


class Mirror:
    """look: called now and then while git runs; what it raises ends that."""

    def __init__(self, path: Path, name: ProjectName, access: Access, limits: MirrorLimits, look: Look | None) -> None:
        self.path = path
        self.name = name
        self.access = access
        self._limits = limits
        self._look = look

    def make(self) -> None:
        """Make the repository where it is not there yet; a daemon that died meanwhile leaves nothing in its place."""
        if self.path.exists():
            return
        fresh = self.path.with_name(f".{self.name}.new")
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(fresh, ignore_errors=True)
        run_git(fresh, "init", "--quiet", "--bare", "--template=", "--initial-branch=main")
        fresh.rename(self.path)
        sync_folder(self.path.parent)

    def meet(self) -> None:
        """Take the host key that an ssh server shows at this first time, for all times."""
        ssh = {"GIT_SSH_COMMAND": self.access.ssh(accept_new=True)}
        setting = self.access.setting()
        setting = replace(setting, environment={**setting.environment, **ssh})
        self.run("ls-remote", "--", self.access.source.text, "HEAD", setting=setting)

    def fetch(self) -> Fetched:
        """Take what the source has now. Raises GitFailed, OSError, and Refusal over the limit of its size."""
        packed = packs(self.path)
        if packed_bytes(self.path) > self._limits.bytes and _count(packed) > 1:
            self._pack_all()
        if (size := packed_bytes(self.path)) > self._limits.bytes:
            why = f"its mirror has {mib(size)} and project_bytes is {mib(self._limits.bytes)}; raise that"
            raise Refusal("refused", f"cannot fetch {self.name}: {why}")
        before = self._refs(SOURCE)
        words = ["fetch", "--quiet", "--prune", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules"]
        refs = [f"+{HEADS}*:{SOURCE}heads/*", f"+{TAGS}*:{SOURCE}tags/*"]
        if self.access.source.kind == "path":  # which has what agents pushed beside its own branches
            refs.append(f"+{HIVE}*:{SOURCE}hive/*")
        self.run(*words, *self._to_theirs("--upload-pack", "upload-pack"), "--", self.access.source.text, *refs)
        after = self._refs(SOURCE)
        if len(after) > REFS_LIMIT:
            raise Refusal("refused", f"cannot fetch {self.name}: it has more than {REFS_LIMIT:,} branches and tags")
        fetched = self._follow(before, after)
        is_nearly_full = packed_bytes(self.path) > self._limits.bytes // 8 * 7
        if _count(came := packs(self.path)) > (1 if is_nearly_full else PACKS_MOST):
            self.repack()
        return replace(fetched, repacked=bool({*packed, *came} - {*packs(self.path)}))

    def follow_head(self) -> None:
        """Let HEAD be the source's: the branch that a clone begins with."""
        words = ("ls-remote", "--symref", *self._to_theirs("--upload-pack", "upload-pack"))
        said = self.run(*words, "--", self.access.source.text, "HEAD").decode("utf-8", "replace")
        head = next((line.split()[1] for line in said.splitlines() if line.startswith(f"ref: {HEADS}")), None)
        branches = [ref for ref in self._refs(HEADS) if not hides(ref)]  # it is told to people
        guesses = [head, f"{HEADS}main", f"{HEADS}master", *branches[:1]]
        if (branch := next((ref for ref in guesses if ref in branches), None)) is not None:
            run_git(self.path, "symbolic-ref", "HEAD", branch)

    def has_head(self) -> bool:
        """Whether the branch that a clone begins with is there, which it is not in an empty repository."""
        return bool(run_git(self.path, "for-each-ref", "--format=%(refname)", f"{HEADS}{self.head()}"))

    def head(self) -> str:
        """The branch that a clone begins with, without refs/heads."""
        return run_git(self.path, "symbolic-ref", "HEAD").decode().strip().removeprefix(HEADS)

    def _pack_all(self) -> None:
        """Make one pack of all. Each that came brings along what it was made from; what nobody needs any more stays,
        since clones may borrow it."""
        self._pack("-a", "--keep-unreachable")

    def repack(self) -> None:
        """Pack packs of a size together; what nobody needs any more stays."""
        self._pack("--geometric=2")

    def _pack(self, *words: str) -> None:
        # A pack of what is there already may be over the limit: else each fetch would write up to there, for nothing.
        most = self._limits.bytes + packed_bytes(self.path)
        limits = replace(self._limits.git(), file_bytes=most)
        run_git(self.path, "repack", "-d", "-q", *words, "--no-write-bitmap-index", limits=limits)

    def run(self, *words: str, setting: Setting | None = None, limits: GitLimits | None = None) -> bytes:
        """git with what reaches the source."""
        setting = replace(setting or self.access.setting(), look=self._look)
        try:
            return run_git(self.path, *words, limits=limits or self._limits.git(), setting=setting)
        except GitFailed as failed:
            own = forms_of({"token": self.access.token.encode()} if self.access.token else {})
            if find_secret(failed.printed.encode("utf-8", "replace"), own) is not None:
                why = f"what {self.access.source.text} says holds the project's own token"
                raise GitFailed(why, failed.over, failed.code) from None
            raise better_told(failed) from None

    def _to_theirs(self, option: str, service: str) -> list[str]:
        source = self.access.source
        return [f"{option}={their_git(source, service)}"] if source.kind == "path" else []

    def _refs(self, below: str) -> dict[str, str]:
        return refs_of(self.path, below)

    def _follow(self, before: dict[str, str], after: dict[str, str]) -> Fetched:
        """Move what agents see as the source has moved."""
        seen = self._refs(HEADS) | self._refs(TAGS)
        gone: list[str] = []
        lines: list[str] = []
        kept_back: list[str] = []
        for ref in before.keys() - after.keys():
            ours = _ours(ref)
            if seen.get(ours) == before[ref]:  # else an agent pushed to it since
                gone.append(f"delete {ours} {before[ref]}")
                del seen[ours]
        for ref, sha in after.items():
            ours = _ours(ref)
            as_before, pushed = before.get(ref) == sha, ref.startswith(f"{SOURCE}hive/")
            if seen.get(ours) == sha or (ours in seen and (as_before or pushed)):
                continue
            if as_before and pushed:  # another agent has removed it since
                continue
            if stands_in_the_way(ours, seen):
                kept_back.append(ours)
                continue
            lines.append(f"update {ours} {sha} {seen.get(ours, NOTHING)}")
            seen[ours] = sha
        # What goes first, by itself: a branch may come whose name has that of one that goes in it.
        for some in filter(None, (gone, lines)):
            run_git(self.path, "update-ref", "--stdin", stdin=_lines(some), limits=self._limits.git())
        if len(gone) + len(lines) > LOOSE_MOST:
            run_git(self.path, "pack-refs", "--all", limits=self._limits.git())
        return Fetched(len(gone) + len(lines), tuple(kept_back))


def note_pushed(path: Path, moved: dict[str, str]) -> None:
    """Know what the source has since it was pushed to: refs as agents see them, and their ids; NOTHING for none."""
    lines = [
        f"update {SOURCE}{ref.removeprefix('refs/')} {sha}" if sha != NOTHING else _gone(ref)
        for ref, sha in moved.items()
    ]
    run_git(path, "update-ref", "--stdin", stdin=_lines(lines))


def _gone(ref: str) -> str:
    return f"delete {SOURCE}{ref.removeprefix('refs/')}"


def _ours(ref: str) -> str:
    """What agents see of a ref of the source."""
    kind, _, rest = ref.removeprefix(SOURCE).partition("/")
    if kind != "hive":
        return f"refs/{kind}/{rest}"
    pushed = rest.partition("/")[2]
    return f"refs/{pushed}" if pushed.startswith("tags/") else f"{HEADS}{pushed}"


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")


def refs_of(path: Path, *below: str) -> dict[str, str]:
    """The ids of all refs below these places, by their names; of what is no UTF-8 in a name the bytes are kept.

    Whoever pushes to the source chooses names: git takes all bytes but those of ASCII that it needs itself.
    """
    said = run_git(path, "for-each-ref", "--format=%(objectname) %(refname)", *below)
    lines = said.decode("utf-8", "surrogateescape").split("\n")  # no other character ends a line
    return {name: sha for sha, _, name in (line.partition(" ") for line in lines if line)}


def stands_in_the_way(ref: str, others: dict[str, str]) -> str | None:
    """The ref beside which this one cannot be: git keeps them as files and folders."""
    parts = ref.split("/")
    above = next((one for end in range(3, len(parts)) if (one := "/".join(parts[:end])) in others), None)
    return above or next((one for one in others if one.startswith(f"{ref}/")), None)


def packs(path: Path) -> list[str]:
    """The files of packs, whole ones alone, and of each the index last: git takes it for there when that is."""
    try:
        found = set(os.listdir(path / "objects" / "pack"))
    except FileNotFoundError:
        return []
    stems = {file.removesuffix(".idx") for file in found if file.startswith("pack-") and file.endswith(".idx")}
    return [f"{stem}{end}" for stem in sorted(stems) for end in (".pack", ".rev", ".idx") if f"{stem}{end}" in found]


def _count(files: list[str]) -> int:
    return sum(file.endswith(".pack") for file in files)


def packed_bytes(path: Path) -> int:
    """What the packs of a repository take."""
    total = 0
    for file in packs(path):
        with contextlib.suppress(FileNotFoundError):  # packed together meanwhile
            total += (path / "objects" / "pack" / file).stat().st_size
    return total


# -- what agents borrow ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lent:
    """The refs of a mirror as agents see them: the files of a repository."""

    packed_refs: bytes
    head: bytes


def read_refs(mirror: Path) -> Lent:
    said = run_git(mirror, "for-each-ref", "--format=%(objectname) %(refname)", HEADS, TAGS)
    head = run_git(mirror, "symbolic-ref", "HEAD").decode().strip()
    return Lent(b"# pack-refs with: sorted \n" + said, f"ref: {head}\n".encode())


def export(mirror: Path, place: Path, refs: Lent | None = None) -> None:
    """Let `place` be a repository with the mirror's refs and packs, which are the same files. Again is fine.

    refs: as they were a moment ago, for whoever exports to many; what they lead to is in a pack.

    It is for containers, which see it read-only; nobody but us writes there.
    """
    if not place.exists():
        fresh = place.with_name(f".{place.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        (fresh / "objects" / "pack").mkdir(mode=0o700, parents=True)
        (fresh / "objects" / "info").mkdir(mode=0o700)
        (fresh / "refs").mkdir(mode=0o700)
        (fresh / "config").write_text("[core]\n\trepositoryFormatVersion = 0\n\tbare = true\n")
        fresh.rename(place)
    refs = refs or read_refs(mirror)
    for _ in range(3):  # what is packed together while we link is there under another name
        wanted = packs(mirror)
        if _link(mirror, place, wanted):
            break
    _write(place / "packed-refs", refs.packed_refs)
    _write(place / "HEAD", refs.head)
    gone = set(os.listdir(place / "objects" / "pack")) - set(wanted)
    for file in sorted(gone, key=lambda file: not file.endswith(".idx")):
        (place / "objects" / "pack" / file).unlink(missing_ok=True)


def _link(mirror: Path, place: Path, files: list[str]) -> bool:
    for file in files:
        source, target = (folder / "objects" / "pack" / file for folder in (mirror, place))
        try:
            os.link(source, target)
        except FileExistsError:
            pass
        except FileNotFoundError:
            return False
        except OSError:  # on another disk, or linked too often
            fresh = target.with_name(f".{file}")
            shutil.copyfile(source, fresh)
            fresh.rename(target)
    return True


def _write(path: Path, data: bytes) -> None:
    """The same again leaves the file that is there: by it, who borrows sees whether there is something new."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data:
            return
    fresh = path.with_name(f"{path.name}.lock")
    fresh.write_bytes(data)
    fresh.rename(path)


def exported(folder: Path) -> Iterator[str]:
    """The names of what is exported in a folder."""
    with contextlib.suppress(FileNotFoundError):
        yield from (name for name in os.listdir(folder) if not name.startswith("."))


def withdraw(folder: Path, name: str) -> None:
    """Let nobody borrow it any more. Again is fine."""
    gone = folder / f".{name}.gone"
    with contextlib.suppress(FileNotFoundError):
        (folder / name).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a mirror. Again is fine."""
    withdraw(path.parent, path.name)


def clear_leavings(path: Path) -> None:
    """Remove what a daemon that died left: of fetches, and of pushes that were on their way."""
    clear_fetch(path)
    for leaving in (*(path / "objects").glob("tmp_objdir-*"), *(path / "objects").glob("incoming-*")):
        shutil.rmtree(leaving, ignore_errors=True)


def clear_fetch(path: Path) -> None:
    """Remove what a fetch that was killed leaves: locks, and packs by halves. Of pushes git holds back the objects
    elsewhere, and those may go on."""
    clear_locks(path)
    for folder in (path / "objects").glob("[0-9a-f][0-9a-f]"):  # all that may stay is in packs
        shutil.rmtree(folder, ignore_errors=True)
    for leaving in (*(path / "objects" / "pack").glob("tmp_*"), *(path / "objects" / "pack").glob(".tmp-*")):
        leaving.unlink(missing_ok=True)


def clear_locks(path: Path) -> None:
    """Remove the locks of a git that was killed; for whoever is alone with the mirror's refs.

    One is that of a pack which came, until a ref leads to it: while it is there, that pack is never packed with others.
    """
    for lock in (*path.glob("*.lock"), *(path / "refs").rglob("*.lock"), *(path / "objects" / "pack").glob("*.keep")):
        lock.unlink(missing_ok=True)
