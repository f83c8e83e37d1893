"""What is read while the last of it is still passed on goes on as one."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from hive_core.sockets.pieces import HELD_BYTES, Pieces


async def test_pieces_that_come_together_go_on_as_one_and_then_nothing() -> None:
    pieces = Pieces()
    await pieces.add(b"one ")
    await pieces.add(b"two")
    assert await pieces.take() == b"one two"
    await pieces.add(b"three")
    pieces.close()
    assert [await pieces.take(), await pieces.take()] == [b"three", b""]


async def test_a_piece_that_is_waited_for_goes_on_at_once() -> None:
    pieces, taken = Pieces(), []

    async def take() -> None:
        while piece := await pieces.take():
            taken.append(piece)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        for piece in (b"one", b"two"):
            await wait_all_tasks_blocked()
            await pieces.add(piece)
        pieces.close()
    assert taken == [b"one", b"two"]


async def test_a_reader_waits_while_too_much_is_held() -> None:
    pieces, added = Pieces(), []

    async def add() -> None:
        for size in (HELD_BYTES, 1, 1):
            await pieces.add(b"x" * size)
            added.append(size)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        await wait_all_tasks_blocked()
        assert added == [HELD_BYTES]
        assert len(await pieces.take()) == HELD_BYTES + 1
        await wait_all_tasks_blocked()
        assert added == [HELD_BYTES, 1, 1]
