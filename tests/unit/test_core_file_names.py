"""The names of attached files: whatever comes in, what stands in an agent's folder is one plain name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.protocol.file_names import FILE_NAME_LIMIT_BYTES, FileName, numbered, parse_file_name
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides
from hive_core.services.attachments import type_of

NAMES = st.text(st.sampled_from("ab./\\ -~é\0\n\u202e\u2028\u202f\ud800😀"), max_size=12) | st.text(max_size=140)


@given(NAMES)
def test_a_name_that_is_taken_is_one_component_of_a_path_that_anybody_can_read(raw: str) -> None:
    try:
        name = parse_file_name(raw)
    except Refusal as refusal:
        assert refusal.code == "usage"
        return
    assert 0 < len(name.encode()) <= FILE_NAME_LIMIT_BYTES
    assert name not in (".", "..")
    assert not re.search(r"[/\x00-\x1f\x7f-\x9f]", name)
    assert not hides(name)


@pytest.mark.parametrize("raw", ["", " ", ".", "..", "a/b", "/", "a\0", "a\n", "a\x1b[31m", "é" * 61, None, 7, b"a"])
def test_what_is_no_name_is_refused(raw: object) -> None:
    with pytest.raises(Refusal, match="as the name of a file"):
        parse_file_name(raw)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("notes.txt", "notes.txt"),
        (".env", ".env"),
        ("-rf", "-rf"),
        ("at 9.41\u202fAM.png", "at 9.41_AM.png"),
        ("gpj.\u202eexe", "gpj._exe"),
        ("x" * 120, "x" * 120),
    ],
)
def test_a_name_stays_as_it_is_but_for_what_nobody_sees(raw: str, name: str) -> None:
    assert parse_file_name(raw) == name


@given(st.lists(st.sampled_from(["a", "a-2", "a.png", "a-2.png", ".a", "é" * 60, "x." + "y" * 118, "." * 120])))
def test_names_that_come_twice_are_told_apart_within_the_limit(names: list[str]) -> None:
    told = numbered(FileName(name) for name in names)
    assert len(set(told)) == len(names) == len(told)
    assert all(parse_file_name(name) == name for name in told)


def test_the_second_of_a_name_has_its_number_before_its_ending() -> None:
    again = [FileName(name) for name in ("shot.png", "shot.png", ".env", ".env", "shot.png")]
    assert numbered(again) == ["shot.png", "shot-2.png", ".env", ".env-2", "shot-3.png"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "image/png"), ("a.md", "text/markdown"), ("a", "application/octet-stream"), ("a.tar.gz", None)],
)
def test_a_file_is_of_the_type_that_its_name_says(name: str, kind: str | None) -> None:
    assert type_of(name) == (kind or "application/octet-stream")
