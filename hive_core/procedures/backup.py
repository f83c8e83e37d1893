"""The whole hive in one file; `restore` brings it back.

A backup is a tar file (pax) that anybody can look into. Its first member says what it is, its last is the manifest:
the size and sha256 of each file, modes, links, and what was left out. Nothing is asked of the daemon, which goes on
meanwhile; what is copied fits together because of the order:

1. the database, as of one instant: sqlite's own backup from a read transaction, which in a write-ahead log holds up
   neither the writer nor anybody else;
2. the files of large bodies, and those attached to messages, that this copy speaks of: they never change;
3. `applied`, of each repository its refs before its objects. Nothing is tidied there meanwhile (`alone` of
   repo_upkeep), so objects are only ever added, and a ref moves after its objects are written: a ref that was copied
   has all it needs. `main` is then set to what the copied database
   says is deployed, and tags of approvals that it does not know, or knows as undecided, are left out. So no lock of
   the gate is needed, and an approval never waits for a slow disk. (A bundle or a clone would run git, and leave the
   pins under refs/proposed behind.)
4. what agents write or wrote: `proposed`, `agents`, `tombstones`, `shared`. They may write while this copies; which
   files changed under our hands is said. It is hostile: nothing but regular files and directories is opened, no link
   is followed, and links are kept as words of the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from hive_core.git.repo_upkeep import alone
from hive_core.procedures.backup_format import (
    AGENTS_OWN,
    DATABASE,
    DEPTH_LIMIT,
    FORMAT,
    HEAD,
    MANIFEST,
    MTIME_MOST_S,
    PATH_LIMIT_BYTES,
    PIECE_BYTES,
    ROOMS,
    Tell,
    check_database,
    shown,
)
from hive_core.protocol.refusal import Refusal
from hive_core.version import __version__

WHOLE_LIMIT_BYTES = 8 * 1024 * 1024  # a smaller file is read at once; a larger one goes through a temporary file
HOLLOW_BYTES = 1024**3
TRIES = 3  # for a file that changes while it is read
PAGES = 256  # of the database in one step
# A lock is of a program that runs here now: in another life it would stand in the way for ever.
GIT_LOCK = re.compile(r"applied/.*\.lock|(proposed|agents/[^/]+/projects)/.*/\.git/.*\.lock", re.DOTALL)
# A backup is itself a snapshot, and what they share with each other would be in it many times over. The packs that
# clones of projects borrow from are fetched again.
HELD_TWICE = re.compile(r"(agents/[^/]+|tombstones/[^/]+/agent)/(snapshots|\.restored|mirrors)", re.DOTALL)
# What belongs to this machine and its running daemon, and is not worth a word.
OF_THE_MACHINE = re.compile(
    r"daemon\.lock|daemon\.log|mirrors|nix|processes|programs|hive\.ballast|hive\.sqlite(-wal|-shm|-journal)?|\..*"
)


@dataclass
class Report:
    """What was done, for people and for --json."""

    files: int = 0
    bytes: int = 0
    agents: list[str] = field(default_factory=list)
    credentials: bool = False
    changed: list[str] = field(default_factory=list)  # files that were written to while they were copied
    left_out: list[str] = field(default_factory=list)
    version: str = __version__
    made_at: str = ""


def back_up(state_dir: Path, out: BinaryIO, work: Path, *, with_credentials: bool, now: str, tell: Tell) -> Report:
    """Write a backup of the hive in `state_dir` to `out`; `work` is a directory for temporary files.

    Raises Refusal when there is no hive that we may read, OSError when a file of the hive's own cannot be read.
    """
    copy = work / DATABASE
    with contextlib.ExitStack() as untidied:
        if (state_dir / "applied").is_dir():
            untidied.enter_context(alone(state_dir / "applied", reading=True))
        copy_database(state_dir / DATABASE, copy)
        with contextlib.closing(sqlite3.connect(f"{copy.as_uri()}?mode=ro", uri=True)) as database:
            check_database(database)
            writer = _Writer(out, work, tell, now, with_credentials)
            writer.report.agents = [row[0] for row in database.execute("SELECT name FROM agents ORDER BY name")]
            writer.add_file(copy, DATABASE, 0o600)
            _add_bodies(writer, state_dir, database)
            for name in writer.report.agents:
                _add_applied(writer, state_dir, name, database)
    for room in ("proposed", "agents", "tombstones", "shared", "meta", *(["credentials"] if with_credentials else [])):
        writer.add_tree(state_dir, room)
    for entry in sorted(os.listdir(state_dir)):
        if entry not in ROOMS and not OF_THE_MACHINE.fullmatch(entry):
            writer.leave_out(entry, "not a part of a hive")
    if not with_credentials and (state_dir / "credentials").is_dir():
        writer.leave_out("credentials", "see --with-credentials")
    writer.close()
    return writer.report


def copy_database(source: Path, target: Path) -> None:
    """A copy as of one instant, made in small steps while the hive runs."""
    if not source.is_file():
        raise Refusal("not_found", f"cannot back up: there is no hive in {source.parent}; `hive up` makes one there")
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as reader,
            contextlib.closing(sqlite3.connect(target)) as writer,
        ):
            reader.isolation_level = None
            # Without this each write of the daemon would make sqlite begin the copy anew.
            reader.execute("BEGIN")
            reader.execute("SELECT 1 FROM sqlite_master").fetchone()
            reader.backup(writer, pages=PAGES, sleep=0.0)
            writer.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as exc:
        raise Refusal("failed", f"cannot back up: the database {source} cannot be read ({exc})") from exc


def _add_bodies(writer: _Writer, state_dir: Path, database: sqlite3.Connection) -> None:
    digests = set(database.execute("SELECT body_sha256 FROM messages WHERE body_sha256 IS NOT NULL"))
    # A daemon of an older release may run, whose messages have no files.
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'attachments'").fetchone():
        digests.update(database.execute("SELECT sha256 FROM attachments"))
    for (digest,) in sorted(digests):
        name = f"bodies/{digest[:2]}/{digest}"
        try:
            writer.add_file(state_dir / name, name, 0o600)
        except FileNotFoundError:
            # Its message may have been forgotten since the copy was made.
            writer.leave_out(name, "it is gone")


def _add_applied(writer: _Writer, state_dir: Path, agent: str, database: sqlite3.Connection) -> None:
    repo = f"applied/{agent}.git"
    if not (state_dir / repo).is_dir():
        return
    (deployed,) = database.execute("SELECT deployed_sha FROM agents WHERE name = ?", (agent,)).fetchone()
    decided = dict(database.execute("SELECT id, state FROM approvals WHERE agent = ?", (agent,)).fetchall())

    def true_ref(path: str, data: bytes) -> bytes | None:
        """What a ref was when the database was copied; None when there was none."""
        if path == f"{repo}/refs/heads/main" and deployed:
            return f"{deployed}\n".encode()
        if match := re.fullmatch(rf"{re.escape(repo)}/refs/tags/(\w+)/(\d+)", path):
            kind, number = match[1], int(match[2])
            if number and (
                number not in decided or (kind != "proposal" and decided[number] in ("pending", "approved"))
            ):
                return None
        return data

    for part in ("refs", "packed-refs", "HEAD"):
        writer.add_tree(state_dir, f"{repo}/{part}", true_ref)
    writer.add_tree(state_dir, repo, skip={f"{repo}/{part}" for part in ("refs", "packed-refs", "HEAD")})


class _Writer:
    """A tar file that knows what it holds."""

    def __init__(self, out: BinaryIO, work: Path, tell: Tell, now: str, with_credentials: bool) -> None:
        self.report = Report(credentials=with_credentials, made_at=now)
        self._work, self._tell = work, tell
        self._files: dict[str, dict[str, Any]] = {}
        self._folders: dict[str, int] = {}
        self._links: dict[str, str] = {}
        self._tar = tarfile.TarFile(fileobj=_Counting(out), mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[arg-type]
        head = {"hyperhive_backup": FORMAT, "version": __version__, "made_at": now}
        self._put(HEAD, _to_json(head), 0o600)

    def add_file(self, path: Path, name: str, mode: int) -> None:
        """A file of the hive's own, which does not change."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            self._store(name, file, os.fstat(file.fileno()).st_size, mode)

    def add_tree(
        self,
        top: Path,
        name: str,
        change: Callable[[str, bytes], bytes | None] | None = None,
        skip: set[str] | None = None,
    ) -> None:
        """Whatever stands at top/name, with all below it; nothing when nothing is there.

        `change` makes another content of a small file, or None to leave it out.
        """
        folder = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in name.split("/")[:-1]:
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                os.close(folder)
                folder = inner
            self._add(folder, name.rpartition("/")[2], name, change, skip or set(), 0)
        except FileNotFoundError:
            return
        finally:
            os.close(folder)

    def _add(self, folder: int, entry: str, name: str, change: Any, skip: set[str], depth: int) -> None:
        if name in skip or GIT_LOCK.fullmatch(name) or HELD_TWICE.fullmatch(name):
            return
        if len(os.fsencode(name)) > PATH_LIMIT_BYTES:
            self.leave_out(name, f"its path is longer than {PATH_LIMIT_BYTES:,} bytes")
            return
        try:
            found = os.stat(entry, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                self._add_link(folder, entry, name)
            elif stat.S_ISDIR(found.st_mode):
                if depth >= DEPTH_LIMIT:
                    self.leave_out(name, f"more than {DEPTH_LIMIT} directories deep")
                    return
                self._add_folder(folder, entry, name, change, skip, depth)
            elif stat.S_ISREG(found.st_mode):
                self._add_regular(folder, entry, name, change)
            else:
                self.leave_out(name, "neither a file nor a directory")
        except FileNotFoundError:
            if depth == 0:
                raise
            self.report.changed.append(f"{shown(name)}: gone")
        except OSError as exc:
            # What an agent made unreadable costs the agent that file, and not the others their backup.
            if not name.startswith(AGENTS_OWN):
                raise
            self.leave_out(name, exc.strerror or str(exc))

    def _add_link(self, folder: int, entry: str, name: str) -> None:
        if name.startswith(AGENTS_OWN):
            self._links[name] = os.readlink(entry, dir_fd=folder)
        elif "/" in name:
            self.leave_out(name, "a link")
        else:
            raise Refusal(
                "refused", f"cannot back up: {name} in the state directory is a link; mount a disk there instead"
            )

    def _add_folder(self, folder: int, entry: str, name: str, change: Any, skip: set[str], depth: int) -> None:
        inner = os.open(entry, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            self._folders[name] = stat.S_IMODE(os.fstat(inner).st_mode) & 0o777
            for below in sorted(os.listdir(inner)):
                self._add(inner, below, f"{name}/{below}", change, skip, depth + 1)
        finally:
            os.close(inner)

    def _add_regular(self, folder: int, entry: str, name: str, change: Any) -> None:
        for tried in range(1, TRIES + 1):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(entry, flags, dir_fd=folder), "rb") as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode) or _is_hollow(before):
                    self.leave_out(name, f"a file of {before.st_size:,} bytes that are mostly holes")
                    return
                with self._taken(file, before.st_size) as (taken, size):
                    after = os.fstat(file.fileno())
                    still = size == after.st_size and before.st_mtime_ns == after.st_mtime_ns
                    if still or tried == TRIES:
                        if not still:
                            self.report.changed.append(shown(name))
                        self._store_taken(name, taken, size, before, change)
                        return

    @contextlib.contextmanager
    def _taken(self, file: BinaryIO, limit: int) -> Iterator[tuple[IO[bytes], int]]:
        """What a file holds, where nobody changes it: a member of a tar has to keep the size that it began with."""
        with tempfile.SpooledTemporaryFile(WHOLE_LIMIT_BYTES, dir=str(self._work)) as taken:
            size = 0  # at most what it had at first: who goes on writing must not keep us here for ever
            while size < limit and (piece := file.read(min(PIECE_BYTES, limit - size))):
                size += taken.write(piece)
            taken.seek(0)
            yield taken, size

    def _store_taken(self, name: str, taken: IO[bytes], size: int, found: os.stat_result, change: Any) -> None:
        if change is not None and size <= WHOLE_LIMIT_BYTES:
            data = change(name, taken.read())
            if data is None:
                return
            taken, size = io.BytesIO(data), len(data)
        self._store(name, taken, size, stat.S_IMODE(found.st_mode) & 0o777, found.st_mtime)

    def _store(self, name: str, file: IO[bytes], size: int, mode: int, mtime_s: float = 0.0) -> None:
        if name in self._files:
            return
        digesting = _Digesting(file)
        self._tar.addfile(_member(name, size, mode, mtime_s), digesting)
        self._files[name] = {"bytes": size, "sha256": digesting.hexdigest(), "mode": mode}
        self.report.files += 1
        self.report.bytes += size
        self._tell(self.report.files, self.report.bytes)

    def _put(self, name: str, data: bytes, mode: int) -> None:
        self._tar.addfile(_member(name, len(data), mode), io.BytesIO(data))

    def leave_out(self, name: str, why: str) -> None:
        self.report.left_out.append(f"{shown(name)}: {why}")

    def close(self) -> None:
        manifest = {
            "format": FORMAT,
            "version": __version__,
            "made_at": self.report.made_at,
            "agents": self.report.agents,
            "credentials": self.report.credentials,
            "files": self._files,
            "folders": self._folders,
            "links": self._links,
            "changed": self.report.changed,
            "left_out": self.report.left_out,
        }
        self._put(MANIFEST, _to_json(manifest), 0o600)
        self._tar.close()


class _Counting:
    """Knows how far a tar file was written, also into a pipe."""

    name = None

    def __init__(self, out: BinaryIO) -> None:
        self._out, self._written = out, 0

    def tell(self) -> int:
        return self._written

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._written += len(data)
        return len(data)


class _Digesting:
    """Reads a file for the tar, and its digest on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _member(name: str, size: int, mode: int, mtime_s: float = 0.0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    # A program can give its files any time; not every disk can, on which they are to come back.
    member.size, member.mode, member.mtime = size, mode, min(max(mtime_s, 0.0), MTIME_MOST_S)
    return member


def _is_hollow(found: os.stat_result) -> bool:
    """Whether a file claims a size that it never took: read, it would fill any disk."""
    return found.st_size > HOLLOW_BYTES and found.st_blocks * 512 < found.st_size // 10


def _to_json(obj: object) -> bytes:
    return json.dumps(obj, indent=1).encode()  # ASCII, so that a name that is not UTF-8 survives
