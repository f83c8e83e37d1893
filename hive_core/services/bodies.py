"""Large bodies and attached files: each a file of the daemon's own, named by the digest of what it holds.

A message's row has the beginning of a body and the digest, a row of an attached file its name and the digest. The file
is on disk, and so is its name, before the row is: a row never names a file that a power loss can take. A file that no
row names is the rest of a send that came to nothing.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import trio

from hive_core.limits import Limits
from hive_core.protocol.file_names import numbered
from hive_core.protocol.paths import explain, sync_folder
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import BODY_LIMIT_BYTES, INLINE_LIMIT_BYTES, MessageBody
from hive_core.services.attachments import Attached, Upload, check_count, check_size
from hive_core.store.door import Store

log = logging.getLogger(__name__)

BEGINNING_BYTES = 4 * 1024
PIECE_BYTES = 64 * 1024
FILE_PIECE_BYTES = 1024 * 1024
ORPHAN_KEPT_S = 3600.0
WRITES_AT_ONCE = 4
SWEPT_AT_ONCE = 256  # files whose rows are asked for by one query


class Piece(NamedTuple):
    """Some of a body, in whole characters."""

    body: str
    next_offset: int | None  # None: the body ends here


class _Kept(NamedTuple):
    """How a large body goes into a message's row."""

    beginning: MessageBody
    file: tuple[str, int]  # (sha256, bytes)


