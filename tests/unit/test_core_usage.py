"""What is read of a provider's answer: its model, its tokens by kind, and how many they may be when it was cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.usage import UsageReader

EVENTS = [
    b"event: message_start\n"
    b'data: {"type":"message_start","message":{"model":"claude-x-1","usage":{"input_tokens":25,"output_tokens":1,'
    b'"cache_creation_input_tokens":30,"cache_creation":{"ephemeral_5m_input_tokens":10,'
    b'"ephemeral_1h_input_tokens":20},"service_tier":"standard"}}}\n\n',
    'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"é😀 \\"usage\\""}}\n\n'.encode(),
    b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":15}}\n\n',
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
]
TAKEN = {
    "input_tokens": 25,
    "cache_creation_input_tokens": 30,
    "cache_creation.ephemeral_5m_input_tokens": 10,
    "cache_creation.ephemeral_1h_input_tokens": 20,
}


def test_a_stream_tells_its_model_and_its_counts_by_kind() -> None:
    reader = UsageReader()
    reader.feed(b"".join(EVENTS))
    assert reader.end() == {**TAKEN, "output_tokens": 15}
    assert reader.model == "claude-x-1"


def test_a_whole_answer_tells_its_model_and_its_counts() -> None:
    reader = UsageReader()
    reader.feed(json.dumps({"model": "m", "content": [], "usage": {"input_tokens": 3, "output_tokens": 4}}).encode())
    assert (reader.end(), reader.model) == ({"input_tokens": 3, "output_tokens": 4}, "m")


def test_the_first_count_of_a_stream_that_is_cut_is_not_taken_for_its_last() -> None:
    reader = UsageReader()
    reader.feed(EVENTS[0])
    assert reader.usage == {**TAKEN, "estimated_output_tokens": 1}
    text = json.dumps({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "word " * 300}})
    reader.feed(f"event: content_block_delta\ndata: {text}\n\n".encode())
    assert 300 <= reader.end()["estimated_output_tokens"] <= 600


def test_fast_mode_is_a_model_of_its_own() -> None:
    reader = UsageReader()
    start = {"type": "message_start", "message": {"model": "claude-opus-4-6", "usage": {"input_tokens": 3}}}
    reader.feed(b"data: " + json.dumps(start).encode() + b"\n")
    assert reader.model == "claude-opus-4-6"
    for _ in range(2):
        reader.feed(b'data: {"type":"message_delta","usage":{"output_tokens":15,"speed":"fast"}}\n')
        assert reader.model == "claude-opus-4-6-fast"


def test_a_name_of_a_model_is_kept_within_bounds() -> None:
    reader = UsageReader()
    reader.feed(json.dumps({"model": "m" * 5000, "usage": {"input_tokens": 3}}).encode())
    reader.end()
    assert reader.model == "m" * 100


@settings(deadline=None)
@given(st.lists(st.integers(0, 900)), st.sampled_from([b"\n", b"\r\n"]))
def test_usage_is_read_the_same_however_the_stream_is_cut(cuts: list[int], newline: bytes) -> None:
    data, reader, before = b"".join(EVENTS).replace(b"\n", newline), UsageReader(), 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        reader.feed(data[before:cut])
        before = cut
    assert reader.end() == {**TAKEN, "output_tokens": 15}


@settings(deadline=None)
@given(
    st.lists(
        st.binary(max_size=50) | st.sampled_from([b'data: {"usage":', b'"usage"', b"\n", b"[]}", b'{"usage":7}\n'])
    )
)
def test_no_answer_can_break_the_reader(pieces: list[bytes]) -> None:
    reader = UsageReader()
    for piece in pieces:
        reader.feed(piece)
    assert all(isinstance(value, int) for value in reader.end().values())


@pytest.mark.parametrize(
    "line",
    [
        b'data: {"usage": {"a": true, "b": "x", "c": 1.5, "d": null, "e": {"f": "1"}, "g": -1}}',
        b'data: {"usage": [1]}',
        b'data: {"usage": null}',
        b'data: {"message": {"usage": 3}}',
        b'data: ["usage"]',
        b'data: {"usage"',
        b'{"usage":' + b"[" * 100_000,
        b'{"usage":{"a":' + b"9" * 5000 + b"}}",
        b'{"usage":{"a":' + b"9" * 4000 + b"}}",
    ],
)
def test_what_is_no_count_is_no_usage(line: bytes) -> None:
    reader = UsageReader()
    reader.feed(line + b"\n")
    assert reader.end() == {}


def test_a_line_without_an_end_is_kept_within_bounds() -> None:
    reader = UsageReader()
    for _ in range(100):
        reader.feed(b"x" * 100_000)
    assert len(reader._rest) <= 512 * 1024
