"""Files that come with a message: on disk before it, in the agent's folder with its turn, gone with it."""

from __future__ import annotations

import hashlib
import io
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_agent.wake import parse_wake, wake_prompt
from hive_core.limits import Limits
from hive_core.protocol.file_names import FileName
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, OPERATOR, AgentName, parse_body
from hive_core.services.attachments import Upload, body_with
from hive_core.services.flow import newest_messages
from hive_core.services.leases import Lease
from hive_core.services.life import life_of
from hive_core.sockets import forms, told
from tests.hives import PATIENCE_S, Services, open_services
from tests.small_disks import small_disk, small_disks
from tests.unit.test_core_bodies import make_old
from tests.unit.test_core_retention import age, forget

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


def upload(name: str, data: bytes) -> Upload:
    return Upload(FileName(name), io.BytesIO(data))


async def send(hive: Services, *files: Upload, to: str = "iris", **more: Any) -> dict[str, Any]:
    state_of(hive).mkdir(parents=True, exist_ok=True)
    return await hive.broker.send(OPERATOR, AgentName(to), parse_body("look"), files=files, **more)


def state_of(hive: Services, agent: str = "iris") -> Path:
    return hive.state_dir / "agents" / agent / "state"


def kept(hive: Services) -> list[Path]:
    return [path for path in (hive.state_dir / "bodies").rglob("*") if path.is_file()]


async def lease(hive: Services, agent: AgentName = IRIS, fence: str | None = None) -> Lease:
    with trio.fail_after(PATIENCE_S):
        return await hive.broker.lease(agent, fence)


# -- sending ----------------------------------------------------------------------------------------------------------


async def test_when_send_has_answered_its_files_are_on_disk_by_their_digests(hive: Services) -> None:
    sent = await send(hive, upload("shot.png", PNG), upload("notes.txt", b""))
    assert sent == {"message": 1, "files": ["shot.png", "notes.txt"]}
    assert {path.name for path in kept(hive)} == {hashlib.sha256(data).hexdigest() for data in (PNG, b"")}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept(hive))
    (row,) = await newest_messages(hive.store, None, 9)
    assert [(file["name"], file["type"], file["bytes"]) for file in row["files"]] == [
        ("shot.png", "image/png", len(PNG)),
        ("notes.txt", "text/plain", 0),
    ]
    assert [file["name"] for file in await hive.broker.messages.files(1)] == ["shot.png", "notes.txt"]
    assert 'with "shot.png" (108 bytes), "notes.txt" (0 bytes)' in (await life_of(hive.store, 1))["sent"]["text"]


async def test_a_file_to_several_is_kept_once_and_each_of_them_finds_it(hive: Services) -> None:
    for agent in ("iris", "damocles", "hm1nd"):
        state_of(hive, agent).mkdir(parents=True)
    await send(hive, upload("a.txt", b"same"), upload("b.txt", b"same"), to=EVERYONE)
    assert len(kept(hive)) == 1
    for agent in (IRIS, DAMOCLES):
        await lease(hive, agent)
        found = state_of(hive, agent) / "inbox" / "1"
        assert {path.name: path.read_bytes() for path in found.iterdir()} == {"a.txt": b"same", "b.txt": b"same"}


async def test_two_files_of_one_name_are_told_apart(hive: Services) -> None:
    assert (await send(hive, upload("a.txt", b"1"), upload("a.txt", b"2")))["files"] == ["a.txt", "a-2.txt"]
    await lease(hive)
    assert (state_of(hive) / "inbox/1/a-2.txt").read_bytes() == b"2"


@pytest.mark.parametrize(
    ("files", "limits", "words"),
    [
        ([b""] * 3, {"files_per_message": 2}, r"cannot attach 3 files: the limit is 2 a message \(files_per_message\)"),
        ([b"12345"], {"file_bytes": 4}, r"cannot attach 0: it has 5 bytes or more and the limit is 4 \(file_bytes\)"),
        ([b"123", b"45"], {"message_files_bytes": 4}, r"cannot attach 1: .* the limit is 4 \(message_files_bytes\)"),
        ([b"12345"], {"files_quota_bytes": 7}, r"take 3 bytes already and the limit is 7 \(files_quota_bytes\)"),
    ],
)
async def test_what_is_over_a_limit_is_refused_and_nothing_of_it_is_left(
    tmp_path: Path, files: list[bytes], limits: dict[str, int], words: str
) -> None:
    async with open_services(tmp_path, limits=Limits.model_validate(limits)) as hive:
        await hive.add_agents("iris")
        await send(hive, upload("first", b"abc"))
        before = kept(hive)
        with pytest.raises(Refusal, match=words):
            await send(hive, *(upload(str(number), data) for number, data in enumerate(files)))
        assert kept(hive) == before
        assert await hive.states() == {1: "queued"}


