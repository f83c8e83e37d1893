"""Files through the operator's door: `hive send --file`, and descriptors that somebody sends by hand."""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hive_core.protocol.file_names import FILES_MOST
from hive_core.protocol.words import AgentName
from hive_core.services.question_words import parse_ask
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, Services, run_hive, serve

IRIS = AgentName("iris")


@pytest.fixture
async def door(hive: Services, tmp_path: Path) -> AsyncIterator[Path]:
    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve) as path:
        yield path


def times_open(path: Path) -> int:
    """How many descriptors of this process are of this file."""
    links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link) == str(path) for link in links)


async def ask(door: Path, args: dict[str, Any], *descriptors: int) -> Any:
    """The answer to `send` with these arguments, and descriptors beside it."""
    stream = await trio.open_unix_socket(os.fspath(door))
    async with stream:
        line = json.dumps({"v": 1, "verb": "send", "args": {"to": "iris", "body": "look", **args}}).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        await stream.socket.sendmsg([line], rights)
        answer = b""
        with trio.fail_after(PATIENCE_S):
            while not answer.endswith(b"\n"):
                answer += await stream.receive_some()
    return json.loads(answer)


async def test_hive_send_gives_files_to_an_agent_and_hive_read_names_them(
    hive: Services, door: Path, tmp_path: Path
) -> None:
    notes, other = tmp_path / "notes.txt", tmp_path / "other"
    notes.write_text("remember")
    other.mkdir()
    (other / "notes.txt").write_text("and this")
    (hive.state_dir / "agents/iris/state").mkdir(parents=True)
    files = ("--file", str(notes), "--file", str(other / "notes.txt"))
    done = await run_hive(tmp_path, "send", "iris", "look", *files)
    assert done.stdout == b"sent as message 1 with notes.txt, notes-2.txt\n", done.stderr
    await hive.broker.lease(IRIS)
    inbox = hive.state_dir / "agents/iris/state/inbox/1"
    assert {path.name: path.read_text() for path in inbox.iterdir()} == {
        "notes.txt": "remember",
        "notes-2.txt": "and this",
    }
    read = await run_hive(tmp_path, "read", "1")
    assert (read.stdout, read.stderr.splitlines()[0]) == (b"look\n", b"with it: notes.txt (text/plain, 8 bytes)")
    assert [file["name"] for file in json.loads((await run_hive(tmp_path, "read", "1", "--json")).stdout)["files"]] == [
        "notes.txt",
        "notes-2.txt",
    ]
    assert b"with it: notes-2.txt (text/plain, 8 bytes)" in (await run_hive(tmp_path, "thread", "1")).stdout
    assert b'with "notes.txt" (8 bytes)' in (await run_hive(tmp_path, "explain", "1")).stdout


