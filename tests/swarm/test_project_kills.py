"""SIGKILL of the daemon while an agent clones or pushes: the whole or a clear error, and then the next try is whole."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.daemons import NO_CLAUDE, Daemon, open_daemon
from tests.git_servers import serve_http
from tests.needs import ROOT
from tests.project_hives import ENVIRONMENT, commit, git, make_source

PIECE = 16 * 1024
PROJECTS = [{"name": "site", "push": "*"}]


@contextmanager
def open_work(source: str, folder: Path) -> Iterator[Daemon]:
    """A daemon with the project, which hm1nd lists; nobody but the test speaks for it."""
    with open_daemon(NO_CLAUDE) as daemon:
        daemon.start().call("project_add", project="site", source=source)
        daemon.kill()
        with closing(sqlite3.connect(daemon.state / "hive.sqlite")) as database, database:
            database.execute("UPDATE agents SET policy = ?", (json.dumps({"projects": PROJECTS}),))
        daemon.start()
        yield daemon


def inside(sock: Path) -> dict[str, str]:
    path = f"{os.environ['PATH']}{os.pathsep}{ROOT / 'hive_agent' / 'path'}"
    return {**ENVIRONMENT, "PATH": path, "HIVE_PYTHON": sys.executable, "HIVE_GIT_SOCKET": str(sock)}


def run_inside(sock: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=folder, env=inside(sock), capture_output=True, text=True)


def sock_of(daemon: Daemon) -> Path:
    return daemon.runtime / "manager" / "git.sock"


@contextmanager
def watched(sock: Path, place: Path, after_bytes: int, upward: bool, then: Callable[[], None]) -> Iterator[Path]:
    """A socket before another; `then` is called once so many bytes passed up to the hive, or down from it."""
    called = threading.Lock()

    def pump(source: socket.socket, target: socket.socket, counts: bool) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(PIECE):
                passed += len(data)
                if counts and passed >= after_bytes and called.acquire(blocking=False):
                    then()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.socket(socket.AF_UNIX)
                with client, server:
                    server.connect(str(sock))
                    up = threading.Thread(target=pump, args=(client, server, upward))
                    up.start()
                    pump(server, client, not upward)
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)
                    up.join()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield place
        assert called.locked(), "it ended before so many bytes passed"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def leavings(mirror: Path) -> list[Path]:
    objects = mirror / "objects"
    return [*mirror.rglob("*.lock"), *objects.glob("tmp_objdir-*"), *objects.glob("pack/tmp_*")]


@pytest.mark.parametrize("after_bytes", [200, 300_000])
def test_a_clone_is_whole_or_not_there_and_the_next_is_whole(tmp_path: Path, after_bytes: int) -> None:
    source = make_source(tmp_path / "source")
    (source / "noise").write_bytes(os.urandom(3_000_000))
    head = commit(source)
    with open_work(str(source), tmp_path) as daemon:
        clone = tmp_path / "clone"
        with watched(sock_of(daemon), tmp_path / "s", after_bytes, False, daemon.kill) as place:
            done = run_inside(place, tmp_path, "clone", "--quiet", "hive://site", str(clone))
        daemon.start()
        if done.returncode != 0:
            assert "hive: the hive went away during the fetch; what is there is whole: fetch again" in done.stderr
            assert not clone.exists()
            done = run_inside(sock_of(daemon), tmp_path, "clone", "--quiet", "hive://site", str(clone))
        assert done.returncode == 0, done.stderr
        assert git(clone, "rev-parse", "HEAD") == head
        git(clone, "fsck", "--strict")


@pytest.mark.parametrize("after_bytes", [300_000, 2_999_000])
def test_a_push_that_was_cut_off_moved_nothing_and_the_next_moves_all(tmp_path: Path, after_bytes: int) -> None:
    source = make_source(tmp_path / "source")
    with open_work(str(source), tmp_path) as daemon:
        clone = tmp_path / "clone"
        assert run_inside(sock_of(daemon), tmp_path, "clone", "--quiet", "hive://site", str(clone)).returncode == 0
        git(clone, "checkout", "--quiet", "-b", "fix")
        (clone / "noise").write_bytes(os.urandom(3_000_000))
        pushed = commit(clone)
        with watched(sock_of(daemon), tmp_path / "s", after_bytes, True, daemon.kill) as place:
            done = run_inside(place, clone, "push", "origin", "fix", "fix:other")
        assert done.returncode != 0
        assert "went away" in done.stderr
        assert git(source, "for-each-ref", "refs/hive") == ""
        daemon.start()
        mirror = daemon.state / "mirrors" / "site.git"
        assert git(mirror, "for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"
        assert leavings(mirror) == []
        done = run_inside(sock_of(daemon), clone, "push", "--quiet", "origin", "fix", "fix:other")
        assert done.returncode == 0, done.stderr
        assert git(source, "for-each-ref", "--format=%(objectname)", "refs/hive").split() == [pushed, pushed]
        git(mirror, "fsck", "--strict")


def test_a_push_that_the_server_took_meanwhile_comes_to_its_end_with_the_next_try(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    bare = tmp_path / "served" / "site.git"
    git(tmp_path, "clone", "--quiet", "--bare", str(source), str(bare))
    git(bare, "config", "http.receivepack", "true")
    begun, goes_on = tmp_path / "begun", tmp_path / "goes-on"
    with serve_http(bare.parent) as server, open_work(f"{server.url}/site.git", tmp_path) as daemon:
        clone = tmp_path / "clone"
        assert run_inside(sock_of(daemon), tmp_path, "clone", "--quiet", "hive://site", str(clone)).returncode == 0
        pushed = commit(clone, branch="fix")
        for fifo in (begun, goes_on):
            os.mkfifo(fifo)
        hook = bare / "hooks" / "pre-receive"
        hook.parent.mkdir(exist_ok=True)
        hook.write_text(f"#!/bin/sh\necho >{begun}\nread -r _ <{goes_on}\n")
        hook.chmod(0o755)
        words = ["git", "push", "origin", "fix", "fix:other"]
        with subprocess.Popen(words, cwd=clone, env=inside(sock_of(daemon)), stderr=subprocess.PIPE, text=True) as push:
            begun.read_text()  # the server is asked now
            daemon.kill()
            goes_on.write_text("\n")
            assert push.stderr is not None
            said = push.stderr.read()
        assert push.returncode != 0
        assert "the hive's daemon went away before all was pushed; push again" in said
        hook.unlink()
        daemon.start()
        done = run_inside(sock_of(daemon), clone, "push", "--quiet", "origin", "fix", "fix:other")
        assert done.returncode == 0, done.stderr
        for repository in (bare, daemon.state / "mirrors" / "site.git"):
            for branch in ("fix", "other"):
                assert git(repository, "rev-parse", f"refs/heads/{branch}") == pushed
        assert leavings(daemon.state / "mirrors" / "site.git") == []
