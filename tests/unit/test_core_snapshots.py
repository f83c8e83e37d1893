"""Snapshots of an agent's /state: what they hold, what they share, how they come back, and what is hostile in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_core import tree_copies
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.snapshots import DAY_MS, Snapshot, Snapshots, spare
from hive_core.tree_copies import DEPTH_MOST, WORDS_BYTES_MOST
from hive_core.trees import remove_tree
from tests.small_disks import small_disk, small_disks

IRIS = AgentName("iris")
NOW_MS = 1_800_000_000_000
MIB = 2**20


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """The /state of an agent; removed again, however deep it is."""
    folder = tmp_path / "agents" / "iris" / "state"
    folder.mkdir(parents=True)
    yield folder
    top = os.open(tmp_path, os.O_RDONLY)
    remove_tree("agents", top)
    os.close(top)


@pytest.fixture
def kept(tmp_path: Path) -> Snapshots:
    return Snapshots(tmp_path, IRIS, 12, 64 * MIB)


def copy_of(state: Path, one: Snapshot | None) -> Path:
    assert one is not None
    return state.parent / "snapshots" / one.id / "state"


def digest_of(tree: Path) -> str:
    """Of every name, mode, time, link and byte."""
    whole = hashlib.sha256()
    for folder, below, files in sorted(os.walk(os.fsencode(tree))):
        for entry in sorted((*below, *files)):
            path = os.path.join(folder, entry)
            found = os.lstat(path)
            whole.update(os.path.relpath(path, os.fsencode(tree)) + f" {found.st_mode}".encode())
            if stat.S_ISREG(found.st_mode):
                with open(path, "rb") as file:
                    whole.update(f" {found.st_mtime_ns}".encode() + hashlib.sha256(file.read()).digest())
            elif stat.S_ISLNK(found.st_mode):
                whole.update(os.readlink(path))
    return whole.hexdigest()


def test_a_snapshot_holds_what_was_there_and_unchanged_files_are_shared_between_snapshots_alone(
    state: Path, kept: Snapshots
) -> None:
    (state / "notes").mkdir()
    (state / "notes" / "same").write_text("same")
    (state / "notes" / "other").write_text("one")
    first = copy_of(state, kept.take("test", NOW_MS))
    (state / "notes" / "other").write_text("two")
    second = copy_of(state, kept.take("test", NOW_MS + 1000))
    assert [(place / "notes" / "other").read_text() for place in (first, second)] == ["one", "two"]
    assert (first / "notes" / "same").stat().st_ino == (second / "notes" / "same").stat().st_ino
    assert {(state / "notes" / name).stat().st_nlink for name in ("same", "other")} == {1}
    (state / "notes" / "same").write_text("written in its place")
    assert (first / "notes" / "same").read_text() == "same"


def test_nothing_is_taken_when_nothing_changed(state: Path, kept: Snapshots) -> None:
    (state / "note").write_text("one")
    assert kept.take("test", NOW_MS) is not None
    assert kept.take("test", NOW_MS + 1000) is None
    (state / "note").chmod(0o640)
    assert kept.take("test", NOW_MS + 2000) is not None
    assert len(kept.all()) == 2


def test_a_time_that_an_agent_sets_back_hides_no_change(state: Path, kept: Snapshots) -> None:
    (state / "note").write_text("one")
    before = (state / "note").stat()
    kept.take("test", NOW_MS)
    (state / "note").write_text("two")
    os.utime(state / "note", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (copy_of(state, kept.take("test", NOW_MS + 1000)) / "note").read_text() == "two"


def test_what_an_agent_plants_is_neither_followed_nor_opened(tmp_path: Path, state: Path, kept: Snapshots) -> None:
    secret = tmp_path / "secret"
    secret.write_text("canary")
    (state / "link").symlink_to(secret)
    (state / "folder").symlink_to(tmp_path)
    os.mkfifo(state / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(state / "socket"))
    with (state / "hollow").open("wb") as hollow:
        hollow.truncate(2**42)
        hollow.seek(2**41)
        hollow.write(b"in the middle")
    Path(os.fsdecode(os.fsencode(state) + b"/\xff\n\x1b[31m")).write_text("a name")
    taken = kept.take("test", NOW_MS)
    copy = copy_of(state, taken)
    assert taken is not None
    assert (taken.left_out, taken.changed) == (2, 0)
    assert os.readlink(copy / "link") == str(secret)
    assert os.readlink(copy / "folder") == str(tmp_path)
    assert not (copy / "fifo").exists()
    assert (copy / "hollow").stat().st_size == 2**42
    assert (copy / "hollow").stat().st_blocks * 512 < MIB
    with (copy / "hollow").open("rb") as again:
        again.seek(2**41)
        assert again.read(13) == b"in the middle"
    assert Path(os.fsdecode(os.fsencode(copy) + b"/\xff\n\x1b[31m")).read_text() == "a name"


def test_a_tree_that_is_too_deep_is_cut_and_comes_back_as_far(state: Path, kept: Snapshots) -> None:
    folder = os.open(state, os.O_RDONLY)
    for _ in range(20 * DEPTH_MOST):
        os.mkdir("deep", dir_fd=folder)
        below = os.open("deep", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    taken = kept.take("test", NOW_MS)
    assert taken is not None
    assert (taken.files, taken.left_out) == (DEPTH_MOST + 1, 1)
    assert kept.take("test", NOW_MS + 1000) is None
    (state / "note").write_text("another")
    kept.restore(taken, NOW_MS + 2000)
    assert os.listdir(state) == ["deep"]


def test_one_that_is_too_large_is_refused_with_its_limit_and_those_before_stay(tmp_path: Path, state: Path) -> None:
    small = Snapshots(tmp_path, IRIS, 12, MIB)
    (state / "note").write_text("one")
    small.take("test", NOW_MS)
    (state / "large").write_bytes(os.urandom(2 * MIB))
    with pytest.raises(Refusal, match=r"it takes more than 1\.0 MiB \(snapshots_bytes\)"):
        small.take("test", NOW_MS + 1000)
    assert len(small.all()) == 1
    assert len(list((state.parent / "snapshots").iterdir())) == 1, "nothing half done is left"


@small_disks
def test_a_disk_that_is_full_costs_what_is_being_made_and_nothing_else(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        state = disk / "agents" / "iris" / "state"
        state.mkdir(parents=True)
        (state / "note").write_text("good")
        kept = Snapshots(disk, IRIS, 12, 64 * MIB)
        good = kept.take("test", NOW_MS)
        (state / "large").write_bytes(os.urandom(5 * MIB))
        with pytest.raises(OSError, match="No space left"):
            kept.take("test", NOW_MS + 1000)
        assert [path.name for path in (state.parent / "snapshots").iterdir()] == [one.id for one in kept.all()]
        assert kept.all() == [good]
        (state / "large").rename(state.parent / "filler")
        large = state / "large"
        large.write_bytes(os.urandom(MIB))
        second = kept.take("test", NOW_MS + 2000)
        large.unlink()
        with (disk / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
            while True:
                rest.write(b"x" * 4096)
        assert second is not None
        before = digest_of(state)
        with pytest.raises(OSError, match="No space left"):
            kept.restore(second, NOW_MS + 3000)
        assert digest_of(state) == before
        assert sorted(path.name for path in state.parent.iterdir()) == ["filler", "snapshots", "state"]
        assert kept.all() == [second, good]


def test_what_snapshots_take_together_is_bounded_and_the_oldest_go(tmp_path: Path, state: Path) -> None:
    small = Snapshots(tmp_path, IRIS, 12, 4 * MIB)
    for number in range(6):
        (state / "large").write_bytes(os.urandom(MIB))
        small.take("test", NOW_MS + number * 1000)
    assert [one.at_ms - NOW_MS for one in small.all()] == [5000, 4000, 3000]
    assert small.bytes() <= 4 * MIB


def test_of_the_older_half_one_a_day_is_kept() -> None:
    def at(ms: int, size: int = 1) -> Snapshot:
        return Snapshot(str(ms), ms, "test", 1, size, 0, 0)

    hour = DAY_MS // 24
    listed = [at(NOW_MS - number * hour) for number in range(24 * 20)]
    gone = set(spare(listed, 12, 10))
    left = [(NOW_MS - one.at_ms) / hour for one in listed if one.id not in gone]
    assert left == [0, 1, 2, 3, 4, 5, 29, 53, 77, 101, 125, 149]
    large = [at(5, 99), at(4, 99), at(3), at(2, 99)]
    assert spare(large, 12, 10) == ["4", "2"], "one that is too large is kept while it is the newest"
    assert spare(listed[:3], 1, 10) == [listed[1].id, listed[2].id]


def test_a_restore_brings_back_names_modes_times_links_and_bytes_and_keeps_what_was_there(
    state: Path, kept: Snapshots
) -> None:
    (state / "notes").mkdir(mode=0o750)
    (state / "notes" / "tool").write_text("#!/bin/sh\n")
    (state / "notes" / "tool").chmod(0o755)
    (state / "notes" / "secret").write_text("s")
    (state / "notes" / "secret").chmod(0o400)
    (state / "link").symlink_to("notes/tool")
    os.utime(state / "notes" / "secret", ns=(1, 1_000_000_007))
    before = digest_of(state)
    taken = kept.take("test", NOW_MS)
    assert taken is not None
    (state / "notes" / "tool").unlink()
    (state / "unsaved").write_text("unsaved")
    os.mkfifo(state / "fifo")
    lost = digest_of(state)
    there = kept.restore(kept.last_other(), NOW_MS + 1000)
    assert digest_of(state) == before
    assert (state / "notes" / "tool").stat().st_nlink == 1, "it would write into its snapshot"
    assert [one.id for one in kept.all()] == [there.id, taken.id]
    assert digest_of(copy_of(state, there)) == lost, "whole, whatever it is"
    kept.restore(there, NOW_MS + 2000)
    assert (state / "unsaved").read_text() == "unsaved"
    assert len(kept.all()) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run as root")
def test_a_daemon_that_is_not_root_restores_a_state_that_was_closed_to_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "agents" / "iris" / "state"
        state.mkdir(parents=True)
        (state / "note").write_text("good")
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chown(path, 65534, 65534)
        pid = os.fork()
        if pid == 0:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            with contextlib.suppress(BaseException):
                kept = Snapshots(Path(folder), IRIS, 12, MIB)
                good = kept.take("test", NOW_MS)
                assert good is not None
                (state / "note").chmod(0)
                state.chmod(0)
                kept.restore(good, NOW_MS + 1000)
                assert (state / "note").read_text() == "good"
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_without_a_name_the_newest_that_differs_from_what_is_there_is_restored(state: Path, kept: Snapshots) -> None:
    (state / "note").write_text("whole")
    whole = kept.take("test", NOW_MS)
    (state / "note").unlink()
    kept.take("its loss was taken, too", NOW_MS + 1000)
    assert kept.last_other() == whole
    kept.restore(kept.last_other(), NOW_MS + 2000)
    assert (state / "note").read_text() == "whole"


def test_a_snapshot_is_found_by_the_beginning_of_its_name(state: Path, kept: Snapshots) -> None:
    with pytest.raises(Refusal, match="it has no snapshot"):
        kept.last_other()
    (state / "note").write_text("one")
    first = kept.take("test", NOW_MS)
    (state / "note").write_text("two")
    second = kept.take("test", NOW_MS)
    assert first is not None
    assert second is not None
    assert (first.id, second.id) == ("2027-01-15T08:00:00Z", "2027-01-15T08:00:01Z")
    assert kept.find("2027-01-15T08:00:01") == second
    with pytest.raises(Refusal, match="cannot tell which is meant"):
        kept.find("2027")
    for raw in ("2026", "../../iris", "", None, 7):
        with pytest.raises(Refusal, match="no snapshot has that name"):
            kept.find(raw)


CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.link", "os.symlink", "os.truncate", "open"}


def die_at(number: int, act: object) -> bool:
    """Do something in a process that dies when it would change the disk for the n-th time; whether it came so far."""
    pid = os.fork()
    if pid == 0:
        left = number

        def watch(event: str, _: object) -> None:
            nonlocal left
            if event in CHANGES:
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(watch)
        act()  # type: ignore[operator]
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_a_daemon_that_dies_at_any_step_leaves_whole_snapshots_alone(state: Path, kept: Snapshots) -> None:
    (state / "notes").mkdir()
    (state / "notes" / "same").write_text("same")
    whole = kept.take("test", NOW_MS)
    (state / "notes" / "other").write_text("other")
    now = digest_of(state)
    number = 0
    while die_at(number, lambda: kept.take("test", NOW_MS + 1000)):
        assert digest_of(state) == now
        for one in kept.all():
            assert one == whole or names_in(state, one) == {"notes", "notes/same", "notes/other"}
        number += 1
    assert number > 5
    kept.settle()
    assert len(list((state.parent / "snapshots").iterdir())) == 2


def names_in(state: Path, one: Snapshot) -> set[str]:
    copy = copy_of(state, one)
    return {str(path.relative_to(copy)) for path in copy.rglob("*")}


def test_a_daemon_that_dies_at_any_step_of_a_restore_leaves_the_one_or_the_other_state_whole(
    tmp_path: Path, state: Path, kept: Snapshots
) -> None:
    (state / "note").write_text("good")
    good = kept.take("test", NOW_MS)
    assert good is not None
    (state / "note").write_text("bad")
    (state / "more").write_text("unsaved")
    number, seen = 0, set()
    while die_at(number, lambda: kept.restore(good, NOW_MS + 1000)):
        kept.settle()  # as the next daemon does
        found = {path.name: path.read_text() for path in state.iterdir()}
        assert found in ({"note": "good"}, {"note": "bad", "more": "unsaved"})
        assert sorted(path.name for path in state.parent.iterdir()) == ["snapshots", "state"]
        if len(found) == 1:  # it was restored, and what was there is kept
            newest = kept.all()[0]
            assert (copy_of(state, newest) / "more").read_text() == "unsaved"
            kept.restore(newest, NOW_MS + 2000)
            seen.add("restored")
        else:
            seen.add("as before")
        number += 1
    assert seen == {"restored", "as before"}


def test_what_is_written_down_of_a_snapshot_is_bounded_too(state: Path, kept: Snapshots) -> None:
    for number in range(WORDS_BYTES_MOST // 4000 + 1):
        (state / f"{number}").symlink_to("x" * 4000)
    with pytest.raises(Refusal, match=r"the names and links in it take more than 16\.0 MiB"):
        kept.take("test", NOW_MS)
    assert kept.all() == []


def test_of_full_directories_in_full_directories_no_more_is_listed_than_may_be_copied(
    state: Path, kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_copies, "FILES_MOST", 100)
    folder, listed = state, list[int]()
    for _ in range(5):
        for number in range(90):
            (folder / f"{number}").touch()
        folder = folder / "below"
        folder.mkdir()
    names = tree_copies._names

    def count(*given: Any) -> list[str]:
        found = names(*given)
        listed.append(len(found))
        return found

    monkeypatch.setattr(tree_copies, "_names", count)
    with pytest.raises(Refusal, match="it holds more than 100 files"):
        kept.take("test", NOW_MS)
    assert sum(listed) <= 101


def test_what_was_there_at_a_restore_and_is_too_much_to_be_listed_is_never_restored_as_nothing(
    tmp_path: Path, state: Path, kept: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_copies, "FILES_MOST", 10)
    (state / "note").write_text("good")
    good = kept.take("test", NOW_MS)
    assert good is not None
    for number in range(20):
        (state / f"{number}").write_text("work")
    large = kept.restore(good, NOW_MS + 1000)
    there = tmp_path / "agents/iris/snapshots" / large.id / "state"
    assert len(list(there.iterdir())) == 21
    with pytest.raises(Refusal, match=f"it has too many files to be listed; they are in {there}"):
        kept.restore(large, NOW_MS + 2000)
    assert [path.name for path in state.iterdir()] == ["note"]
    (state / "note").write_text("another")
    assert kept.last_other() == good


@pytest.mark.parametrize(
    "damaged",
    [
        *("[]", '"x"', "7", "{", "", '{"a": 1}', '{"a": []}', '{"a": ["f"]}', '{"a": ["d", 1, []]}', '{"a": ["q", 1]}'),
        *('{"../a": ["l", "x"]}', '{"a": ["l", 7]}', '{"a": [["f"], 1]}', "[" * 100_000),
    ],
)
def test_a_damaged_snapshot_is_refused_in_a_sentence_and_the_others_stay_of_use(
    state: Path, kept: Snapshots, damaged: str
) -> None:
    (state / "note").write_text("first")
    first = kept.take("a turn", NOW_MS)
    (state / "note").write_text("second")
    second = kept.take("a turn", NOW_MS + 1000)
    assert first is not None
    assert second is not None
    (copy_of(state, second).parent / "entries.json").write_text(damaged)
    with pytest.raises(Refusal, match=f"cannot use the snapshot {second.id}: its entries.json is damaged") as refused:
        kept.restore(second, NOW_MS + 2000)
    assert "choose another, or take what you need from its `state`" in refused.value.message
    assert (state / "note").read_text() == "second"
    assert kept.last_other() == first
    kept.restore(first, NOW_MS + 3000)
    assert (state / "note").read_text() == "first"
    (state / "note").write_text("third")
    assert kept.take("a turn", NOW_MS + 4000) is not None


def test_where_nothing_can_be_brought_back_there_is_a_way_out(state: Path, kept: Snapshots) -> None:
    with pytest.raises(Refusal, match="it has no snapshot yet; one is taken at the edge of its next turn"):
        kept.last_other()
    kept.take("a turn", NOW_MS)
    with pytest.raises(Refusal, match="are what it has now; `hive snapshots iris` lists them: name the one you mean"):
        kept.last_other()
