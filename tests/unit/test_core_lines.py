from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

LIMIT = 12
TOO_LONG = "too long"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def told(items: object) -> list[bytes | str]:
    return [TOO_LONG if isinstance(item, Refusal) else item for item in items]  # type: ignore[attr-defined]


def split(data: bytes, cuts: list[int]) -> list[bytes | str]:
    """What the splitter makes of `data` when it comes in pieces."""
    splitter, found, before = LineSplitter(LIMIT), [], 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        found += told(splitter.feed(data[before:cut]))
        before = cut
    return found


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=6).map(lambda text: text.replace("\n", "").encode()) | st.binary(max_size=20)),
    st.lists(st.integers(0, 10_000), max_size=12),
)
def test_lines_are_the_same_however_they_are_cut(pieces: list[bytes], cuts: list[int]) -> None:
    data = b"".join(piece + b"\n" for piece in pieces)
    lines = data.split(b"\n")[:-1]
    assert split(data, cuts) == [line if len(line) <= LIMIT else TOO_LONG for line in lines]


def test_a_character_split_across_two_reads_comes_out_whole() -> None:
    data = '{"a":"é😀"}\n'.encode()
    for cut in range(len(data)):
        splitter = LineSplitter()
        lines = [*splitter.feed(data[:cut]), *splitter.feed(data[cut:])]
        assert decode(lines[0]) == {"a": "é😀"}  # type: ignore[arg-type]


def test_a_line_of_exactly_the_limit_passes_and_one_byte_more_is_refused_with_the_limit() -> None:
    splitter = LineSplitter(LIMIT)
    first, second, third = splitter.feed(b"a" * LIMIT + b"\n" + b"b" * (LIMIT + 1) + b"\n" + b"c\n")
    assert (first, third) == (b"a" * LIMIT, b"c")
    assert isinstance(second, Refusal)
    assert "12 bytes; send less in one line" in second.message


def test_an_over_long_line_costs_only_itself_and_is_not_kept() -> None:
    splitter = LineSplitter(LIMIT)
    for _ in range(1000):
        assert list(splitter.feed(b"x" * 1000)) == []
        assert len(splitter._rest) <= LIMIT
    assert told(splitter.feed(b"\nnext\n")) == [TOO_LONG, b"next"]


def test_half_a_line_is_no_line_and_is_known_to_be_unfinished() -> None:
    splitter = LineSplitter(LIMIT)
    assert list(splitter.feed(b'whole\n{"a":')) == [b"whole"]
    assert splitter.unfinished
    assert list(splitter.feed(b"1}\n")) == [b'{"a":1}']
    assert not splitter.unfinished


def test_an_over_long_line_is_unfinished_until_its_newline() -> None:
    splitter = LineSplitter(LIMIT)
    list(splitter.feed(b"x" * 100))
    assert splitter.unfinished
    list(splitter.feed(b"\n"))
    assert not splitter.unfinished


def test_a_line_that_ends_without_its_newline_is_refused_once_with_its_size_and_the_way_out() -> None:
    for data in (b'{"a":', b"x" * 100):  # also one of which nothing is kept, because it is too long
        splitter = LineSplitter(LIMIT)
        list(splitter.feed(b"whole\n" + data))
        refusal = splitter.end()
        assert isinstance(refusal, Refusal)
        assert refusal.code == "usage"
        assert f"its newline is missing after {len(data):,} bytes" in refusal.message
        assert "end each line with a newline" in refusal.message
        assert splitter.end() is None


def test_the_end_after_a_whole_line_is_no_error() -> None:
    splitter = LineSplitter(LIMIT)
    assert splitter.end() is None
    list(splitter.feed(b"whole\n"))
    assert splitter.end() is None


@settings(deadline=None)
@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_what_is_encoded_is_one_line_that_decodes_to_the_same(obj: dict[str, object]) -> None:
    line = encode(obj)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    same = json.loads(json.dumps(obj).encode("utf-8", "replace"))
    surrogates = any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(obj, ensure_ascii=False))
    assert surrogates or decode(line[:-1]) == same


def test_half_a_surrogate_pair_does_not_keep_an_answer_from_being_sent() -> None:
    assert decode(encode({"a": "\ud83d"})) == {"a": "?"}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"a":"\xff"}', "byte 6 is not UTF-8"),
        ('{"a":"\ud800"}'.encode("utf-8", "surrogatepass"), "not UTF-8"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        ('{"a":1}'.encode("utf-16-le"), "not JSON"),
        ('{"a":1}'.encode("utf-32-le"), "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a':1}", "not JSON"),
        (b'{"a":NaN}', "not JSON"),
        (b'{"a":-Infinity}', "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "a number in it has more than 4,300 digits; give a shorter one"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b"[]", "holds a list"),
        (b"7", "holds a int"),
        (b"null", "holds a NoneType"),
        (b'"text"', "holds a str"),
    ],
)
def test_a_line_that_is_no_object_is_refused_with_its_cause(line: bytes, cause: str) -> None:
    with pytest.raises(Refusal) as caught:
        decode(line)
    assert caught.value.code == "usage"
    assert cause in caught.value.message
    assert "; " in caught.value.message or "is needed" in caught.value.message  # a way out
    assert "sys." not in caught.value.message
    assert len(caught.value.message) < 300


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_an_object_or_a_refusal(line: bytes) -> None:
    try:
        assert isinstance(decode(line), dict)
    except Refusal as refusal:
        assert refusal.code == "usage"
