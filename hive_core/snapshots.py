"""Snapshots of agents' /state, kept beside it in agents/NAME/snapshots. All of it blocks: it runs in threads.

A snapshot is a directory INSTANT with `state`, a copy, `entries.json`, what stands in it, and `about.json`. It is
written as `.new` and synced before it gets its name, so whatever stands under an instant is whole. It goes with its
agent's directory: it is kept under a tombstone, comes back with a revival and is removed by a purge.

A restore lays the snapshot out as `.restored`, moves the present state away, whole, as a snapshot of its own, and moves
`.restored` into its place. `settle` ends or undoes what a daemon that died left half done.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, shown
from hive_core.tree_copies import Entries, Tally, TooMuch, copy_changed, lay_out, scan
from hive_core.trees import measure_tree, open_folder, remove_tree

PLACE = "snapshots"
COPY_WITHIN_S = 60.0  # no turn begins meanwhile
MEASURE_WITHIN_S = 2.0
DAY_MS = 24 * 3600 * 1000
_ID = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_NEW, _REPLACED, _RESTORED = ".new", ".replaced", ".restored"
_FORMS = {"f": (int,) * 5, "d": (int, dict), "l": (str,)}  # of an entry, after its kind; tree_copies.py
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What is known of one.

    id        the instant that it was taken, as 2026-01-31T08:30:00Z
    why       what made the hive take it
    files     directories and links count, too
    left_out  what is neither file, directory nor link, or could not be read
    changed   files that were written to while they were copied
    """

    id: str
    at_ms: int
    why: str
    files: int
    bytes: int
    left_out: int
    changed: int