async def test_hive_answer_gives_files_with_an_answer(hive: Services, door: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.png").write_text("a plan")
    (hive.state_dir / "agents/iris/state").mkdir(parents=True)
    for text, options in (("which?", None), ("yes?", ["yes", "no"])):
        await hive.questions.ask(IRIS, parse_ask("operator", text, options))
    done = await run_hive(tmp_path, "answer", "1", "--file", str(tmp_path / "plan.png"))
    assert done.stdout.startswith(b"question 1 is answered, with message "), done.stderr
    assert done.stdout.endswith(b" with plan.png\n")
    refused = await run_hive(tmp_path, "answer", "2", "--file", str(tmp_path / "plan.png"))
    assert b"cannot answer question 2 with nothing: give one of its options" in refused.stderr
    done = await run_hive(tmp_path, "answer", "2", "--choice", "yes", "--file", str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr
    for said in ("| 1 file attached", 'chosen: "yes"'):
        lease = await hive.broker.lease(IRIS)
        assert lease.message is not None
        assert lease.message["body"].splitlines()[1] == said
        assert (hive.state_dir / f"agents/iris/state/inbox/{lease.message['id']}/plan.png").read_text() == "a plan"
        await hive.broker.ack(IRIS, lease.turn, "done")


async def test_a_file_alone_is_a_message(hive: Services, door: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    done = await run_hive(tmp_path, "send", "iris", "--file", str(tmp_path / "a"), "--json")
    assert json.loads(done.stdout) == {"message": 1, "files": ["a"]}
    assert await hive.value("SELECT body FROM messages") == "1 file attached"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "none: there is no such file or directory"),
        ("folder", "folder: it is not a file; give a file, or an archive of a folder"),
        ("pipe", "pipe: it is not a file"),
    ],
)
async def test_what_is_no_file_is_refused_with_its_path_and_nothing_is_sent(
    hive: Services, door: Path, tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    done = await run_hive(tmp_path, "send", "iris", "look", "--file", str(tmp_path / name))
    assert done.returncode == 2
    assert words in done.stderr.decode()
    assert await hive.states() == {}


@pytest.mark.parametrize("count", [FILES_MOST + 1, 300])
async def test_more_files_than_a_request_takes_are_refused_before_any_is_opened(
    hive: Services, door: Path, tmp_path: Path, count: int
) -> None:
    done = await run_hive(tmp_path, "send", "iris", "look", *(("--file", str(tmp_path / "a")) * count))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().strip() == (
        f"hive: cannot send {count} files: a request takes 100; send fewer, or one archive"
    )


@pytest.mark.parametrize(
    ("files", "descriptors", "words"),
    [
        ([{"name": "a"}], 0, "cannot take 1 files: 0 descriptors came"),
        ([], 1, "cannot take 0 files: 1 descriptors came"),
        ([{"name": "a"}], 2, "cannot take 1 files: 2 descriptors came"),
        ([{"name": "a/b"}], 1, "give its name without the folder"),
        ([{"name": "a", "path": "/etc/shadow"}], 1, "`files` must be a list"),
        ("a", 1, "`files` must be a list"),
        ([{"name": "a"}] * 101, 1, "cannot attach 101 files: a request takes 100; send fewer, or one archive"),
        ([{"name": "a"}], FILES_MOST + 20, f"{FILES_MOST} descriptors came"),
    ],
)
async def test_names_and_descriptors_that_do_not_fit_are_refused_and_none_stays_open(
    hive: Services, door: Path, tmp_path: Path, files: object, descriptors: int, words: str
) -> None:
    with (tmp_path / "a").open("w+b") as file:
        answer = await ask(door, {"files": files}, *[file.fileno()] * descriptors)
        assert words in answer["error"]["message"]
        assert times_open(tmp_path / "a") == 1
    assert await hive.states() == {}


@pytest.mark.parametrize("path", ["/", "/dev/zero"])
async def test_a_descriptor_of_something_else_is_not_read(hive: Services, door: Path, path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        answer = await ask(door, {"files": [{"name": "a"}]}, descriptor)
    finally:
        os.close(descriptor)
    assert "cannot attach a: it is not a file" in answer["error"]["message"]


async def test_a_file_is_read_from_its_beginning_wherever_its_sender_stands_in_it(
    hive: Services, door: Path, tmp_path: Path
) -> None:
    with (tmp_path / "a").open("w+b") as file:
        file.write(b"whole")
        file.flush()
        assert (await ask(door, {"files": [{"name": "a"}]}, file.fileno()))["ok"]
    assert (await hive.broker.messages.files(1))[0]["bytes"] == 5


async def test_what_comes_in_pieces_is_bounded_together(hive: Services, door: Path, tmp_path: Path) -> None:
    with (tmp_path / "a").open("w+b") as file:
        stream = await trio.open_unix_socket(os.fspath(door))
        async with stream:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * 60))]
            for piece in (b'{"v": 1, "verb": ', b'"send"', b', "args": {"to": "iris", "body": "x", "files": []}}'):
                await stream.socket.sendmsg([piece], rights)
                await trio.testing.wait_all_tasks_blocked()
            assert times_open(tmp_path / "a") == 1 + FILES_MOST
            await stream.send_all(b"\n")
            assert b"cannot take 0 files" in await stream.receive_some()
            assert times_open(tmp_path / "a") == 1


async def test_descriptors_of_a_client_that_hangs_up_are_closed(hive: Services, door: Path, tmp_path: Path) -> None:
    with (tmp_path / "a").open("w+b") as file:
        stream = await trio.open_unix_socket(os.fspath(door))
        async with stream:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * 3))]
            await stream.socket.sendmsg([b"{"], rights)
        # Connections are taken in their order: when this one is answered, the other was seen to its end.
        await ask(door, {})
        await trio.testing.wait_all_tasks_blocked()
    assert times_open(tmp_path / "a") == 0
