"""Directories that agents filled: removed and measured without following what they planted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hive_core.trees import measure_tree, open_folder, remove_tree

DEEP = 1_200  # far more than there are descriptors, or characters in a path


def folder_of(path: Path) -> int:
    return open_folder(path)


def make_deep(top: Path) -> None:
    """Directories in one another, further down than a path can say."""
    here = folder_of(top)
    for _ in range(DEEP):
        os.mkdir("d" * 20, dir_fd=here)
        inner = open_folder("d" * 20, here)
        os.close(here)
        here = inner
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A tree with all that an agent could put there, and outside of it what must stay."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x" * 100_000)
    tree = tmp_path / "room" / "tree"
    (tree / "some" / "more").mkdir(parents=True)
    (tree / "some" / "notes").write_text("x" * 50_000)
    (tree / "some" / "link").symlink_to(outside)
    (tree / "some" / "more" / "file-link").symlink_to(outside / "precious")
    os.link(outside / "precious", tree / "some" / "hard")
    os.mkfifo(tree / "pipe")
    (tree / "..dots").mkdir()
    (tree / "bad\nname").write_text("")
    closed = tree / "closed"
    (closed / "in").mkdir(parents=True)
    (closed / "in" / "file").write_text("")
    (closed / "in").chmod(0)
    closed.chmod(0)
    return tree


def test_a_tree_is_removed_whatever_was_planted_in_it_and_nothing_outside(planted: Path) -> None:
    room = folder_of(planted.parent)
    remove_tree("tree", room)
    os.close(room)
    assert os.listdir(planted.parent) == []
    assert (planted.parents[1] / "outside" / "precious").stat().st_size == 100_000


def test_a_link_in_the_place_of_a_tree_is_removed_itself(planted: Path) -> None:
    (planted.parent / "link").symlink_to(planted)
    room = folder_of(planted.parent)
    remove_tree("link", room)
    os.close(room)
    assert os.listdir(planted.parent) == ["tree"]
    assert (planted / "some" / "notes").exists()


def test_a_tree_that_is_deeper_than_any_path_is_removed(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    make_deep(tmp_path / "tree")
    room = folder_of(tmp_path)
    remove_tree("tree", room)
    os.close(room)
    assert os.listdir(tmp_path) == []


def test_the_size_of_a_tree_is_what_it_takes_of_a_disk_and_links_are_not_followed(planted: Path) -> None:
    (planted / "closed").chmod(0o700)
    (planted / "sparse").touch()
    os.truncate(planted / "sparse", 10**12)
    room = folder_of(planted.parent)
    size, whole = measure_tree("tree", room, time.monotonic() + 60)
    os.close(room)
    assert whole
    assert 150_000 <= size < 300_000, "the hard link and the notes, and some directories"


def test_measuring_ends_in_time_and_in_a_tree_that_is_deeper_than_there_are_descriptors(
    tmp_path: Path, planted: Path
) -> None:
    room = folder_of(planted.parent)
    assert measure_tree("tree", room, time.monotonic() - 1)[1] is False
    (planted / "deep").mkdir()
    make_deep(planted / "deep")
    size, whole = measure_tree("tree", room, time.monotonic() + 60)
    remove_tree("tree", room)
    os.close(room)
    assert (size > 0, whole) == (True, False)