class Snapshots:
    """The snapshots of one agent. Whoever uses it does so one call at a time.

    kept_most, bytes_most  how many are kept, and how much they may take together
    """

    def __init__(self, state_dir: Path, name: AgentName, kept_most: int, bytes_most: int) -> None:
        self._own = state_dir / "agents" / name
        self._name = name
        self._kept_most, self._bytes_most = kept_most, bytes_most

    def all(self) -> list[Snapshot]:
        """Every one, the newest first."""
        with contextlib.suppress(FileNotFoundError), self._open() as (_, place):
            return [] if place is None else _list(place)
        return []

    def find(self, raw: object) -> Snapshot:
        """The one whose id begins so. Raises Refusal when there is none, or more than one."""
        found = [one for one in self.all() if isinstance(raw, str) and raw and one.id.startswith(raw)]
        if not found:
            raise Refusal(
                "not_found",
                f"cannot find {shown(raw)} of {self._name}: no snapshot has that name; "
                f"`hive snapshots {self._name}` lists them",
            )
        if len(found) > 1:
            raise Refusal(
                "usage", f"cannot tell which is meant: {found[0].id} or {found[-1].id}; give more of its name"
            )
        return found[0]

    def bytes(self) -> int:
        """What they take of the disk together, at least."""
        with contextlib.suppress(OSError), self._open() as (own, _):
            return measure_tree(PLACE, own, time.monotonic() + MEASURE_WITHIN_S)[0]
        return 0

    def take(self, why: str, now_ms: int) -> Snapshot | None:
        """Take one of what stands in /state now; None when nothing changed since the last.

        Raises Refusal("failed") when it is too large, or OSError; then there is none, and those before stay.
        """
        with self._open(make=True) as (own, place), _opened_state(own) as state:
            assert place is not None
            last = next(iter(_list(place)), None)
            before: Entries = {}
            with contextlib.suppress(Refusal):  # nothing is shared with one that is damaged
                before = (_entries(place, last.id) if last else None) or {}
            with self._explained():
                now = scan(state, self._tally())  # also before the first: what is too large is not copied in vain
            if last is not None and now == before:
                return None
            try:
                taken = self._copy(place, state, last, before, why, now_ms)
            except BaseException:
                _remove(_NEW, place)
                raise
            self._forget_old(place)
            return taken

    def last_other(self) -> Snapshot:
        """The newest whose content is not what stands in /state now. Raises Refusal."""
        with self._open() as (own, place):
            listed = [] if place is None else _list(place)
            now: Entries = {}
            with contextlib.suppress(FileNotFoundError, TooMuch), _opened_state(own) as state:
                now = scan(state, self._tally())
            for one in listed:
                assert place is not None
                with contextlib.suppress(Refusal):  # one that is damaged is restored by its name alone, if at all
                    entries = _entries(place, one.id)
                    if entries is not None and _content(entries) != _content(now):
                        return one
        none = "it has no snapshot yet; one is taken at the edge of its next turn"
        if listed:
            none = f"its snapshots are what it has now; `hive snapshots {self._name}` lists them: name the one you mean"
        raise Refusal("not_found", f"cannot restore the state of {self._name}: {none}")

    def restore(self, wanted: Snapshot, now_ms: int) -> Snapshot:
        """Let /state be what it was, while the agent does not run; the snapshot that what was there is kept as.

        Raises Refusal, OSError; then /state is what it was before.
        """
        self.settle()
        with self._open() as (own, place):
            assert place is not None
            try:
                self._lay_out(own, place, wanted)
                kept = self._write_down_present(own, place, f"before {wanted.id} was restored", now_ms)
                _sync_all(own)
            except BaseException:
                _remove(_REPLACED, place)
                _remove(_RESTORED, own)
                raise
        self.settle(go_on=True)
        return kept

    def settle(self, go_on: bool = False) -> None:
        """End what is half done, or undo it where the present state is not moved away yet, unless it is to `go_on`."""
        if not os.path.lexists(self._own / PLACE) and not os.path.lexists(self._own / _RESTORED):
            return
        with self._open() as (own, place):
            if place is None:
                return
            _remove(_NEW, place)
            moved = _is_there(f"{_REPLACED}/state", place)
            if not moved and not (go_on and _is_there(_RESTORED, own)):
                _remove(_REPLACED, place)
                _remove(_RESTORED, own)
                return
            if not moved:
                os.rename("state", f"{_REPLACED}/state", src_dir_fd=own, dst_dir_fd=place)
            if _is_there(_RESTORED, own):
                os.rename(_RESTORED, "state", src_dir_fd=own, dst_dir_fd=own)
            os.fsync(own)
            os.rename(_REPLACED, _about(_REPLACED, place).id, src_dir_fd=place, dst_dir_fd=place)
            os.fsync(place)

    @contextlib.contextmanager
    def _open(self, make: bool = False) -> Iterator[tuple[int, int | None]]:
        """Descriptors of the agent's own directory and of its snapshots; None where it has none."""
        with contextlib.ExitStack() as stack:
            own = open_folder(self._own)
            stack.callback(os.close, own)
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(PLACE, 0o700, dir_fd=own)
            place = None
            with contextlib.suppress(FileNotFoundError):
                place = open_folder(PLACE, own)
                stack.callback(os.close, place)
            yield own, place

    def _tally(self) -> Tally:
        return Tally(self._bytes_most, time.monotonic() + COPY_WITHIN_S)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TooMuch as exc:
            why = f"{exc}; make it smaller"
            raise Refusal("failed", f"cannot take a snapshot of {self._name}'s /state: {why}") from None

    def _copy(self, place: int, state: int, last: Snapshot | None, before: Entries, why: str, now_ms: int) -> Snapshot:
        _remove(_NEW, place)
        tally = self._tally()
        os.mkdir(_NEW, 0o700, dir_fd=place)
        with contextlib.ExitStack() as stack, self._explained():
            new = stack.enter_context(_opened(place, _NEW))
            os.mkdir("state", 0o700, dir_fd=new)
            target = stack.enter_context(_opened(new, "state"))
            earlier = stack.enter_context(_opened(place, f"{last.id}/state")) if last else None
            entries = copy_changed(state, target, tally, before, earlier)
            taken = Snapshot(
                _free_id(place, now_ms), now_ms, why, tally.files, tally.bytes, tally.left_out, tally.changed
            )
            _write_down(new, taken, entries)
        _sync_all(place)
        os.rename(_NEW, taken.id, src_dir_fd=place, dst_dir_fd=place)
        os.fsync(place)
        return taken

    def _lay_out(self, own: int, place: int, wanted: Snapshot) -> None:
        _remove(_RESTORED, own)
        os.mkdir(_RESTORED, 0o700, dir_fd=own)
        if (entries := _entries(place, wanted.id)) is None:
            why = f"it has too many files to be listed; they are in {self._own / PLACE / wanted.id / 'state'}"
            raise Refusal("failed", f"cannot restore {wanted.id} of {self._name}: {why}: take from there what you need")
        tally = Tally(2**62, time.monotonic() + 10 * COPY_WITHIN_S)
        try:
            with _opened(own, _RESTORED) as target, _opened(place, f"{wanted.id}/state") as source:
                lay_out(source, entries, target, tally)
        except TooMuch as exc:
            raise Refusal("failed", f"cannot restore the state of {self._name}: {exc}") from None

    def _write_down_present(self, own: int, place: int, why: str, now_ms: int) -> Snapshot:
        """Say what the present state is, which is about to be moved among the snapshots, whatever is in it."""
        _remove(_REPLACED, place)
        os.mkdir(_REPLACED, 0o700, dir_fd=place)
        with contextlib.suppress(FileExistsError):
            os.mkdir("state", 0o700, dir_fd=own)
        entries: Entries | None = None
        tally = Tally(2**62, time.monotonic() + COPY_WITHIN_S)
        with contextlib.suppress(TooMuch), _opened_state(own) as state:
            entries = scan(state, tally)
        kept = Snapshot(_free_id(place, now_ms), now_ms, why, tally.files, tally.bytes, tally.left_out, 0)
        with _opened(place, _REPLACED) as folder:
            _write_down(folder, kept, entries)
        return kept

    def _forget_old(self, place: int) -> None:
        listed = _list(place)
        for gone in spare(listed, self._kept_most, self._bytes_most):
            _remove(gone, place)
            listed = [one for one in listed if one.id != gone]
        while len(listed) > 1 and self.bytes() > self._bytes_most:
            _remove(listed.pop().id, place)


