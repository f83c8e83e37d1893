"""git that a client holds up, or that is cut: it holds up nobody else, and leaves nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from hive_core.git.mirrors import NOTHING, MirrorLimits
from hive_core.procedures import pushes
from hive_core.procedures.git_processes import SEATS, Pipes, Seats
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.store.bus import EVENTS
from tests.git.test_pushes import begin, refs
from tests.project_hives import IRIS, SITE, ProjectHive, commit, git, make_source, open_project_hive

BEGINNING = 3_000_000  # bytes: when a socket has taken them, git holds objects back
in_thread = trio.to_thread.run_sync


def ask(path: Path, service: str) -> socket.socket:
    """A client of its own that was told yes, and has read git's first words of a push."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(path))
    client.sendall(f'{{"service": "git-{service}", "project": "site"}}\n'.encode())
    with client.makefile("rb", buffering=0) as said:
        assert said.readline() == b'{"ok":true}\n'
        while service == "receive-pack" and (size := int(said.read(4) or b"0", 16)):
            said.read(size - 4)
    return client


def make_pack(clone: Path) -> bytes:
    """The beginning of a push, with a pack of more than a socket holds."""
    (clone / "noise").write_bytes(os.urandom(4_000_000))
    new = commit(clone)
    git(clone, "-c", "alias.x=!echo HEAD | git pack-objects -q --revs --stdout >.git/pushed", "x")
    line = f"{NOTHING} {new} refs/heads/iris/noise\0report-status\n".encode()
    return b"%04x%b0000" % (len(line) + 4, line) + (clone / ".git" / "pushed").read_bytes()


def held_back(hive: ProjectHive) -> list[Path]:
    return list((hive.mirrors.path(SITE) / "objects").glob("*incoming-*"))


def read_to_end(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):
        while client.recv(65536):
            pass


@pytest.mark.parametrize("how", ["paused", "taken off the list"])
async def test_what_is_under_way_is_cut_when_the_agent_may_not_any_more_and_nothing_stays(
    tmp_path: Path, how: str
) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        pack = await in_thread(make_pack, clone)
        with contextlib.ExitStack() as held:
            fetches = held.enter_context(await in_thread(ask, hive.sockets[IRIS], "upload-pack"))
            pushes_ = held.enter_context(await in_thread(ask, hive.sockets[IRIS], "receive-pack"))
            await in_thread(pushes_.sendall, pack[:BEGINNING])
            assert held_back(hive)
            if how == "paused":
                await hive.services.agents.want(IRIS, "paused", "operator")
            else:
                await hive.list_projects()
            for client in (fetches, pushes_):
                await in_thread(read_to_end, client)
        assert not held_back(hive)
        await hive.services.agents.want(IRIS, "up", "operator")
        await hive.list_projects({"name": "site"})
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/noise")
        assert not held_back(hive)


async def test_a_push_that_takes_too_long_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path, push_s=10) as hive:
        pack = await in_thread(make_pack, await begin(hive, source))
        with await in_thread(ask, hive.sockets[IRIS], "receive-pack") as client:
            with contextlib.suppress(BrokenPipeError):  # on a machine that is slow, it is over before
                await in_thread(client.sendall, pack[:BEGINNING])
            await in_thread(read_to_end, client)
        assert not held_back(hive)


async def test_a_fetch_that_is_given_up_leaves_a_push_that_is_under_way_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        pack = await in_thread(make_pack, await begin(hive, source))
        with await in_thread(ask, hive.sockets[IRIS], "receive-pack") as client:
            await in_thread(client.sendall, pack[:BEGINNING])
            monkeypatch.setattr(hive.mirrors, "_limits", MirrorLimits(2**30, fetch_s=0))
            with pytest.raises(Refusal, match="git took longer than 0 s"):
                await hive.mirrors.fetch(SITE)
            monkeypatch.undo()
            assert held_back(hive)
            await in_thread(client.sendall, pack[BEGINNING:])
            await in_thread(read_to_end, client)
        assert "refs/hive/iris/iris/noise" in refs(source)