class Bodies:
    """The files under `folder`, which is the daemon's alone: state_dir/bodies/ab/SHA256."""

    def __init__(self, folder: Path, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._store = store
        self._clock = clock
        self._changing = threading.Lock()  # a name is given or taken, never both at once
        self._in_hand: Counter[str] = Counter()  # files whose message is being stored
        self._newest: dict[str, tuple[int, int]] = {}  # which file each that is in hand was written to last
        self._writes = trio.CapacityLimiter(WRITES_AT_ONCE)
        self._on_disk: set[Path] = set()  # folders whose names are: made by us, or synced again

    @asynccontextmanager
    async def kept(self, body: MessageBody) -> AsyncIterator[_Kept]:
        """Keep the file of a large body while its message is stored inside; take it away if no message names it.

        The inside cannot be cancelled: afterwards it is known whether there is a message. Raises
        Refusal("unavailable") when the disk does not take the file, and then nothing is left of it.
        """
        data = body.encode()
        sha256 = hashlib.sha256(data).hexdigest()

        def write() -> None:
            try:
                self._give_name(self._new_file(sha256[:2], [data]), sha256)
            except OSError as exc:
                raise Refusal("unavailable", f"cannot keep a message of {len(data):,} bytes: {explain(exc)}") from None

        async with self._put([sha256], write):
            yield _Kept(MessageBody(piece(data, 0, BEGINNING_BYTES).body), (sha256, len(data)))

    @asynccontextmanager
    async def kept_files(self, uploads: Sequence[Upload], limits: Limits) -> AsyncIterator[tuple[Attached, ...]]:
        """The same for the files that come with a message. Raises Refusal, too, for what is too much or too large."""
        check_count(len(uploads), limits)
        names = numbered(upload.name for upload in uploads)
        new: list[tuple[Path, Attached]] = []

        def take_in() -> None:
            for name, upload in zip(names, uploads, strict=True):
                new.append(self._take_in(upload._replace(name=name), sum(one.bytes for _, one in new), limits))

        def write() -> None:
            with _keeping([one.name for _, one in new]):
                for temporary, one in new:
                    self._give_name(temporary, one.sha256)

        try:
            await trio.to_thread.run_sync(take_in, limiter=self._writes)
            async with self._put([one.sha256 for _, one in new], write):
                yield tuple(one for _, one in new)
        finally:
            for temporary, _ in new:
                with suppress(OSError):  # those that have their names now are not there
                    temporary.unlink()

    @asynccontextmanager
    async def _put(self, names: Sequence[str], write: Callable[[], None]) -> AsyncIterator[None]:
        """Have `write` put files in place, and keep them while a message is stored inside, which nobody cancels."""
        self._in_hand.update(names)
        try:
            await trio.to_thread.run_sync(write, limiter=self._writes)
            with trio.CancelScope(shield=True):
                yield
        finally:
            self._in_hand -= Counter(names)
            for name in set(names) - self._in_hand.keys():
                if (newest := self._newest.pop(name, None)) is not None:
                    with trio.CancelScope(shield=True):
                        await self._drop_if_nobodys(name, newest)

    async def whole(self, sha256: str) -> str:
        """The text of a file. Raises Refusal("unavailable") when it is gone or holds something else."""
        return await trio.to_thread.run_sync(read_file, self._folder, sha256)

    async def sweep(self) -> int:
        """Remove files of an hour and more that no message names; how many went."""
        removed = 0
        for names in await trio.to_thread.run_sync(lambda: list(self._old_files())):
            named = await self._named(names)
            removed += await trio.to_thread.run_sync(self._remove_old, [name for name in names if name not in named])
        if removed:
            log.info("removed %s of large messages that nobody refers to", counted(removed, "file"))
        return removed

    async def _named(self, names: list[str]) -> set[str]:
        marks = ", ".join("?" * len(names))
        sql = f"""
            SELECT body_sha256 FROM messages WHERE body_sha256 IN ({marks}) AND body_sha256 IS NOT NULL
            UNION SELECT sha256 FROM attachments WHERE sha256 IN ({marks})
        """
        return {row[0] for row in await self._store.rows(sql, [*names, *names])}

    def _take_in(self, upload: Upload, others: int, limits: Limits) -> tuple[Path, Attached]:
        """A file of what an upload holds, without its name yet; `others` have so many bytes already."""
        digest, size = hashlib.sha256(), 0

        def pieces() -> Iterator[bytes]:
            nonlocal size
            for data in read_pieces(upload):
                size += len(data)
                check_size(upload.name, size, others, limits)
                digest.update(data)
                yield data

        with _keeping([upload.name]):
            temporary = self._new_file(secrets.token_hex(1), pieces())
        return temporary, Attached(upload.name, size, digest.hexdigest())

    def _new_file(self, place: str, pieces: Iterable[bytes]) -> Path:
        """A file that holds the pieces, on disk, and has no name yet that anybody looks for."""
        folder = self._folder / place
        self._make_folder(self._folder)
        self._make_folder(folder)
        temporary = folder / f".{secrets.token_hex(16)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for data in pieces:
                    rest = memoryview(data)
                    while rest:
                        rest = rest[file.write(rest) :]
                os.fsync(descriptor)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _give_name(self, temporary: Path, sha256: str) -> None:
        """Put a file in place, on disk with its name. The same content again gets a file of its own."""
        folder = self._folder / sha256[:2]
        try:
            self._make_folder(folder)
            newest = _which(temporary.lstat())
            with self._changing:
                temporary.rename(folder / sha256)
                self._newest[sha256] = newest
            sync_folder(folder)
        except BaseException:
            # A name that may not be on disk stays for the sweep: a message may have had this file before.
            temporary.unlink(missing_ok=True)
            raise

    def _make_folder(self, folder: Path) -> None:
        """Have a folder whose name is on disk too. One that was there may be from a daemon that died before that."""
        if folder not in self._on_disk:
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)
            self._on_disk.add(folder)

    async def _drop_if_nobodys(self, sha256: str, newest: tuple[int, int]) -> None:
        """Take away a file that nobody has in hand, if no message came of it."""
        if await self._named([sha256]):
            return
        path = self._path(sha256)

        def remove() -> None:
            # Who has begun to send the same since then has put another file there.
            with self._changing, suppress(OSError):
                if _which(path.lstat()) == newest:
                    path.unlink()

        await trio.to_thread.run_sync(remove)

    def _old_files(self) -> Iterator[list[str]]:
        """The names of files that are old enough to be swept, a batch at a time; old temporary files go at once."""
        names: list[str] = []
        for path in self._folder.glob("[0-9a-f][0-9a-f]/*"):
            if self._is_young(path):
                continue
            if path.name.startswith("."):
                with suppress(OSError):
                    path.unlink()
                continue
            names.append(path.name)
            if len(names) == SWEPT_AT_ONCE:
                yield names
                names = []
        if names:
            yield names

    def _remove_old(self, names: list[str]) -> int:
        removed = 0
        for name in names:
            # Looked at again with nobody else at it: a send may have put the same body there in between. A file that
            # the disk does not give up now is there for the next sweep.
            with self._changing, suppress(OSError):
                if name not in self._in_hand and not self._is_young(self._path(name)):
                    self._path(name).unlink()
                    removed += 1
        return removed

    def _is_young(self, path: Path) -> bool:
        try:
            age_s = self._clock() - path.lstat().st_mtime
        except FileNotFoundError:
            return True
        return age_s < ORPHAN_KEPT_S  # a file of the future is young too: the clock was set back

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256


