"""The file that takes up the last space of a disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from hive_core.store.ballast import Ballast

NEVER_ENOUGH = 2**62


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hive.ballast"


def test_it_takes_its_space_and_gives_it_back_and_takes_it_again(path: Path) -> None:
    ballast = Ballast(path, 5000, 0)
    assert (path.stat().st_size, path.stat().st_blocks * 512 >= 5000, ballast.short) == (5000, True, False)
    assert ballast.free()
    assert (path.exists(), ballast.short) == (False, True)
    assert not ballast.free()  # there is no more to give
    ballast.check()
    assert (path.stat().st_size, ballast.short) == (5000, False)


def test_without_room_besides_it_is_not_made_and_an_old_one_is_given_up(path: Path) -> None:
    assert Ballast(path, 5000, NEVER_ENOUGH).short
    assert not path.exists()
    Ballast(path, 5000, 0)
    assert Ballast(path, 5000, NEVER_ENOUGH).short
    assert not path.exists()


def test_one_of_another_size_is_made_anew_and_a_folder_in_its_place_is_no_error(path: Path) -> None:
    path.write_bytes(b"old")
    assert not Ballast(path, 5000, 0).short
    assert path.stat().st_size == 5000
    path.unlink()
    path.mkdir()
    assert Ballast(path, 5000, 0).short


def test_what_it_would_write_through_a_link_is_left_alone(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"theirs")
    path.symlink_to(tmp_path / "other")
    Ballast(path, 5000, 0)
    assert (tmp_path / "other").read_bytes() == b"theirs"
