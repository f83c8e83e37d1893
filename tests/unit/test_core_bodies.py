"""Large bodies: on disk before their message, read whole by those whom they concern, gone when nobody names them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import BODY_LIMIT_BYTES, INLINE_LIMIT_BYTES, AgentName, MessageBody
from hive_core.services.bodies import BEGINNING_BYTES, ORPHAN_KEPT_S, Bodies, is_large, piece
from hive_core.services.broker import Broker
from hive_core.store.errors import StoreBusy
from tests.hives import Services, open_services

IRIS, DAMOCLES, HM1ND, OPERATOR = map(AgentName, ("iris", "damocles", "hm1nd", "operator"))
# Two bytes for each character, and an odd beginning: the limits fall into the middle of one.
LARGE = "x" + "é" * INLINE_LIMIT_BYTES
LARGE_BYTES = len(LARGE.encode())


def files(hive: Services) -> list[Path]:
    return [path for path in (hive.state_dir / "bodies").rglob("*") if path.is_file()]


def make_old(path: Path) -> None:
    then = path.stat().st_mtime - ORPHAN_KEPT_S - 1
    os.utime(path, (then, then))


async def read_whole(hive: Services, message: int, reader: AgentName | None) -> str:
    text, offset = "", 0
    while True:
        some = await hive.broker.messages.read_body(message, offset, reader)
        assert some["bytes"] == LARGE_BYTES
        assert len(some["body"].encode()) <= 64 * 1024
        text += str(some["body"])
        if some["next_offset"] is None:
            return text
        offset = some["next_offset"]


async def test_a_large_body_is_a_file_and_its_beginning_stands_in_the_row(hive: Services) -> None:
    message = await hive.say("iris", "damocles", LARGE)
    (file,) = files(hive)
    digest = hashlib.sha256(LARGE.encode()).hexdigest()
    assert file == hive.state_dir / "bodies" / digest[:2] / digest
    assert file.read_text("utf-8") == LARGE
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    row = await hive.store.row("SELECT body, body_bytes, body_sha256 FROM messages WHERE id = ?", (message,))
    assert row is not None
    assert (row["body_bytes"], row["body_sha256"]) == (LARGE_BYTES, digest)
    assert LARGE.startswith(row["body"])
    assert BEGINNING_BYTES - 1 <= len(row["body"].encode()) <= BEGINNING_BYTES


async def test_a_body_of_the_limit_stands_whole_in_the_row_and_one_byte_more_does_not(hive: Services) -> None:
    await hive.say("iris", "damocles", "x" * INLINE_LIMIT_BYTES)
    assert files(hive) == []
    await hive.say("iris", "damocles", "x" * (INLINE_LIMIT_BYTES + 1))
    assert len(files(hive)) == 1
    assert await hive.value("SELECT length(body) FROM messages WHERE id = 1") == INLINE_LIMIT_BYTES


async def test_the_recipient_is_handed_the_beginning_and_the_size_of_the_whole(hive: Services) -> None:
    await hive.say("iris", "damocles", LARGE)
    message = (await hive.broker.lease(DAMOCLES)).message
    assert message["body_bytes"] == LARGE_BYTES
    assert LARGE.startswith(message["body"])


async def test_sender_recipient_and_operator_read_it_whole_and_nobody_else_learns_that_it_is_there(
    hive: Services,
) -> None:
    message = await hive.say("iris", "damocles", LARGE)
    await hive.broker.lease(DAMOCLES)
    for reader in (IRIS, DAMOCLES, None):
        assert await read_whole(hive, message, reader) == LARGE
    with pytest.raises(Refusal, match="you neither sent nor received it") as other:
        await hive.broker.messages.read_body(message, 0, HM1ND)
    with pytest.raises(Refusal) as none:
        await hive.broker.messages.read_body(99, 0, HM1ND)
    assert other.value.message.replace(str(message), "99") == none.value.message


async def test_a_message_that_is_held_cannot_be_read_before_it_is_handed_out(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=1)) as hive:
        await hive.add_agents("iris", "damocles")
        await hive.say("iris", "damocles", "first")
        held = await hive.say("iris", "damocles", LARGE)
        assert (await hive.states("damocles"))[held] == "held"
        with pytest.raises(Refusal, match="neither sent nor received"):
            await hive.broker.messages.read_body(held, 0, DAMOCLES)
        assert (await hive.broker.messages.read_body(held, 0, IRIS))["bytes"] == LARGE_BYTES


async def test_a_small_body_is_read_the_same_way(hive: Services) -> None:
    message = await hive.say("iris", "damocles", "héllo")
    assert await hive.broker.messages.read_body(message, 0, IRIS) == {"body": "héllo", "next_offset": None, "bytes": 6}
    assert (await hive.broker.messages.read_body(message, 3, IRIS))["body"] == "llo"
    assert (await hive.broker.messages.read_body(message, 6, IRIS))["body"] == ""


@pytest.mark.parametrize(("offset", "word"), [(7, "the body has 6"), (-1, "the body has 6"), (2, "inside a character")])
async def test_an_offset_that_is_no_good_says_so(hive: Services, offset: int, word: str) -> None:
    message = await hive.say("iris", "damocles", "héllo")
    with pytest.raises(Refusal, match=word):
        await hive.broker.messages.read_body(message, offset, IRIS)


@given(st.text(max_size=200), st.integers(4, 40))
def test_the_pieces_of_a_body_are_the_body(text: str, limit: int) -> None:
    data = text.encode("utf-8", "replace")
    got, offset = b"", 0
    while True:
        some = piece(data, offset, limit)
        got += some.body.encode()
        assert len(some.body.encode()) <= limit
        if some.next_offset is None:
            break
        assert some.next_offset > offset
        offset = some.next_offset
    assert got == data


@pytest.mark.parametrize("character", ["a", "é", "漢", "😀"])
def test_what_is_large_is_told_by_bytes(character: str) -> None:
    fits = character * (INLINE_LIMIT_BYTES // len(character.encode()))
    fits += "x" * (INLINE_LIMIT_BYTES - len(fits.encode()))
    assert (is_large(fits), is_large(fits + "x")) == (False, True)


async def test_a_refused_send_leaves_no_file(hive: Services) -> None:
    with pytest.raises(Refusal, match="no agent has that name"):
        await hive.say("iris", "nobody", LARGE)
    assert files(hive) == []


async def test_a_refused_send_leaves_the_file_of_a_message_that_says_the_same(hive: Services) -> None:
    message = await hive.say("iris", "damocles", LARGE)
    with pytest.raises(Refusal):
        await hive.say("hm1nd", "nobody", LARGE)
    assert await read_whole(hive, message, IRIS) == LARGE


async def test_many_who_send_the_same_and_some_who_are_refused_leave_one_whole_file(hive: Services) -> None:
    async def send(to: str) -> None:
        try:
            await hive.say("iris", to, LARGE)
        except Refusal:
            assert to == "nobody"

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(send, "nobody" if number % 2 else "damocles")
    assert [path.read_text("utf-8") == LARGE for path in files(hive)] == [True]
    assert await hive.value("SELECT count(*) FROM messages") == 20


async def test_the_same_call_again_leaves_no_second_file_whatever_it_says(hive: Services) -> None:
    first = await hive.say("iris", "damocles", LARGE, key="once")
    assert await hive.say("iris", "damocles", LARGE, key="once") == first
    with pytest.raises(Refusal, match="cannot use this key"):
        await hive.say("iris", "damocles", "other " + LARGE, key="once")
    assert [path.read_text("utf-8") for path in files(hive)] == [LARGE]


async def test_a_cancelled_send_is_stored_whole_or_leaves_nothing(hive: Services) -> None:
    with trio.move_on_after(0) as scope:
        await hive.say("iris", "damocles", LARGE)
    assert scope.cancelled_caught
    stored = await hive.value("SELECT count(*) FROM messages")
    assert len(files(hive)) == stored


async def test_large_bodies_count_in_their_senders_quota(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(body_quota_bytes=2 * LARGE_BYTES)) as hive:
        await hive.add_agents("iris", "damocles")
        await hive.say("iris", "damocles", LARGE)
        await hive.say("iris", "damocles", LARGE[::-1])
        with pytest.raises(Refusal, match=r"take 262,146 bytes already and the limit is 262,146 \(body_quota_bytes\)"):
            await hive.say("iris", "damocles", "y" + LARGE[1:])
        assert len(files(hive)) == 2
        await hive.say("damocles", "iris", LARGE)


async def test_a_disk_that_does_not_take_the_file_refuses_the_send(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def no_room(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("hive_core.services.bodies.os.fsync", no_room)
    with pytest.raises(Refusal, match=r"cannot keep a message of 131,073 bytes: .*space") as full:
        await hive.say("iris", "damocles", LARGE)
    assert full.value.code == "unavailable"
    assert files(hive) == []
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_everything_is_synced_before_the_row_is_written(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename, write_together = os.fsync, Path.rename, hive.store.write_together

    def note_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        done.append(f"sync {'.tmp' if '/.' in path else Path(path).relative_to(hive.state_dir)}")
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        done.append("rename")
        return rename(self, target)

    async def note_write(*args: Any) -> Any:
        done.append("row")
        return await write_together(*args)

    monkeypatch.setattr("hive_core.services.bodies.os.fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(hive.store, "write_together", note_write)
    await hive.say("iris", "damocles", LARGE)
    digest = hashlib.sha256(LARGE.encode()).hexdigest()
    assert done == ["sync .", "sync bodies", "sync .tmp", "rename", f"sync bodies/{digest[:2]}", "row"]


async def test_a_file_that_is_gone_or_changed_is_told_and_not_shown(hive: Services) -> None:
    message = await hive.say("iris", "damocles", LARGE)
    (file,) = files(hive)
    file.write_text("something else")
    with pytest.raises(Refusal, match="its file was changed"):
        await hive.broker.messages.read_body(message, 0, IRIS)
    file.unlink()
    with pytest.raises(Refusal, match="its file is gone"):
        await hive.broker.messages.read_body(message, 0, IRIS)
    os.mkfifo(file)
    with pytest.raises(Refusal, match="cannot read the whole body"):
        await hive.broker.messages.read_body(message, 0, IRIS)


async def test_the_sweep_removes_what_is_old_and_nobodys_and_nothing_else(hive: Services) -> None:
    message = await hive.say("iris", "damocles", LARGE)
    (used,) = files(hive)
    folder = used.parent
    orphan, young, half = (folder / name for name in (folder.name + "0" * 62, folder.name + "1" * 62, ".half"))
    for path in (orphan, young, half):
        path.write_text("left behind")
    for path in (used, orphan, half):
        make_old(path)
    await hive.broker.sweep_bodies()
    assert set(files(hive)) == {used, young}
    assert await read_whole(hive, message, IRIS) == LARGE


async def test_the_sweep_takes_the_files_of_messages_that_are_gone(hive: Services) -> None:
    await hive.say("iris", "damocles", LARGE)
    await hive.sql("DELETE FROM deliveries")
    await hive.sql("DELETE FROM messages")
    await hive.broker.sweep_bodies()
    assert len(files(hive)) == 1
    hive.clock.ahead_s = ORPHAN_KEPT_S + 60
    await hive.broker.sweep_bodies()
    assert files(hive) == []


class Overtaken(Bodies):
    """Lets `meanwhile` happen between the look whether a message names a file and the file's removal."""

    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def _named(self, names: list[str]) -> set[str]:
        found = await super()._named(names)
        if (meanwhile := self.meanwhile) is not None:
            self.meanwhile = None
            await meanwhile()
        return found


