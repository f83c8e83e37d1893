"""The whole hive in one file, and back.

A backup is a tar file (pax) that anybody can look into. Its first member says what it is, its last is the manifest:
the size and sha256 of each file, modes, links, and what was left out. Nothing is asked of the daemon, which goes on
meanwhile; what is copied fits together because of the order:

1. the database, as of one instant: sqlite's own backup from a read transaction, which in a write-ahead log holds up
   neither the writer nor anybody else;
2. the files of large bodies that this copy speaks of: they never change;
3. `applied`, of each repository its refs before its objects. Objects are only ever added there, and a ref moves after
   its objects are written, so a ref that was copied has all it needs. `main` is then set to what the copied database
   says is deployed, and tags of approvals that it does not know, or knows as undecided, are left out. So no lock of
   the gate is needed, and an approval never waits for a slow disk. (A bundle or a clone would run git, and leave the
   pins under refs/proposed behind.)
4. what agents write: `proposed`, `agents`, `shared`. They may write while this copies; which files changed under our
   hands is said. It is hostile: nothing but regular files and directories is opened, no link is followed, and links
   are kept as words of the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from hive_core.protocol.refusal import Refusal
from hive_core.store.schema import APPLICATION_ID, migrations
from hive_core.version import __version__

FORMAT = 1
HEAD, MANIFEST = "hyperhive.json", "manifest.json"
DATABASE = "hive.sqlite"
HEAD_LIMIT_BYTES = 64 * 1024
WHOLE_LIMIT_BYTES = 8 * 1024 * 1024  # a smaller file is read at once; a larger one goes through a temporary file
PIECE_BYTES = 1024 * 1024
HOLLOW_BYTES = 1024**3
DEPTH_LIMIT = 200
PARTS_LIMIT = DEPTH_LIMIT + 4  # of a path: what stands above the first that is counted, and the file itself
PATH_LIMIT_BYTES = 3_000  # below a state directory, whose own path takes of the 4,095 that the kernel has
PART_LIMIT_BYTES = 255
LINK_LIMIT_BYTES = 4_095
MTIME_MOST_S = 2**33  # in the year 2242; disks differ in what they keep behind it
TRIES = 3  # for a file that changes while it is read
PAGES = 256  # of the database in one step
# What a backup may hold, beside the database.
ROOMS = ("bodies", "applied", "proposed", "agents", "shared", "meta", "credentials")
# What agents write. A link is as safe there as it was: the daemon follows none below these.
AGENTS_OWN = ("proposed/", "agents/", "shared/")
# A lock is of a program that runs here now: in another life it would stand in the way for ever.
GIT_LOCK = re.compile(r"applied/.*\.lock|proposed/.*/\.git/.*\.lock", re.DOTALL)
# What belongs to this machine and its running daemon, and is not worth a word.
OF_THE_MACHINE = re.compile(r"daemon\.lock|daemon\.log|processes|hive\.ballast|hive\.sqlite(-wal|-shm|-journal)?|\..*")

Tell = Callable[[int, int], None]  # how many files and bytes are done


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


# -- making one ------------------------------------------------------------------------------------------------------


def back_up(state_dir: Path, out: BinaryIO, work: Path, *, with_credentials: bool, now: str, tell: Tell) -> Report:
    """Write a backup of the hive in `state_dir` to `out`; `work` is a directory for temporary files.

    Raises Refusal when there is no hive that we may read, OSError when a file of the hive's own cannot be read.
    """
    copy = work / DATABASE
    copy_database(state_dir / DATABASE, copy)
    with contextlib.closing(sqlite3.connect(f"{copy.as_uri()}?mode=ro", uri=True)) as database:
        check_database(database)
        writer = _Writer(out, work, tell, now, with_credentials)
        writer.report.agents = [row[0] for row in database.execute("SELECT name FROM agents ORDER BY name")]
        writer.add_file(copy, DATABASE, 0o600)
        _add_bodies(writer, state_dir, database)
        for name in writer.report.agents:
            _add_applied(writer, state_dir, name, database)
    for room in ("proposed", "agents", "shared", "meta", *(["credentials"] if with_credentials else [])):
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


def check_database(database: sqlite3.Connection) -> None:
    """Raises Refusal when it is not the whole database of a hive that this version knows."""
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (sound,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        foreign = database.execute("PRAGMA foreign_key_check").fetchone()
        if version <= len(migrations()):
            database.execute("SELECT name, wanted, deployed_sha FROM agents LIMIT 1")
    except sqlite3.Error as exc:
        raise Refusal("failed", f"cannot use the copy of the database: {exc}") from None
    if application != APPLICATION_ID:
        raise Refusal("failed", "cannot use the copy of the database: it is not the database of a hive")
    if version > len(migrations()):
        raise Refusal(
            "refused",
            f"cannot use the copy of the database: a newer hyperhive wrote it (schema {version}, this one knows "
            f"{len(migrations())}); use that version",
        )
    if sound != "ok" or foreign is not None:
        damage = sound if foreign is None else "rows are missing"
        raise Refusal("failed", f"cannot use the copy of the database: it is damaged ({damage})")


def _add_bodies(writer: _Writer, state_dir: Path, database: sqlite3.Connection) -> None:
    sql = "SELECT DISTINCT body_sha256 FROM messages WHERE body_sha256 IS NOT NULL ORDER BY 1"
    for (digest,) in database.execute(sql):
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
        if name in skip or GIT_LOCK.fullmatch(name):
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
            self.report.changed.append(f"{_shown(name)}: gone")
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
                            self.report.changed.append(_shown(name))
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
        self.report.left_out.append(f"{_shown(name)}: {why}")

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


def _shown(name: str) -> str:
    """A name that an agent may have chosen, for a line of a report."""
    return name if name.isascii() and name.isprintable() else ascii(name)[1:-1]


# -- looking whether one is whole --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    version: str
    made_at: str
    agents: list[str]
    credentials: bool
    files: dict[str, dict[str, Any]]
    folders: dict[str, int]
    links: dict[str, str]
    changed: list[str]
    left_out: list[str]

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.files.values())


def verify(file: BinaryIO, work: Path, tell: Tell) -> Manifest:
    """Read a whole backup and check everything that a restore relies on. Nothing but `work` is written to.

    Raises Refusal that names the first thing that is wrong.
    """
    with _one_sentence():
        manifest = _read_whole(file, work, tell)
    with contextlib.closing(sqlite3.connect(f"{(work / DATABASE).absolute().as_uri()}?mode=ro", uri=True)) as database:
        check_database(database)
    return manifest


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """A tar file can be made so that reading it fails anywhere in the library: whatever that raises is a Refusal."""
    try:
        yield
    except (tarfile.TarError, EOFError, MemoryError, RecursionError, ValueError, ArithmeticError, LookupError) as exc:
        why = _shown(str(exc))[:200] or type(exc).__name__
        raise _unfit(f"it is no tar file, or cut off ({why})") from None


def _read_whole(file: BinaryIO, work: Path, tell: Tell) -> Manifest:
    read: dict[str, tuple[int, str]] = {}
    manifest: Manifest | None = None
    done = 0
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for count, member in enumerate(tar):
            if manifest is not None:
                raise _unfit(f"something stands behind its manifest: {_shown(member.name)}")
            _check_member(member)
            content = tar.extractfile(member)
            assert content is not None
            if count == 0:
                _check_head(member, content.read(HEAD_LIMIT_BYTES))
            elif member.name == MANIFEST:
                manifest = _parse_manifest(content.read())
            elif member.name in read or member.name == HEAD:
                raise _unfit(f"{_shown(member.name)} is in it twice")
            else:
                read[member.name] = (
                    member.size,
                    _drain(content, work / DATABASE if member.name == DATABASE else None),
                )
                done += member.size
                tell(len(read), done)
    if manifest is None:
        raise _unfit("its end is missing: the manifest")
    _compare(manifest, read)
    return manifest


WHY_LIMIT = 400  # characters: a name can be as long as whoever made the file likes


def _unfit(why: str) -> Refusal:
    why = why if len(why) <= WHY_LIMIT else f"{why[: WHY_LIMIT - 1]}…"
    return Refusal("refused", f"cannot use the backup: {why}; nothing was written")


def _check_head(member: tarfile.TarInfo, data: bytes) -> None:
    try:
        head = json.loads(data) if member.name == HEAD else None
        number = head["hyperhive_backup"] if isinstance(head, dict) else None
    except (ValueError, KeyError, RecursionError):
        number = None
    if isinstance(number, bool) or not isinstance(number, int):
        raise _unfit("it is not a backup of a hive")
    if number > FORMAT:
        raise _unfit(f"a newer hyperhive made it (format {number}, this one knows {FORMAT}); use that version")


def _check_member(member: tarfile.TarInfo) -> None:
    """Only plain files with plain names: what a tar file could do besides is what would be used against us."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise _unfit(f"{_shown(member.name)} is not a plain file")
    if member.size < 0 or not 0 <= member.mtime <= MTIME_MOST_S:  # no comparison holds for what is not a number
        raise _unfit(f"{_shown(member.name)} has a {'size' if member.size < 0 else 'time'} that no file has")
    if member.name not in (HEAD, MANIFEST):
        _check_name(member.name)


