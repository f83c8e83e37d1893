"""The lines of a turn: numbered, whole, and bounded while the host is away."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hive_agent.turn_lines import TurnLines
from hive_core.protocol.harness import LINES_PER_REQUEST, REQUEST_LIMIT_BYTES, STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import encode


def drained(lines: TurnLines) -> list[tuple[int, list[str]]]:
    async def drain() -> list[tuple[int, list[str]]]:
        batches = []
        while batch := await lines.take():
            batches.append(batch)
        return batches

    return trio.run(drain)


def filled(texts: Iterable[str], kept_bytes: int = 1 << 20) -> TurnLines:
    lines = TurnLines(kept_bytes)
    for text in texts:
        lines.add(text)
    lines.close()
    return lines


@given(st.lists(st.text(max_size=30), max_size=300))
def test_all_lines_come_out_in_order_and_numbered(texts: list[str]) -> None:
    batches = drained(filled(texts))
    assert [text for _, batch in batches for text in batch] == texts
    assert all(len(batch) <= LINES_PER_REQUEST for _, batch in batches)
    assert [first for first, _ in batches] == list(range(0, len(texts), LINES_PER_REQUEST))


def test_a_long_turn_goes_in_several_requests() -> None:
    assert [len(batch) for _, batch in drained(filled(["x"] * 150))] == [64, 64, 22]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80))
def test_a_full_buffer_drops_its_middle_and_says_how_much(sizes: list[int]) -> None:
    texts = [f"{n}:" + "x" * size for n, size in enumerate(sizes)]
    numbered = {first + n: text for first, batch in drained(filled(texts, 400)) for n, text in enumerate(batch)}
    told = {n: json.loads(text)["count"] for n, text in numbered.items() if text.startswith("{")}
    kept = {n: text for n, text in numbered.items() if n not in told}
    assert all(texts[n] == text for n, text in kept.items())
    assert len(kept) + sum(told.values()) == len(texts)
    assert max(numbered) == len(texts) - 1
    assert 0 in numbered
    assert sum(len(encode(text)) for text in kept.values()) <= 400


def test_lines_that_come_after_a_drop_keep_their_numbers() -> None:
    async def main() -> None:
        lines = TurnLines(100)
        for n in range(20):
            lines.add(f"line {n} with some length")
        while (batch := await lines.take()) and batch[0] + len(batch[1]) < 20:
            pass
        lines.add("the next")
        assert await lines.take() == (20, ["the next"])

    trio.run(main)


def test_a_batch_fits_into_one_request() -> None:
    worst = '"' * STREAM_LINE_LIMIT_BYTES
    for first, batch in drained(filled([worst] * 100, 1 << 30)):
        assert len(encode({"id": 2**40, "op": "lines", "turn": 2**62, "first": first, "lines": batch})) <= (
            REQUEST_LIMIT_BYTES
        )


async def test_take_waits_for_a_line(autojump_clock: trio.testing.MockClock) -> None:
    lines = TurnLines()
    with trio.move_on_after(5) as waited:
        await lines.take()
    assert waited.cancelled_caught
    lines.add("now")
    assert await lines.take() == (0, ["now"])


async def test_take_ends_when_the_lines_are_closed() -> None:
    lines = TurnLines()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def take() -> None:
            with pytest.raises(AssertionError):
                assert await lines.take()

        await trio.testing.wait_all_tasks_blocked()
        lines.close()
