"""The lines of a turn: numbered, whole, and bounded while the host is away."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hive_agent import spill
from hive_agent.turn_lines import GATHER_S, TurnLines
from hive_core.protocol.harness import LINES_PER_REQUEST, REQUEST_LIMIT_BYTES, STREAM_LINE_LIMIT_BYTES
from hive_core.protocol.lines import encode


def drained(lines: TurnLines) -> list[tuple[int, list[str]]]:
    async def drain() -> list[tuple[int, list[str]]]:
        batches = []
        while batch := await lines.take():
            batches.append(batch)
        return batches

    return trio.run(drain, clock=trio.testing.MockClock(autojump_threshold=0))


def filled(texts: Iterable[str], kept_bytes: int = 1 << 20) -> TurnLines:
    lines = TurnLines(memory_bytes=kept_bytes)
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


async def test_lines_that_come_together_go_in_one_request(autojump_clock: trio.testing.MockClock) -> None:
    lines = TurnLines()
    for number in range(3):
        lines.add(str(number))
        await trio.sleep(GATHER_S / 4)

    async def take() -> tuple[float, int]:
        batch = await lines.take()
        assert batch is not None
        return trio.current_time(), len(batch[1])

    begun = trio.current_time()
    assert await take() == (begun + GATHER_S, 3)  # a moment behind the last of them, and no later
    for number in range(LINES_PER_REQUEST + 1):
        lines.add(str(number))
    full = trio.current_time()
    assert await take() == (full, LINES_PER_REQUEST)
    lines.close()
    assert await take() == (full, 1)


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
        lines = TurnLines(memory_bytes=100)
        for n in range(20):
            lines.add(f"line {n} with some length")
        while (batch := await lines.take()) and batch[0] + len(batch[1]) < 20:
            pass
        lines.add("the next")
        assert await lines.take() == (20, ["the next"])

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


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


# -- what does not fit into memory ------------------------------------------------------------------------------------


def open_files_in(folder: Path) -> list[int]:
    """Descriptors of this process for files that were made in `folder`, also those that have no name."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith(f"{folder}/"):
                found.append(int(link.name))
        except OSError:
            continue
    return found


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=80))
def test_lines_over_the_bound_of_memory_are_on_disk_until_they_are_taken(steps: list[tuple[int, bool]]) -> None:
    async def main(folder: str) -> None:
        lines = TurnLines(folder, memory_bytes=200, disk_bytes=1 << 20)
        texts, taken = [], []
        for n, (size, takes) in enumerate(steps):
            texts.append(f"{n}:\n\u2028é" + "x" * size)
            lines.add(texts[-1])
            if takes and (batch := await lines.take()):
                assert batch[0] == len(taken)
                taken += batch[1]
        lines.close()
        while batch := await lines.take():
            assert batch[0] == len(taken)
            taken += batch[1]
        assert taken == texts
        assert open_files_in(Path(folder)) == []

    with tempfile.TemporaryDirectory() as folder:
        trio.run(main, folder, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_the_file_has_no_name_and_nobody_else_may_open_it(tmp_path: Path) -> None:
    lines = TurnLines(str(tmp_path), memory_bytes=100)
    for n in range(50):
        lines.add(f"line {n} with some length")
    (descriptor,) = open_files_in(tmp_path)
    assert os.fstat(descriptor).st_mode & 0o777 == 0o600
    assert os.fstat(descriptor).st_nlink == 0
    assert list(tmp_path.iterdir()) == []


def test_where_no_file_can_be_made_without_a_name_it_loses_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # what older systems read into it: EISDIR for a write
    descriptor = spill.open_nameless(str(tmp_path))
    assert (os.fstat(descriptor).st_nlink, list(tmp_path.iterdir())) == (0, [])
    os.close(descriptor)


@pytest.mark.parametrize("disk_bytes", [400, 1 << 20], ids=["the bound is reached", "the disk takes nothing"])
async def test_what_the_disk_does_not_take_stays_in_memory_within_its_bound(tmp_path: Path, disk_bytes: int) -> None:
    folder = tmp_path if disk_bytes == 400 else tmp_path / "nowhere"
    lines = TurnLines(str(folder), memory_bytes=400, disk_bytes=disk_bytes)
    texts = [f"line {n} with some length" for n in range(100)]
    for text in texts:
        lines.add(text)
    lines.close()
    numbered = {}
    while batch := await lines.take():
        numbered |= dict(enumerate(batch[1], batch[0]))
    told = {n: json.loads(text)["count"] for n, text in numbered.items() if text.startswith("{")}
    (dropped,) = told.values()
    assert dropped == 100 - (len(numbered) - 1)
    assert all(texts[n] == text for n, text in numbered.items() if n not in told)
    assert {0, 99} <= numbered.keys()
    assert open_files_in(tmp_path) == []


async def test_a_file_that_was_cut_is_counted_and_what_comes_after_it_is_told(tmp_path: Path) -> None:
    lines = TurnLines(str(tmp_path), memory_bytes=100)
    for n in range(50):
        lines.add(f"line {n} with some length")
    (descriptor,) = open_files_in(tmp_path)
    os.ftruncate(descriptor, 10)
    first, batch = await lines.take() or (0, [])
    kept = len(batch)
    told = await lines.take()
    assert told is not None
    assert (first, told[0], json.loads(told[1][0])["count"]) == (0, 49, 50 - kept)
    lines.add("the next")
    assert await lines.take() == (50, ["the next"])
