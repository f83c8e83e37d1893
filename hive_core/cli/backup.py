"""`hive backup` and `hive restore`, and what they say."""

from __future__ import annotations

import json
import os
import stat
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from hive_core.cli.show import safe
from hive_core.lock import take_lock
from hive_core.procedures.backup import Report, back_up
from hive_core.procedures.restore import Manifest, verify
from hive_core.procedures.restore import restore as bring_back
from hive_core.protocol.paths import explain, state_dir, sync_folder
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted

TOLD = 20  # names of what was left out or changed
EVERY_S = 0.1


class _Progress:
    """A line of counts on a terminal, nothing elsewhere."""

    def __init__(self, verb: str) -> None:
        self._verb, self._shown, self._told_at = verb, sys.stderr.isatty(), 0.0

    def __call__(self, files: int, size: int) -> None:
        if self._shown and time.monotonic() - self._told_at >= EVERY_S:
            self._told_at = time.monotonic()
            print(f"\r{self._verb}: {_counts(files, size)} ", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._told_at:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def backup(file: str, *, with_credentials: bool, as_json: bool) -> int:
    """Write the hive of the configured state directory to a file, or to standard output."""
    os.umask(0o077)
    state = Path(state_dir())
    try:
        report = _to_stdout(state, with_credentials) if file == "-" else _to_file(state, Path(file), with_credentials)
    except OSError as exc:
        raise Refusal("failed", f"cannot back up {state}: {explain(exc)}") from None
    print(
        json.dumps(asdict(report)) if as_json else _told(report, file), file=sys.stderr if file == "-" else sys.stdout
    )
    return 0


def _to_stdout(state: Path, with_credentials: bool) -> Report:
    if sys.stdout.isatty():
        raise Refusal("usage", "cannot write a backup to a terminal: give a file, or send the output somewhere")
    with tempfile.TemporaryDirectory(prefix="hive-backup-") as work:
        return _write(state, sys.stdout.buffer, Path(work), with_credentials)


def _to_file(state: Path, target: Path, with_credentials: bool) -> Report:
    """Under its own name there is a whole backup that was read back, or what was there before."""
    given, target = target, _place_of(target, state)
    try:
        folder = tempfile.TemporaryDirectory(prefix=".hive-backup-", dir=target.parent)
    except OSError as exc:
        exc.filename = str(target.parent)  # and not a name that nobody gave
        raise Refusal("failed", f"cannot back up to {safe(str(given))}: {explain(exc)}") from None
    with folder as work:
        part = Path(work) / "part"
        with part.open("w+b") as out:
            report = _write(state, out, Path(work), with_credentials)
            out.flush()
            os.fsync(out.fileno())
            progress = _Progress("reading it back")
            verify(out, Path(work), progress)
            progress.end()
        _place_of(given, state)  # again: that took a while, and a replace asks nobody
        os.replace(part, target)
        sync_folder(target.parent)
    return report


def _place_of(given: Path, state: Path) -> Path:
    """Where the file itself stands or is to stand, behind all links. Raises Refusal for what we must not replace."""
    cannot = f"cannot back up to {safe(str(given))}"
    try:
        mode = os.stat(given).st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    except OSError as exc:
        raise Refusal("failed", f"cannot back up to {explain(exc)}") from None
    target, why = Path(os.path.realpath(given)), ""
    if stat.S_ISDIR(mode):
        why = "it is a directory"
    elif not stat.S_ISREG(mode):
        why = "it is no file"  # a device belongs to everybody: replaced, it is gone for all
    elif target.is_relative_to(state.resolve()):
        why = "it lies in the state directory"
    if why:
        raise Refusal("usage", f"{cannot}: {why}; give the name of a file elsewhere")
    if not target.parent.is_dir():
        raise Refusal("not_found", f"{cannot}: there is no directory {safe(str(target.parent))}; make it first")
    return target


def _write(state: Path, out: BinaryIO, work: Path, with_credentials: bool) -> Report:
    progress = _Progress("backing up")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return back_up(state, out, work, with_credentials=with_credentials, now=now, tell=progress)
    finally:
        progress.end()


def restore(file: str, *, check: bool, paused: bool, as_json: bool) -> int:
    """Bring a backup into the configured state directory, or only look whether that could be done."""
    os.umask(0o077)
    try:
        with _open_source(file) as source:
            manifest = _check(source) if check else _bring_back(source, paused)
    except OSError as exc:
        raise Refusal("failed", f"cannot restore from {safe(file)}: {explain(exc)}") from None
    result = {
        "checked": check,
        "version": manifest.version,
        "made_at": manifest.made_at,
        "agents": manifest.agents,
        "credentials": manifest.credentials,
        "files": len(manifest.files),
        "bytes": manifest.bytes,
    }
    if as_json:
        print(json.dumps(result))
        return 0
    what = f"{_counts(len(manifest.files), manifest.bytes)}, agents {safe(', '.join(manifest.agents))}"
    print(f"{'whole' if check else 'restored'}: {what}; made {safe(manifest.made_at)} by {safe(manifest.version)}")
    if not check:
        print("`hive up` starts it" + (", and `hive start` each agent" if paused else "; its agents go on"))
    if not manifest.credentials:
        print("it holds no credentials: the hive looks for one of the model provider when it starts;")
        print("`hive project add` and `hive forge add`, with the words of before, give those of projects and forges")
    return 0


def _open_source(file: str) -> BinaryIO:
    """The backup, opened without waiting for whoever would fill a fifo."""
    cannot = f"cannot restore from {safe(file)}"
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refusal("not_found", f"{cannot}: there is no such file; give the path of a backup") from None
    except OSError as exc:
        exc.filename = None
        raise Refusal("failed", f"{cannot}: {explain(exc)}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise Refusal("usage", f"{cannot}: it is no file, but a directory; give the path of a backup")
    raise Refusal("usage", f"{cannot}: it is read twice; save it to a file first")


def _check(source: BinaryIO) -> Manifest:
    progress = _Progress("reading")
    with tempfile.TemporaryDirectory(prefix="hive-restore-") as work:
        try:
            return verify(source, Path(work), progress)
        finally:
            progress.end()


def _bring_back(source: BinaryIO, paused: bool) -> Manifest:
    state = Path(state_dir())
    lock, progress = take_lock(state), _Progress("restoring")
    try:
        return bring_back(source, state, paused=paused, tell=progress)
    finally:
        progress.end()
        os.close(lock)


def _counts(files: int, size: int) -> str:
    return f"{counted(files, 'file')}, {size / 1e6:,.1f} MB"


def _told(report: Report, file: str) -> str:
    lines = [f"backed up {_counts(report.files, report.bytes)}: agents {', '.join(report.agents) or 'none'}"]
    for names, what in ((report.changed, "changed while copied"), (report.left_out, "left out")):
        if names:
            more = [f"  … and {len(names) - TOLD} more (--json names them all)"] if len(names) > TOLD else []
            lines += [f"{what} ({len(names):,}):", *(f"  {safe(name)}" for name in names[:TOLD]), *more]
    if file == "-":
        lines.append("it was not read back: `hive restore --check FILE` does that")
    else:
        lines.append(f"{safe(file)} is whole: it was read back")
    return "\n".join(lines)
