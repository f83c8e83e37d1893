"""The directory that an agent's program takes for its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hive_core.program_config import make_program_config


def make(extras: Path) -> dict[str, str]:
    make_program_config(extras, "kept", "passing")
    return {name: os.readlink(extras / "config" / name) for name in ("projects", "plugins/data", "session-env")}


def test_it_is_made_once_and_stays(tmp_path: Path) -> None:
    links = {"projects": "kept/projects", "plugins/data": "kept/plugins/data", "session-env": "passing/session-env"}
    assert make(tmp_path) == links
    former = (tmp_path / "config" / ".config.json").read_text()
    assert json.loads(former)["userID"]
    assert make(tmp_path) == links
    assert (tmp_path / "config" / ".config.json").read_text() == former
    assert os.listdir(tmp_path) == ["config"]


@pytest.mark.parametrize("text", ["", "\0" * 300, '{"userID": '])
def test_what_a_power_cut_left_of_it_is_made_anew(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "config" / ".config.json").write_text(text)
    (tmp_path / ".config.new.left").mkdir()
    make(tmp_path)
    assert json.loads((tmp_path / "config" / ".config.json").read_text())["userID"]
    assert os.listdir(tmp_path) == ["config"]


def test_another_layout_a_file_or_a_link_in_its_place_is_replaced(tmp_path: Path) -> None:
    for number, spoil in enumerate(
        (
            lambda config: (config / "projects").unlink(),
            lambda config: (config.rename(tmp_path / ".config.new.x"), config.write_text("")),
            lambda config: (config.rename(tmp_path / ".config.new.x"), config.symlink_to("nowhere")),
        )
    ):
        make(tmp_path)
        spoil(tmp_path / "config")
        make(tmp_path)
        assert os.listdir(tmp_path) == ["config"], number