@contextmanager
def _keeping(names: Sequence[str]) -> Iterator[None]:
    """What the disk says against attached files, as a Refusal."""
    try:
        yield
    except OSError as exc:
        why = explain(OSError(exc.errno, exc.strerror))
        raise Refusal("unavailable", f"cannot keep {', '.join(names)}: {why}") from None


def read_pieces(upload: Upload) -> Iterator[bytes]:
    """What an upload holds. Raises Refusal("usage") where it cannot be read."""
    try:
        upload.file.seek(0)
        while data := upload.file.read(FILE_PIECE_BYTES):
            yield data
    except OSError as exc:
        why = explain(OSError(exc.errno, exc.strerror))
        raise Refusal("usage", f"cannot attach {upload.name}: it cannot be read ({why})") from None


def _which(found: os.stat_result) -> tuple[int, int]:
    """Tells one file from the next of the same name."""
    return found.st_ino, found.st_mtime_ns


def is_large(body: str) -> bool:
    """Whether a body is kept as a file."""
    return len(body) > INLINE_LIMIT_BYTES or len(body.encode()) > INLINE_LIMIT_BYTES


def read_file(folder: Path, sha256: str) -> str:
    """The text of one file, as `Bodies.whole`; for whoever stands in a thread."""
    try:
        descriptor = os.open(folder / sha256[:2] / sha256, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(BODY_LIMIT_BYTES + 1)
    except OSError as exc:
        why = "its file is gone" if exc.errno == errno.ENOENT else explain(exc)
        raise Refusal("unavailable", f"cannot read the whole body: {why}; a backup may have {sha256}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Refusal("unavailable", f"cannot read the whole body: its file was changed; a backup may have {sha256}")
    return data.decode()


def open_kept(folder: Path, sha256: str) -> BinaryIO:
    """An attached file as it is kept; who reads it looks at its digest. Raises Refusal("unavailable")."""
    try:
        descriptor = os.open(folder / sha256[:2] / sha256, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        why = "its file is gone" if exc.errno == errno.ENOENT else explain(exc)
        raise Refusal("unavailable", f"the hive's own copy cannot be read: {why}; a backup may have {sha256}") from None
    return open(descriptor, "rb", buffering=0)


def piece(data: bytes, offset: int, limit_bytes: int = PIECE_BYTES) -> Piece:
    """The characters of UTF-8 `data` from byte `offset` that fit into the limit. Raises Refusal("usage")."""
    if not 0 <= offset <= len(data):
        raise Refusal("usage", f"cannot read from byte {offset:,}: the body has {len(data):,}; begin with 0")
    if offset < len(data) and _inside_character(data[offset]):
        raise Refusal("usage", f"cannot read from byte {offset:,}: it is inside a character; use next_offset")
    end = min(offset + limit_bytes, len(data))
    while end < len(data) and _inside_character(data[end]):
        end -= 1
    return Piece(data[offset:end].decode(), end if end < len(data) else None)


def _inside_character(byte: int) -> bool:
    return byte & 0xC0 == 0x80