def _check_name(name: object) -> str:
    """A path below the state directory that a backup may hold."""
    if not isinstance(name, str) or "\0" in name:
        raise _unfit("its manifest names something that is no path")
    parts = name.split("/")
    fits = (
        not any(part in ("", ".", "..") or _bytes_of(part) > PART_LIMIT_BYTES for part in parts)
        and (name == DATABASE or parts[0] in ROOMS)
        and len(parts) <= PARTS_LIMIT
        and _bytes_of(name) <= PATH_LIMIT_BYTES
    )
    if not fits:
        raise _unfit(f"{_shown(name)[:200]} is not a path that a hive has")
    return name


def _bytes_of(name: str) -> float:
    """How long a name is on a disk; endless where it cannot be written there at all."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return float("inf")


def _parse_manifest(data: bytes) -> Manifest:
    try:
        raw = json.loads(data)
        manifest = Manifest(**{key: raw[key] for key in Manifest.__dataclass_fields__})
        _check_types(manifest)
        for name, entry in manifest.files.items():
            _check_name(name)
            fits = isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) and _is_mode(entry["mode"])
            if not fits:
                raise _unfit(f"its manifest is malformed at {_shown(name)}")
        for name, mode in manifest.folders.items():
            if _check_name(name) == DATABASE or not _is_mode(mode):
                raise _unfit(f"its manifest is malformed at {_shown(name)}")
        for name, target in manifest.links.items():
            _check_name(name)
            fits = isinstance(target, str) and target != "" and "\0" not in target
            if not fits or _bytes_of(target) > LINK_LIMIT_BYTES or not name.startswith(AGENTS_OWN):
                raise _unfit(f"its manifest has a link where none may be: {_shown(name)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise _unfit(f"its manifest is malformed ({type(exc).__name__})") from None
    return manifest


def _check_types(manifest: Manifest) -> None:
    """What is printed after a restore is text, or it would fail when all was done."""
    for key in ("version", "made_at"):
        if not isinstance(getattr(manifest, key), str):
            raise _unfit(f"its manifest is malformed at {key}")
    for key in ("agents", "changed", "left_out"):
        given = getattr(manifest, key)
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise _unfit(f"its manifest is malformed at {key}")
    if not isinstance(manifest.credentials, bool):
        raise _unfit("its manifest is malformed at credentials")


def _is_mode(mode: object) -> bool:
    return isinstance(mode, int) and not isinstance(mode, bool) and 0 <= mode <= 0o777


def _drain(content: IO[bytes], target: Path | None) -> str:
    """The digest of a member; its content goes to `target` where one is given."""
    digest = hashlib.sha256()
    with target.open("wb") if target else contextlib.nullcontext() as file:
        while piece := content.read(PIECE_BYTES):
            digest.update(piece)
            if file is not None:
                file.write(piece)
    return digest.hexdigest()


def _compare(manifest: Manifest, read: dict[str, tuple[int, str]]) -> None:
    if missing := sorted(manifest.files.keys() - read.keys()):
        raise _unfit(f"{_shown(missing[0])} is missing")
    if unknown := sorted(read.keys() - manifest.files.keys()):
        raise _unfit(f"its manifest does not know {_shown(unknown[0])}")
    if DATABASE not in read:
        raise _unfit("it holds no database")
    for name, (size, digest) in read.items():
        if (size, digest) != (manifest.files[name]["bytes"], manifest.files[name]["sha256"]):
            raise _unfit(f"{_shown(name)} is not what was backed up (its sha256 differs)")
    places = [*manifest.files, *manifest.links]
    leaves = set(places)
    if len(leaves) != len(places) or leaves & manifest.folders.keys():
        raise _unfit("two things in it have one name")
    for name in [*places, *manifest.folders]:
        parent = name.rpartition("/")[0]
        while parent:
            if parent in leaves:
                raise _unfit(f"{_shown(name)} lies below a file")
            parent = parent.rpartition("/")[0]


# -- bringing one back -------------------------------------------------------------------------------------------------


def restore(file: BinaryIO, state_dir: Path, *, paused: bool, tell: Tell) -> Manifest:
    """Bring a backup into `state_dir`, which is locked by the caller and holds nothing else.

    Everything is checked, then written beside its place and synced, then moved there, the database last. What fails
    takes back what it did. Killed before the moves it can be run again; between them, the database is missing and the
    next restore says that the directory is not empty.
    """
    _check_empty(state_dir)
    moved: list[str] = []
    stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=state_dir))
    try:
        manifest = verify(file, stage, tell)
        (stage / DATABASE).unlink()
        _check_room(state_dir, manifest.bytes)
        with _one_sentence():
            _write_all(file, stage, manifest, tell)
        if paused:
            _pause(stage / DATABASE)
        os.sync()
        for entry in sorted(os.listdir(stage), key=lambda name: name == DATABASE):
            os.rename(stage / entry, state_dir / entry)
            moved.append(entry)
            sync_folder(state_dir)
    except BaseException:
        for entry in moved:
            _remove_tree(state_dir / entry)
        raise
    finally:
        _remove_tree(stage)
    return manifest


STAGE = ".restore-"


def _check_empty(state_dir: Path) -> None:
    for entry in sorted(os.listdir(state_dir)):
        if entry.startswith(STAGE):
            _remove_tree(state_dir / entry)  # of a restore that was interrupted; we hold the lock
        elif entry != "daemon.lock":
            raise Refusal(
                "refused",
                f"cannot restore into {state_dir}: it is not empty ({_shown(entry)} is there); move it away, or set "
                "state_dir (HIVE_STATE_DIR) to another",
            )


def _check_room(state_dir: Path, needed: int) -> None:
    free = shutil.disk_usage(state_dir).free
    if needed > free:
        raise Refusal(
            "failed",
            f"cannot restore into {state_dir}: it needs {needed:,} bytes and {free:,} are free; make room, or set "
            "state_dir (HIVE_STATE_DIR) to another",
        )


def _write_all(file: BinaryIO, stage: Path, manifest: Manifest, tell: Tell) -> None:
    for name in sorted(manifest.folders):
        (stage / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    done = 0
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for count, member in enumerate(tar):
            if member.name in (HEAD, MANIFEST):
                continue
            _check_member(member)  # again: a file can change between two readings
            entry, content = manifest.files[member.name], tar.extractfile(member)
            assert content is not None
            target = stage / member.name
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _drain(content, target) != entry["sha256"]:
                raise _unfit(f"{_shown(member.name)} changed while it was read")
            target.chmod(entry["mode"])
            os.utime(target, (member.mtime, member.mtime))
            done += member.size
            tell(count, done)
    # Last, so that nothing was ever written through one.
    for name, link in manifest.links.items():
        (stage / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.symlink(link, stage / name)
    for name in sorted(manifest.folders, reverse=True):
        (stage / name).chmod(manifest.folders[name])


def _pause(database: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE agents SET wanted = 'paused' WHERE wanted = 'up'")


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_tree(path: Path) -> None:
    """Remove what we wrote, directories that their owner may not write to included."""
    for folder, below, _ in os.walk(path):
        for name in below:
            if not os.path.islink(inner := os.path.join(folder, name)):
                os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)