async def test_a_git_that_does_not_come_to_its_end_keeps_nobody_else_from_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "MOVE_S", 0.5)
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/a")
        held = hive.mirrors.path(SITE).parent / ".hooks" / "reference-transaction"
        os.mkfifo(tmp_path / "never")
        held.write_text(f"#!/bin/sh\n[ $1 != prepared ] || read -r x <{tmp_path}/never\n")
        held.chmod(0o700)
        pushed = commit(clone, branch="iris/b")
        done = await hive.try_git(clone, "push", "origin", "iris/b")
        assert "the hive went away during the push" in done.stderr
        held.unlink()
        left = [path for end in ("lock", "keep") for path in hive.mirrors.path(SITE).rglob(f"*.{end}")]
        assert (left, held_back(hive)) == ([], [])
        assert refs(source)["refs/hive/iris/iris/b"] == pushed  # which the mirror learns by its next fetch, or push
        await hive.git(clone, "push", "--quiet", "origin", "iris/b")
        assert refs(hive.mirrors.path(SITE))["refs/heads/iris/b"] == pushed


async def test_who_pushes_while_others_move_the_refs_for_long_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "ALONE_WAIT_S", 0.1)
    source = make_source(tmp_path / "source")
    async with open_project_hive(tmp_path) as hive:
        clone = await begin(hive, source)
        async with hive.mirrors.alone(SITE):
            done = await hive.try_git(clone, "push", "origin", "HEAD:refs/heads/iris/a")
        assert "push again in a moment" in done.stderr
        await hive.git(clone, "push", "--quiet", "origin", "HEAD:refs/heads/iris/a")


async def test_who_pushes_a_name_of_60_000_bytes_and_reads_nothing_holds_up_nobody(tmp_path: Path) -> None:
    async with open_project_hive(tmp_path) as hive:
        head = git(await begin(hive, make_source(tmp_path / "source")), "rev-parse", "HEAD")
        name = b"refs/heads/" + b"\x80" * 60_000  # of which each is told in twelve
        line = f"{NOTHING} {head} ".encode() + name + b"\0report-status side-band-64k\n"
        pack = b"PACK" + struct.pack(">II", 2, 0)
        asked = b"%04x%b0000" % (len(line) + 4, line) + pack + hashlib.sha1(pack).digest()
        client = await in_thread(ask, hive.sockets[IRIS], "receive-pack")
        with client, hive.services.store.bus.listen(EVENTS) as listener:
            await in_thread(client.sendall, asked)
            while not (refused := await hive.events("push_refused")):
                await listener.wait()
        assert "cannot be pushed: it is no branch whose name is taken here" in refused[0]["data"]


def test_pipes_that_cannot_all_be_opened_leave_none_open() -> None:
    before = os.listdir("/proc/self/fd")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 3, limits[1]))
    try:
        opened = list[int]()
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(0))
        for descriptor in (opened.pop(), opened.pop()):
            os.close(descriptor)
        with pytest.raises(OSError, match="Too many open files"):
            Pipes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in opened:
            os.close(descriptor)
    assert os.listdir("/proc/self/fd") == before


async def test_no_agent_takes_all_the_gits_that_run_at_once() -> None:
    seats, sat, held = Seats(), list[str](), dict[str, trio.CancelScope]()

    async def sit(agent: str, number: int) -> None:
        with trio.CancelScope() as held[f"{agent} {number}"]:
            async with seats.seat(AgentName(agent)):
                sat.append(agent)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for number in range(SEATS):
            nursery.start_soon(sit, "iris", number)
        await trio.testing.wait_all_tasks_blocked()
        assert len(sat) == SEATS // 2
        for agent in ("a", "b", "c", "d", "e"):
            nursery.start_soon(sit, agent, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(sat) == SEATS
        held["a 0"].cancel()
        held["b 0"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert set(sat) >= {"c", "d", "e"}
        nursery.cancel_scope.cancel()