@pytest.fixture
def overtaken(hive: Services) -> Overtaken:
    bodies = Overtaken(hive.state_dir / "bodies", hive.store, hive.clock)
    hive.broker = Broker(hive.store, bodies=bodies)
    return bodies


async def test_a_send_that_overtakes_the_sweep_keeps_its_file(hive: Services, overtaken: Overtaken) -> None:
    await hive.say("iris", "damocles", LARGE)
    await hive.sql("DELETE FROM deliveries")
    await hive.sql("DELETE FROM messages")
    make_old(files(hive)[0])
    overtaken.meanwhile = partial(hive.say, "iris", "damocles", LARGE)
    await hive.broker.sweep_bodies()
    assert await read_whole(hive, 2, IRIS) == LARGE


async def test_a_send_that_overtakes_the_end_of_a_refused_one_keeps_its_file(
    hive: Services, overtaken: Overtaken
) -> None:
    overtaken.meanwhile = partial(hive.say, "iris", "damocles", LARGE)
    with pytest.raises(Refusal):
        await hive.say("iris", "nobody", LARGE)
    assert await read_whole(hive, 1, IRIS) == LARGE


async def test_a_refused_send_leaves_the_file_of_one_that_is_on_its_way(hive: Services, overtaken: Overtaken) -> None:
    async with overtaken.kept(MessageBody(LARGE)):
        with pytest.raises(Refusal):
            await hive.say("iris", "nobody", LARGE)
        assert len(files(hive)) == 1
    assert files(hive) == []


async def test_a_body_over_the_whole_limit_is_refused_with_the_limit(hive: Services) -> None:
    with pytest.raises(Refusal, match="524,289 bytes and the limit is 524,288"):
        await hive.say("iris", "damocles", "x" * (BODY_LIMIT_BYTES + 1))


async def test_a_store_that_takes_nothing_leaves_no_file(hive: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: object) -> None:
        raise StoreBusy("cannot write now: the disk is full")

    monkeypatch.setattr(hive.store, "write_together", busy)
    with pytest.raises(StoreBusy):
        await hive.say("iris", "damocles", LARGE)
    assert files(hive) == []
