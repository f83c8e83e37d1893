"""The process is killed at a system call that writes: the next one finds all that was answered, and ends the rest."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

from hive_core.protocol.refusal import Refusal
from tests.proof import small_hive
from tests.proof.promises import broken_promises

LONG = os.environ.get("HIVE_LONG") == "1"
CALLS = ("pwrite64", "write", "fdatasync", "fsync", "ftruncate", "unlink", "rename")
STEP = 1 if LONG else 7  # of the calls of a kind that are many, every so many are tried


def strace(folder: Path, plan: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a plan in a process that is looked at where it writes to its own files."""
    hive = folder / "hive"
    # Not the index of the log beside it: another thread than the writer's fills it, and each counts its own calls.
    files = [hive / "hive.sqlite", hive / "hive.sqlite-wal", hive, folder / "answers"]
    only = [word for path in files for word in ("-P", str(path))]
    command = [sys.executable, "-m", "tests.proof.small_hive", plan, str(hive), str(folder / "answers")]
    log = ("-o", str(folder / "strace.log"))
    # Without --seccomp-bpf: with it strace 6.1 injects into the first call alone.
    return subprocess.run(["strace", "-f", "-qq", *only, *options, *log, *command], capture_output=True, text=True)


def prepare(folder: Path) -> Path:
    """A hive of agents that have no mail yet."""
    (folder / "hive").mkdir(parents=True)
    trio.run(small_hive.run, "nothing", folder / "hive", folder / "answers")
    return folder


def count_calls(folder: Path, plan: str) -> dict[str, int]:
    """How many calls of each kind a plan makes in the thread that makes most of them."""
    done = strace(folder, plan, "-e", f"trace={','.join(CALLS)}")
    assert done.returncode == 0, done.stderr
    counts = Counter(
        (line.split()[0], line.split(maxsplit=1)[1].split("(")[0])
        for line in (folder / "strace.log").read_text().splitlines()
    )
    return {call: max((count for (_, name), count in counts.items() if name == call), default=0) for call in CALLS}


def crash(folder: Path, plan: str, call: str, number: int) -> bool:
    """Kill the process as it makes this call, before anything of the call is done. Whether it came that far."""
    done = strace(folder, plan, "-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={number}")
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr
    return done.returncode != 0


def look_at(folder: Path) -> list[str]:
    """What is broken after the crash, and when another process has then done what was not answered."""
    if broken := [f"after the crash: {sentence}" for sentence in _promises(folder)]:
        return broken
    try:
        trio.run(small_hive.run, "one_message", folder / "hive", folder / "answers")
    except (small_hive.Stuck, Refusal) as exc:
        return [f"the next process: {exc}", *_promises(folder)]
    broken = [f"at the end: {sentence}" for sentence in _promises(folder)]
    with sqlite3.connect(folder / "hive" / "hive.sqlite") as db:
        rows = [tuple(row) for row in db.execute("SELECT message_id, recipient, state, attempts FROM deliveries")]
    db.close()
    return broken if rows == [(1, "bob", "acked", 1)] else [*broken, f"at the end there are {rows}"]


def _promises(folder: Path) -> list[str]:
    # sqlite's own recovery comes first, as it does when the daemon opens the database.
    db = sqlite3.connect(folder / "hive" / "hive.sqlite")
    try:
        return broken_promises(db, small_hive.as_told((folder / "answers").read_text().splitlines()))
    finally:
        db.close()


def crash_everywhere(tmp_path: Path, before: Path, plan: str) -> str:
    """Crash a plan at each of its calls, on a copy of `before` each. A line that says what was done."""
    counts = count_calls(Path(shutil.copytree(before, tmp_path / "counted")), plan)
    points = [
        (call, number)
        for call, count in counts.items()
        for number in range(1, count + 1, STEP if count > 3 * STEP else 1)
    ]

    def run(point: tuple[str, int]) -> bool:
        return crash(Path(shutil.copytree(before, tmp_path / f"{point[0]}-{point[1]}")), plan, *point)

    with ThreadPoolExecutor(2) as pool:
        hit = list(pool.map(run, points))
    broken = [
        f"{call} number {number}: {sentence}"
        for call, number in points
        for sentence in look_at(tmp_path / f"{call}-{number}")
    ]
    assert broken == [], "\n".join(broken[:20])
    # A run may save a call of a kind now and then; were it more than that, the points would not be what they say.
    assert sum(hit) >= len(points) * 0.8, (hit, points)
    return f"{sum(hit)} kills at {len(points)} of {sum(counts.values())} calls"


def test_a_kill_at_any_call_of_send_lease_and_ack_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepare(tmp_path / "before")
    said = crash_everywhere(tmp_path, before, "one_message")
    with capsys.disabled():
        print(f"\n  crash in send, lease, ack: {said}")


def test_a_kill_while_the_next_process_recovers_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepare(tmp_path / "before")
    # Killed when the ack is on disk and its answer is not out: all of it is in the log, nothing in the database.
    assert crash(before, "one_message", "write", 3)
    assert (before / "hive" / "hive.sqlite-wal").stat().st_size > 0
    said = crash_everywhere(tmp_path, before, "nothing")
    with capsys.disabled():
        print(f"\n  crash in recovery: {said}")
