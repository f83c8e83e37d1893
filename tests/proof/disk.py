"""A disk that forgets: what a recorded process wrote, and what may be left of that when the power goes.

Only what a sync has confirmed is sure to be there. Of the rest each write may have reached the disk, or not, or some
of its sectors, in any order; and a file's name is the business of its directory, which is synced by itself. This is
less than what most file systems promise, so what survives here survives there.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CALLS = "openat,pwrite64,write,ftruncate,fallocate,fdatasync,fsync,rename,renameat,renameat2,unlink,unlinkat,mkdir,link"
SECTORS = (512, 4096)
# What sqlite makes anew from the log when it opens the database.
FORGOTTEN = "-shm"


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that a process did to a file, done by the time the next one in the list began."""

    kind: str  # create, write, truncate, sync, rename, unlink or told
    path: str
    offset: int = 0  # of a write; the length of a truncate
    data: bytes = b""
    to: str = ""  # of a rename
    begun: int = 0  # sync: how many operations it confirms; what came while it ran may have been too late


def record(command: Sequence[str], log: Path, folder: Path, answers: Path, **environment: str) -> list[Operation]:
    """Run a command to its end, and return what it did to the files of `folder`, and when it wrote to `answers`."""
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-yy", "-xx", "-s", "1000000", "-e", f"trace={CALLS}"]
    done = subprocess.run([*strace, "-o", str(log), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(read_log(log, folder, answers))


_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_UNFINISHED = re.compile(r"(.*) <unfinished \.\.\.>$", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)", re.DOTALL)
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)")


def read_log(log: Path, folder: Path, answers: Path) -> Iterator[Operation]:
    """The operations of an strace log, each where it ended."""
    open_calls: dict[str, tuple[str, int]] = {}  # process → the beginning of its call, and what was done by then
    count = 0
    for text in log.read_text("ascii").splitlines():
        match = _LINE.match(text)
        assert match is not None, text[:200]
        process, call = match[1], match[2]
        begun = count
        if part := _UNFINISHED.match(call):
            open_calls[process] = (part[1], count)
            continue
        if part := _RESUMED.match(call):
            first, begun = open_calls.pop(process)
            call = first + part[1]
        operation = _as_operation(call, begun, folder, answers)
        if operation is not None:
            count += 1
            yield operation


def _as_operation(call: str, begun: int, folder: Path, answers: Path) -> Operation | None:
    match = _CALL.match(call)
    if match is None or int(match[3]) < 0:
        return None
    name, given, result = match[1], match[2], int(match[3])
    strings = [_bytes(found) for found in _STRING.findall(given)]
    descriptors = [_bytes(found).decode() for found in _DESCRIPTOR.findall(given)]
    numbers = [int(found) for found in re.findall(r", (\d+)(?=,|$)", given)]
    # A relative path stands behind the descriptor of its folder; the processes we record use whole ones.
    at = strings[0].decode("utf-8", "replace") if strings and name not in ("write", "pwrite64") else ""
    path = at or (descriptors[0] if descriptors else "")
    if path == str(answers) and name == "write":
        return Operation("told", path, data=strings[0])
    if not (path == str(folder) or path.startswith(f"{folder}/")) or path.endswith(FORGOTTEN):
        return None
    match name:
        case "openat" if "O_CREAT" in given or "O_TRUNC" in given:
            return Operation("truncate" if "O_TRUNC" in given else "create", path)
        case "openat":
            return None
        case "pwrite64":
            return Operation("write", path, numbers[-1], strings[0][:result])
        case "write":
            return Operation("write", path, -1, strings[0][:result])  # where the file ends: nobody here seeks
        case "ftruncate":
            return Operation("truncate", path, numbers[-1])
        case "fallocate":
            return Operation("truncate", path, -1)
        case "fdatasync" | "fsync":
            return Operation("sync", path, begun=begun)
        case "rename" | "renameat" | "renameat2":
            return Operation("rename", path, to=strings[1].decode())
        case "link":
            return Operation("link", path, to=strings[1].decode())
        case "unlink" | "unlinkat":
            return Operation("unlink", path)
        case "mkdir":
            return Operation("mkdir", path)
    raise AssertionError(f"a recorded call is not understood: {call[:200]}")


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


def _folder(path: str) -> str:
    return str(Path(path).parent)


class _File:
    """What a file surely holds, and the operations on it that no sync has confirmed yet, by their numbers."""

    def __init__(self) -> None:
        self.sure = bytearray()
        self.size = 0  # as the process sees it
        self.is_folder = False
        self.pending: list[tuple[int, Operation]] = []


@dataclass
class Disk:
    """Feed it operations in order; `after_power_loss` says what is left if the power goes now."""

    folder: str
    _names: dict[str, _File] = field(default_factory=dict)  # as the process sees them
    _sure_names: dict[str, _File] = field(default_factory=dict)
    _pending_names: list[tuple[int, Operation, _File | None]] = field(default_factory=list)
    _count: int = 0

    def feed(self, operation: Operation) -> None:
        number, self._count = self._count, self._count + 1
        path = operation.path
        match operation.kind:
            case "told":
                return
            case "mkdir":
                self._names[path] = _File()
                self._names[path].is_folder = True
                self._pending_names.append((number, operation, self._names[path]))
                return
            case "sync":
                self._sync(path, operation.begun)
                return
            case "rename" | "link":
                moved = self._names[path]
                if operation.kind == "rename":
                    del self._names[path]
                self._names[operation.to] = moved
                if operation.kind == "rename" and _folder(path) != _folder(operation.to):
                    # Two folders, each synced by itself: the new name may be there before the old one has gone.
                    self._pending_names.append((number, Operation("link", path, to=operation.to), moved))
                    self._pending_names.append((number, Operation("unlink", path), None))
                else:
                    self._pending_names.append((number, operation, moved))
                return
            case "unlink":
                self._names.pop(path, None)
                self._pending_names.append((number, operation, None))
                return
        if path not in self._names:
            self._names[path] = _File()
            self._pending_names.append((number, Operation("create", path), self._names[path]))
        file = self._names[path]
        if operation.kind == "create" or (operation.offset == -1 and operation.kind == "truncate"):
            return
        if operation.offset == -1:
            operation = Operation("write", path, file.size, operation.data)
        is_write = operation.kind == "write"
        file.size = max(file.size, operation.offset + len(operation.data)) if is_write else operation.offset
        file.pending.append((number, operation))

    def _sync(self, path: str, begun: int) -> None:
        file = self._names.get(path)
        if file is not None and not file.is_folder:
            for number, operation in file.pending:
                if number < begun:
                    _apply(file.sure, operation)
            file.pending = [(number, operation) for number, operation in file.pending if number >= begun]
            return
        later = []
        for number, operation, moved in self._pending_names:
            if number < begun and _folder(operation.to or operation.path) == path:
                _rename(self._sure_names, operation, moved)
            else:
                later.append((number, operation, moved))
        self._pending_names = later

    @property
    def unsynced(self) -> int:
        """How many operations no sync has confirmed."""
        return len(self._pending_names) + sum(len(file.pending) for file in self._names.values())

    def after_power_loss(self, keep: Keep) -> dict[str, bytes]:
        """What stands under each path, when `keep` decides about everything that is not sure."""
        names = dict(self._sure_names)
        for _, operation, moved in self._pending_names:
            if keep.whole():
                _rename(names, operation, moved)
        left = {}
        for path, file in names.items():
            above = [str(folder) for folder in Path(path).parents if str(folder).startswith(f"{self.folder}/")]
            if file.is_folder or not all(folder in names for folder in above):
                continue
            contents = bytearray(file.sure)
            for _, operation in file.pending:
                for piece in keep.pieces(operation):
                    _apply(contents, piece)
            left[path] = bytes(contents)
        return left


class Keep:
    """One way in which a disk may forget, drawn from a seed: 0 forgets all that is not sure, 1 forgets nothing."""

    def __init__(self, seed: str, way: int) -> None:
        self._chance = random.Random(f"{seed}/{way}")
        self._share = {0: 0.0, 1: 1.0}.get(way, self._chance.choice((0.1, 0.5, 0.9, 0.97)))
        self._torn = 0.0 if way < 2 else self._chance.choice((0.0, 0.2, 0.6))

    def whole(self) -> bool:
        return self._chance.random() < self._share

    def pieces(self, operation: Operation) -> Iterator[Operation]:
        """What is left of a write: all, nothing, or some of its sectors."""
        if operation.kind == "write" and self._chance.random() < self._torn:
            sector = self._chance.choice(SECTORS)
            end = operation.offset + len(operation.data)
            start = operation.offset
            while start < end:
                stop = min(end, (start // sector + 1) * sector)
                if self.whole():
                    data = operation.data[start - operation.offset : stop - operation.offset]
                    yield Operation("write", operation.path, start, data)
                elif self._chance.random() < 0.5:
                    # The file grew, and what was to stand there did not arrive.
                    yield Operation("grow", operation.path, stop)
                start = stop
        elif self.whole():
            yield operation


def _apply(contents: bytearray, operation: Operation) -> None:
    end = operation.offset + len(operation.data)
    if operation.kind == "truncate":
        del contents[operation.offset :]
    if len(contents) < end:
        contents.extend(bytes(end - len(contents)))
    if operation.kind == "write":
        contents[operation.offset : end] = operation.data


def _rename(names: dict[str, _File], operation: Operation, moved: _File | None) -> None:
    if moved is not None:
        names[operation.to or operation.path] = moved
    if operation.kind in ("rename", "unlink"):
        names.pop(operation.path, None)
