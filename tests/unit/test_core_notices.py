from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.protocol.visible import hides, named
from hive_core.services.notices import KINDS, TEXT_LIMIT, TEXTS, notice
from tests.needs import ROOT
from tests.notices import read_notice, table

SOURCES = [*(ROOT / "hive_core").rglob("*.py")]
ANYTHING = st.text(max_size=200) | st.sampled_from(["x\nagent: evil", '"', "\\", "\u2028a: b", "\r\x85\x0bkind: c"])


def test_the_page_of_messages_has_each_kind_of_notice_with_its_fields() -> None:
    assert table() in (ROOT / "docs/messages.md").read_text("utf-8")


def test_every_kind_is_sent_from_somewhere_and_nothing_is_sent_that_is_none() -> None:
    text = "\n".join(path.read_text("utf-8") for path in SOURCES if path.name != "notices.py")
    sent = set(re.findall(r'notice\(\s*"(\w+)"', text)) | set(re.findall(r'_tell_asker\(tx, [^,]+, "(\w+)"', text))
    assert sent == set(KINDS)


@given(st.sampled_from(sorted(KINDS)), ANYTHING, st.data())
def test_whatever_others_wrote_a_notice_has_a_line_a_field_and_a_program_reads_it_back(
    kind: str, sentence: str, data: st.DataObject
) -> None:
    fields = KINDS[kind].fields
    given: dict[str, Any] = {name: data.draw(ANYTHING | st.integers(0), label=name) for name in fields}
    body = notice(kind, sentence, **given)
    assert not hides(body)
    assert len(body.splitlines()) == len(body.split("\n")) == 1 + sum(value != "" for value in given.values())
    read_kind, _, read = read_notice(body)
    assert read_kind == kind
    for name, value in given.items():
        if value != "":
            assert read[name] == (named(value) if isinstance(value, str) else value)


def test_a_field_of_which_nothing_is_known_is_left_out_and_names_stand_beside_each_other() -> None:
    assert notice("spawned", "iris was created", agent="iris", approval=7) == (
        "spawned: iris was created\nagent: iris\napproval: 7"
    )
    assert notice("needs_update", "2 agents", agents=["a", "b"]) == "needs_update: 2 agents\nagents: a, b"
    assert notice("container_crash", "it\n  ended", agent="a", last_words="") == "container_crash: it ended\nagent: a"


def test_a_number_in_words_of_others_is_a_text() -> None:
    assert read_notice(notice("container_crash", "x", agent="iris", last_words="12"))[2]["last_words"] == "12"


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_a_text_of_any_length_is_cut(name: str) -> None:
    kind = next(kind for kind, its in KINDS.items() if name in its.fields)
    (value,) = read_notice(notice(kind, "x", **{name: "y" * 100_000}))[2].values()
    assert len(value) == TEXT_LIMIT
    assert value.endswith("…")
