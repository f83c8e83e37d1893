"""`git-remote-hive`: git on one side, a scripted git.sock on the other."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_agent import git_remote
from tests.git_socket import git_socket, serve_git
from tests.hives import clean_environment
from tests.needs import ROOT

HELPER = ROOT / "hive_agent" / "path" / "git-remote-hive"


def variables(folder: Path) -> dict[str, str]:
    """The environment of an agent's git whose hive serves in a folder."""
    who = {f"GIT_{role}_{key}": "iris" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
    path = f"{os.environ['PATH']}:{HELPER.parent}"
    own = {"PATH": path, "HIVE_PYTHON": sys.executable, "HIVE_GIT_SOCKET": str(folder / "git.sock")}
    return {**clean_environment(), **who, **own}


def tried(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=folder, env=variables(folder), capture_output=True, text=True)


def git(folder: Path, *words: str) -> str:
    done = tried(folder, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the project x, of one commit."""
    git(tmp_path, "init", "-q", "-b", "main", "first")
    (tmp_path / "first" / "README").write_text("of x\n")
    git(tmp_path, "-C", "first", "add", ".")
    git(tmp_path, "-C", "first", "commit", "-qm", "first")
    git(tmp_path, "clone", "-q", "--bare", "first", "x.git")
    return tmp_path


def test_git_clones_fetches_and_pushes_through_the_socket(folder: Path) -> None:
    with git_socket(folder / "git.sock", serve_git(folder)) as asked:
        git(folder, "clone", "-q", "hive://x", "mine")
        git(folder, "clone", "-q", "hive://x", "other")
        assert (folder / "mine" / "README").read_text() == "of x\n"
        (folder / "mine" / "more").write_bytes(os.urandom(3_000_000))
        git(folder, "-C", "mine", "add", ".")
        git(folder, "-C", "mine", "commit", "-qm", "more")
        git(folder, "-C", "mine", "push", "-q", "origin", "HEAD:refs/heads/iris/more")
        git(folder, "-C", "mine", "push", "-q", "origin", "HEAD:refs/heads/iris/more")
        git(folder, "-C", "other", "fetch", "-q")
        shas = git(folder, "-C", "other", "rev-parse", "origin/iris/more"), git(folder, "-C", "mine", "rev-parse", "@")
        assert shas[0] == shas[1]
        assert "refs/heads/iris/more" in git(folder, "ls-remote", "hive://x")
    assert {(one["service"], one["project"], one["protocol"]) for one in asked} == {
        ("git-upload-pack", "x", "version=2"),
        ("git-receive-pack", "x", None),
    }


def test_it_starts_with_little_of_python(folder: Path) -> None:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hive_agent.git_remote; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert not {"json", "re", "threading", "argparse", "typing", "subprocess"} & set(said.stdout.split())


def test_what_the_hive_refuses_is_one_line_and_git_fails(folder: Path) -> None:
    with git_socket(folder / "git.sock", serve_git(folder)):
        done = tried(folder, "clone", "-q", "hive://y", "mine")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "hive: there is no such project"


@pytest.mark.parametrize("url", ["hive://", "hive://../x", 'hive://x"}', "hive://X", "hive://x\ny", "hive://x/y"])
def test_an_address_that_is_none_of_the_hives_is_refused_and_nothing_is_asked(folder: Path, url: str) -> None:
    with git_socket(folder / "git.sock", serve_git(folder)) as asked:
        done = subprocess.run([HELPER, "origin", url], env=variables(folder), capture_output=True, text=True)
    assert (done.returncode, asked) == (1, [])
    assert done.stderr.startswith("hive: cannot use ")
    assert len(done.stderr.splitlines()) == 1


def test_another_service_is_refused(folder: Path) -> None:
    done = subprocess.run(
        [HELPER, "origin", "hive://x"],
        input="capabilities\nconnect git-upload-archive\n",
        env=variables(folder),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "connect\n\n")
    assert "cannot run git-upload-archive of x" in done.stderr


def test_a_daemon_that_is_away_or_hangs_up_before_it_answered_is_waited_for(folder: Path) -> None:
    serve, times = serve_git(folder), iter(range(100))

    def late(client: socket.socket, asked: dict[str, Any]) -> None:
        if next(times) > 1:
            serve(client, asked)

    # A socket that nobody listens on, as a daemon that was killed leaves it.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "git.sock"))
    process = subprocess.Popen(["git", "ls-remote", "hive://x"], cwd=folder, env=variables(folder), stdout=-1)
    with git_socket(folder / "git.sock", late) as asked:
        said, _ = process.communicate()
    assert (process.returncode, len(asked)) == (0, 3)
    assert b"refs/heads/main" in said


def test_a_daemon_that_stays_away_is_told_of_with_a_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HIVE_GIT_SOCKET", str(folder / "git.sock"))
    monkeypatch.setattr(git_remote, "WAIT_S", 0.0)
    with pytest.raises(
        git_remote.Trouble, match=r"its daemon is away .* did not come back within 0 s; try again later"
    ):
        git_remote._dial("x", "git-upload-pack")


def cut(repository: Path, service: str, bytes_most: int) -> Any:
    """Serve as git does, and hang up when it has said so many bytes."""

    def serve(client: socket.socket, asked: dict[str, Any]) -> None:
        environment = {**clean_environment(), **({"GIT_PROTOCOL": asked["protocol"]} if asked["protocol"] else {})}
        command = ["git", asked["service"].removeprefix("git-"), str(repository)]
        own, theirs = socket.socketpair()
        with own, theirs:
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
            client.sendall(b'{"ok":true}\n')

            def pass_on() -> None:
                with contextlib.suppress(OSError):
                    while data := client.recv(1 << 16):
                        own.sendall(data)

            thread = threading.Thread(target=pass_on, daemon=True)
            thread.start()
            left = bytes_most if asked["service"] == service else 1 << 40
            while left and (data := own.recv(min(left, 1 << 16))):
                left -= len(data)
                client.sendall(data)
            process.kill()
            process.wait()
            for end in (client, own):
                end.shutdown(socket.SHUT_RDWR)  # of ours too: nobody reads any more what may fill it
            thread.join()

    return serve


def said_by_receive_pack(folder: Path) -> int:
    """How many bytes it says before it is told what is pushed."""
    done = subprocess.run(["git", "receive-pack", "x.git"], cwd=folder, input=b"0000", capture_output=True)
    return len(done.stdout)


def test_a_hive_that_goes_away_before_git_has_said_anything_is_no_end_of_a_conversation(folder: Path) -> None:
    def serve(client: socket.socket, _: dict[str, Any]) -> None:
        client.sendall(b'{"ok": true}\n000ahello\n0000')
        client.shutdown(socket.SHUT_RDWR)

    with git_socket(folder / "git.sock", serve):
        helper = subprocess.Popen(
            [HELPER, "origin", "hive://x"], env=variables(folder), stdin=-1, stdout=-1, stderr=-1, text=True
        )
        assert helper.stdin is not None
        helper.stdin.write("connect git-receive-pack\n")
        helper.stdin.flush()
        assert helper.stderr is not None
        told = helper.stderr.read()
        helper.communicate()
    assert told == "hive: the hive went away during the push; nothing was pushed by halves: push again\n"
    assert helper.returncode == 1


@pytest.mark.parametrize("more", [0, 1, 30])
def test_a_hive_that_goes_away_during_a_push_says_so_in_one_line_and_the_next_push_works(
    folder: Path, more: int
) -> None:
    (folder / "first" / "more").write_bytes(os.urandom(2_000_000))
    git(folder, "-C", "first", "add", ".")
    git(folder, "-C", "first", "commit", "-qm", "more")
    push = ("-C", "first", "push", "-q", "hive://x", "main:refs/heads/iris/more")
    with git_socket(
        folder / "git.sock", cut(folder / "x.git", "git-receive-pack", said_by_receive_pack(folder) + more)
    ):
        done = tried(folder, *push)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("hive: ")]
    assert told == ["hive: the hive went away during the push; nothing was pushed by halves: push again"]
    with git_socket(folder / "git.sock", serve_git(folder)):
        git(folder, *push)


@pytest.mark.parametrize("bytes_most", [3, 200, 5_000, 1_000_000])
def test_a_hive_that_goes_away_during_a_clone_says_so_in_one_line_and_the_next_clone_works(
    folder: Path, bytes_most: int
) -> None:
    (folder / "first" / "more").write_bytes(os.urandom(2_000_000))
    git(folder, "-C", "first", "add", ".")
    git(folder, "-C", "first", "commit", "-qm", "more")
    git(folder, "-C", "first", "push", "-q", "../x.git", "main")
    with git_socket(folder / "git.sock", cut(folder / "x.git", "git-upload-pack", bytes_most)):
        done = tried(folder, "clone", "-q", "hive://x", "mine")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("hive: ")]
    assert told == ["hive: the hive went away during the fetch; what is there is whole: fetch again"]
    with git_socket(folder / "git.sock", serve_git(folder)):
        git(folder, "clone", "-q", "hive://x", "mine")


@given(st.data())
def test_where_a_stream_of_packets_ends_is_seen_however_it_comes(data: st.DataObject) -> None:
    packets = data.draw(st.lists(st.binary(max_size=20).map(lambda b: b"%04x" % (len(b) + 4) + b) | st.just(b"0000")))
    whole = b"".join(packets)
    end = data.draw(st.integers(0, len(whole)))
    cuts = sorted({0, end, *data.draw(st.lists(st.integers(0, end)))})
    seen = git_remote.Packets()
    for start, stop in pairwise(cuts):
        seen.follow(whole[start:stop])
    edges = dict(zip(accumulate(map(len, packets)), packets, strict=True))
    assert seen.ended == (edges.get(end) == b"0000")


@given(st.binary())
def test_what_is_no_packet_is_followed_no_further(data: bytes) -> None:
    seen = git_remote.Packets()
    seen.follow(b"PACK" + data)
    assert seen.ended