def spare(listed: Sequence[Snapshot], kept_most: int, bytes_most: int) -> list[str]:
    """Which of these, the newest first, need not be kept: of the older half one a day is, and none that is too large.

    The newest is kept whatever it is.
    """
    kept: list[Snapshot] = []
    gone = []
    for one in listed:
        recent = len(kept) < (kept_most + 1) // 2
        a_day_older = bool(kept) and kept[-1].at_ms - one.at_ms >= DAY_MS
        fits = len(kept) < kept_most and one.bytes <= bytes_most
        if not kept or (fits and (recent or a_day_older)):
            kept.append(one)
        else:
            gone.append(one.id)
    return gone


def _list(place: int) -> list[Snapshot]:
    found = []
    for name in os.listdir(place):
        if _ID.fullmatch(name):
            with contextlib.suppress(OSError, ValueError, TypeError):
                found.append(_about(name, place))
    return sorted(found, key=lambda one: one.id, reverse=True)


def _about(name: str, place: int) -> Snapshot:
    """What a snapshot says of itself. Raises OSError, ValueError, TypeError."""
    about = Snapshot(**json.loads(_read(f"{name}/about.json", place)))
    if not _ID.fullmatch(about.id):
        raise ValueError("its id is no instant")
    return about


def _entries(place: int, ident: str) -> Entries | None:
    """What stands in a snapshot; None where that was moved there whole, and was too much to be listed.

    Raises Refusal("failed") where that is not what was written there.
    """
    try:
        entries: Entries | None = json.loads(_read(f"{ident}/entries.json", place))
        if entries is not None:
            _check(entries)
    except (OSError, ValueError, RecursionError) as exc:
        fix = f"choose another, or take what you need from its `state` in {PLACE}/{ident}"
        raise Refusal(
            "failed", f"cannot use the snapshot {ident}: its entries.json is damaged ({exc}); {fix}"
        ) from None
    return entries


def _check(entries: object) -> None:
    """Raise ValueError for what no `scan` gives."""
    if not isinstance(entries, dict):
        raise ValueError("it holds no entries")
    for name, entry in entries.items():
        kind, *given = entry if isinstance(entry, list) and entry else [None]
        forms = _FORMS.get(kind) if isinstance(kind, str) else None
        named = name not in ("", ".", "..") and "/" not in name and "\0" not in name
        if not named or forms is None or tuple(map(type, given)) != forms:
            raise ValueError("one of them has no form that is known")
        if kind == "d":
            _check(given[1])


def _content(entries: Entries) -> Entries:
    """What an agent would call the same, in whatever files it stands."""
    return {
        name: ["d", entry[1], _content(entry[2])] if entry[0] == "d" else entry[:4] for name, entry in entries.items()
    }


def _read(path: str, place: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place), "rb") as file:
        return file.read()


def _write_down(folder: int, one: Snapshot, entries: Entries | None) -> None:
    # ASCII, so that a name that is not UTF-8 survives.
    for name, content in (("about.json", asdict(one)), ("entries.json", entries)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=folder), "w", encoding="ascii") as file:
            json.dump(content, file)


def _free_id(place: int, now_ms: int) -> str:
    at = datetime.fromtimestamp(now_ms / 1000, UTC)
    while _is_there(ident := at.strftime("%Y-%m-%dT%H:%M:%SZ"), place):
        at += timedelta(seconds=1)
    return ident


def _is_there(path: str, folder: int) -> bool:
    try:
        os.stat(path, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        remove_tree(name, folder)


@contextlib.contextmanager
def _opened(folder: int, path: str) -> Iterator[int]:
    descriptor = open_folder(path, folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _opened_state(own: int) -> contextlib.AbstractContextManager[int]:
    """/state itself. Its agent may have taken from its owner what it takes to look into it and to move it."""
    if stat.S_ISDIR(os.stat("state", dir_fd=own, follow_symlinks=False).st_mode):
        os.chmod("state", 0o700, dir_fd=own)
    return _opened(own, "state")


def _sync_all(folder: int) -> None:
    """Have on disk whatever was written on the file system of a directory: one call for many files."""
    if _libc.syncfs(folder) < 0:
        raise OSError(ctypes.get_errno(), "cannot sync the disk of the snapshots")