async def test_files_that_are_kept_already_take_nothing_of_the_quota(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(files_quota_bytes=4)) as hive:
        await hive.add_agents("iris")
        await send(hive, upload("a", b"1234"))
        assert (await send(hive, upload("b", b"1234")))["message"] == 2


async def test_a_file_of_a_message_that_is_refused_is_not_kept(hive: Services) -> None:
    with pytest.raises(Refusal, match="no agent has that name"):
        await send(hive, upload("a", b"1"), to="nobody")
    assert kept(hive) == []


async def test_the_same_key_with_other_files_is_another_message(hive: Services) -> None:
    first = await send(hive, upload("a", b"1"), key="k")
    assert (await send(hive, upload("a", b"1"), key="k"))["message"] == first["message"]
    for other in ([upload("a", b"2")], [upload("b", b"1")], []):
        with pytest.raises(Refusal, match="cannot use this key"):
            await send(hive, *other, key="k")


async def test_a_file_that_cannot_be_read_is_refused_by_its_name(hive: Services, tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file, pytest.raises(Refusal, match="cannot attach a: it cannot be read"):
        await send(hive, Upload(FileName("a"), file))
    assert kept(hive) == []


def test_a_body_may_be_left_out_where_files_come() -> None:
    assert [body_with(raw, 2) for raw in (None, " \n", "hi")] == ["2 files attached", "2 files attached", "hi"]
    with pytest.raises(Refusal, match="it is empty"):
        body_with(" ", 0)


# -- handing them out -------------------------------------------------------------------------------------------------


async def test_a_turn_finds_the_files_of_its_message_and_its_prompt_says_where(hive: Services) -> None:
    await send(hive, upload("shot.png", PNG))
    leased = await lease(hive)
    file = state_of(hive) / "inbox/1/shot.png"
    assert file.read_bytes() == PNG
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["shot.png"]
    prompt = wake_prompt(leased.message, 0)
    assert '\nfile: "/state/inbox/1/shot.png" (image/png, 108 bytes)\n' in prompt
    wake = parse_wake(prompt)
    assert wake is not None
    assert wake.body == "look"


async def test_what_is_taken_within_a_turn_has_its_files_too(hive: Services) -> None:
    await hive.say("operator", "iris", "begin")
    await send(hive, upload("a.txt", b"more"))
    await lease(hive)
    result = await hive.broker.recv(IRIS, 9, 0, key="k")
    assert result["messages"][0]["files"] == [
        {"name": "a.txt", "type": "text/plain", "bytes": 4, "path": "/state/inbox/2/a.txt"}
    ]
    assert 'file: "/state/inbox/2/a.txt" (text/plain, 4 bytes)' in told.received(result)
    forms.RecvResult.model_validate(result)
    (state_of(hive) / "inbox/2/a.txt").unlink()
    assert await hive.broker.recv(IRIS, 9, 0, key="k") == result
    assert (state_of(hive) / "inbox/2/a.txt").read_bytes() == b"more"


async def test_the_turn_that_begins_with_an_ack_finds_its_files(hive: Services) -> None:
    await hive.say("operator", "iris", "begin")
    await send(hive, upload("a.txt", b"next"))
    first = await lease(hive)
    acked = await hive.broker.ack(IRIS, first.turn, "done", next_fence="f2")
    assert acked.lease is not None
    assert acked.lease.message["files"][0]["path"] == "/state/inbox/2/a.txt"
    assert (state_of(hive) / "inbox/2/a.txt").read_bytes() == b"next"


async def test_a_message_that_comes_again_has_its_files_as_they_were_sent(hive: Services) -> None:
    await send(hive, upload("a.txt", b"as sent"))
    first = await lease(hive)
    (state_of(hive) / "inbox/1/a.txt").write_bytes(b"spoiled")
    await hive.broker.ack(IRIS, first.turn, "failed", error="it broke")
    await hive.let_time_pass()
    assert (await lease(hive)).message["attempt"] == 2
    assert (state_of(hive) / "inbox/1/a.txt").read_bytes() == b"as sent"


async def test_a_held_message_keeps_its_files_until_it_is_released(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.add_agents("iris")
        await send(hive, upload("a.txt", b"1"))
        await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate'")
        assert not (state_of(hive) / "inbox").exists()
        await hive.broker.messages.release(1, OPERATOR)
        await lease(hive)
        assert (state_of(hive) / "inbox/1/a.txt").read_bytes() == b"1"


@pytest.mark.parametrize("planted", ["inbox", "inbox/1", "inbox/1/a.txt", "inbox/1/a.txt/x"])
async def test_no_link_or_folder_that_an_agent_planted_leads_out_or_keeps_the_message(
    hive: Services, tmp_path: Path, planted: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("the host's")
    await send(hive, upload("a.txt", b"sent"), upload("b.txt", b"too"))
    place = state_of(hive) / planted
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(outside / "a.txt" if planted.endswith("a.txt") else outside)
    files = (await lease(hive)).message["files"]
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("a.txt", "the host's")]
    if planted == "inbox/1/a.txt":  # the link is replaced, not followed
        assert (state_of(hive) / planted).read_bytes() == b"sent"
        assert all("path" in file for file in files)
    else:
        assert ["missing" in file for file in files] == [True, planted != "inbox/1/a.txt/x"]
        assert await hive.states() == {1: "leased"}


async def test_a_file_that_is_missing_is_told_to_the_agent_and_to_the_operator(hive: Services) -> None:
    await send(hive, upload("a.txt", b"sent"))
    (state_of(hive) / "inbox").write_text("in the way")
    leased = await lease(hive)
    why = "/state/inbox/1: a file stands where a directory is needed; move it away"
    assert f'\nfile: "a.txt" (text/plain, 4 bytes) is missing: "{why}"\n' in wake_prompt(leased.message, 0)
    assert (await life_of(hive.store, 1))["deliveries"][0]["missing"] == {"a.txt": why}


@pytest.mark.parametrize("harm", ["gone", "changed"])
async def test_a_kept_file_that_the_disk_lost_is_missing_and_not_another(hive: Services, harm: str) -> None:
    await send(hive, upload("a.txt", b"sent"))
    (file,) = kept(hive)
    file.unlink() if harm == "gone" else file.write_bytes(b"else")
    (told_of,) = (await lease(hive)).message["files"]
    assert "the hive's own copy" in told_of["missing"]
    assert list((state_of(hive) / "inbox/1").iterdir()) == []


@small_disks
async def test_on_a_full_disk_the_message_comes_and_says_what_is_missing(hive: Services) -> None:
    state_of(hive).parent.mkdir(parents=True)
    with small_disk(state_of(hive), "1m"):
        await send(hive, upload("small", b"fits"), upload("large", bytes(2 * 1024 * 1024)))
        small, large = (await lease(hive)).message["files"]
        assert small["path"] == "/state/inbox/1/small"
        assert large["missing"] == "no space is left; make room"
        assert [path.name for path in (state_of(hive) / "inbox/1").iterdir()] == ["small"]


# -- forgetting -------------------------------------------------------------------------------------------------------


async def test_files_go_with_their_message_from_the_host_and_from_the_agent(hive: Services) -> None:
    await send(hive, upload("old.txt", b"old"), upload("both.txt", b"both"))
    await hive.broker.ack(IRIS, (await lease(hive)).turn, "done")
    await age(hive, 31)
    await send(hive, upload("new.txt", b"new"), upload("both.txt", b"both"))
    await hive.broker.ack(IRIS, (await lease(hive)).turn, "done")
    inbox = state_of(hive) / "inbox"
    for name in ("notes", "0", "99", "01"):  # the agent's own
        (inbox / name).mkdir()
    for path in kept(hive):
        make_old(path)
    assert await forget(hive) == 1
    await hive.broker.sweep_bodies()
    assert {path.read_bytes() for path in kept(hive)} == {b"new", b"both"}
    assert {path.name for path in inbox.iterdir()} == {"2", "notes", "0", "99", "01"}
    assert await hive.value("SELECT count(*) FROM attachments") == 2


async def test_forgetting_follows_no_link(hive: Services, tmp_path: Path) -> None:
    await send(hive, upload("a.txt", b"1"))
    await hive.broker.ack(IRIS, (await lease(hive)).turn, "done")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.txt").write_text("the host's")
    folder = state_of(hive) / "inbox/1"
    shutil.rmtree(folder)
    folder.symlink_to(outside)
    await age(hive, 31)
    assert await forget(hive) == 1
    await hive.broker.sweep_bodies()
    assert not folder.is_symlink()
    assert (outside / "a.txt").read_text() == "the host's"
