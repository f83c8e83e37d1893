"""Looking whether a backup is whole, and bringing one back. What made it is not believed: it may be anybody's file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

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
from hive_core.protocol.paths import sync_folder
from hive_core.protocol.refusal import Refusal

HEAD_LIMIT_BYTES = 64 * 1024
PARTS_LIMIT = DEPTH_LIMIT + 4  # of a path: what stands above the first that is counted, and the file itself
PART_LIMIT_BYTES = 255
LINK_LIMIT_BYTES = 4_095
WHY_LIMIT = 400  # characters: a name can be as long as whoever made the file likes
STAGE = ".restore-"

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
        why = shown(str(exc))[:200] or type(exc).__name__
        raise _unfit(f"it is no tar file, or cut off ({why})") from None


def _read_whole(file: BinaryIO, work: Path, tell: Tell) -> Manifest:
    read: dict[str, tuple[int, str]] = {}
    manifest: Manifest | None = None
    done = 0
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for count, member in enumerate(tar):
            if manifest is not None:
                raise _unfit(f"something stands behind its manifest: {shown(member.name)}")
            _check_member(member)
            content = tar.extractfile(member)
            assert content is not None
            if count == 0:
                _check_head(member, content.read(HEAD_LIMIT_BYTES))
            elif member.name == MANIFEST:
                manifest = _parse_manifest(content.read())
            elif member.name in read or member.name == HEAD:
                raise _unfit(f"{shown(member.name)} is in it twice")
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
        raise _unfit(f"{shown(member.name)} is not a plain file")
    if member.size < 0 or not 0 <= member.mtime <= MTIME_MOST_S:  # no comparison holds for what is not a number
        raise _unfit(f"{shown(member.name)} has a {'size' if member.size < 0 else 'time'} that no file has")
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
        raise _unfit(f"{shown(name)[:200]} is not a path that a hive has")
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
                raise _unfit(f"its manifest is malformed at {shown(name)}")
        for name, mode in manifest.folders.items():
            if _check_name(name) == DATABASE or not _is_mode(mode):
                raise _unfit(f"its manifest is malformed at {shown(name)}")
        for name, target in manifest.links.items():
            _check_name(name)
            fits = isinstance(target, str) and target != "" and "\0" not in target
            if not fits or _bytes_of(target) > LINK_LIMIT_BYTES or not name.startswith(AGENTS_OWN):
                raise _unfit(f"its manifest has a link where none may be: {shown(name)}")
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
        raise _unfit(f"{shown(missing[0])} is missing")
    if unknown := sorted(read.keys() - manifest.files.keys()):
        raise _unfit(f"its manifest does not know {shown(unknown[0])}")
    if DATABASE not in read:
        raise _unfit("it holds no database")
    for name, (size, digest) in read.items():
        if (size, digest) != (manifest.files[name]["bytes"], manifest.files[name]["sha256"]):
            raise _unfit(f"{shown(name)} is not what was backed up (its sha256 differs)")
    places = [*manifest.files, *manifest.links]
    leaves = set(places)
    if len(leaves) != len(places) or leaves & manifest.folders.keys():
        raise _unfit("two things in it have one name")
    for name in [*places, *manifest.folders]:
        parent = name.rpartition("/")[0]
        while parent:
            if parent in leaves:
                raise _unfit(f"{shown(name)} lies below a file")
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
        _make_another(stage / DATABASE, paused)
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


def _check_empty(state_dir: Path) -> None:
    for entry in sorted(os.listdir(state_dir)):
        if entry.startswith(STAGE):
            _remove_tree(state_dir / entry)  # of a restore that was interrupted; we hold the lock
        elif entry != "daemon.lock":
            raise Refusal(
                "refused",
                f"cannot restore into {state_dir}: it is not empty ({shown(entry)} is there); move it away, or set "
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
                raise _unfit(f"{shown(member.name)} changed while it was read")
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


def _make_another(database: Path, paused: bool) -> None:
    """Give the copy a timeline of its own: what was numbered behind the backup, it will number anew."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            # The schema of an older version has none: it gets one when it is first opened.
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'timeline'").fetchone():
                connection.execute("UPDATE timeline SET id = lower(hex(randomblob(8)))")
            if paused:
                connection.execute("UPDATE agents SET wanted = 'paused' WHERE wanted = 'up'")
    except sqlite3.Error as exc:
        raise _unfit(f"its database cannot be changed ({shown(str(exc))})") from None


def _remove_tree(path: Path) -> None:
    """Remove what we wrote, directories that their owner may not write to included."""
    for folder, below, _ in os.walk(path):
        for name in below:
            if not os.path.islink(inner := os.path.join(folder, name)):
                os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)
