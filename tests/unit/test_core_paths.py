from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hive_core.protocol import paths
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import NAME_LIMIT
from hive_core.sockets.unix import listen_unix

ROOM = paths.SOCKET_PATH_LIMIT_BYTES - len("/agents/" + "n" * NAME_LIMIT + "/harness.sock")


def test_the_limit_is_what_the_kernel_takes(tmp_path: Path) -> None:
    for excess, fits in ((0, True), (1, False)):
        name = "n" * (paths.SOCKET_PATH_LIMIT_BYTES + excess - len(str(tmp_path)) - 1)
        with socket.socket(socket.AF_UNIX) as sock:
            if fits:
                sock.bind(str(tmp_path / name))
            else:
                with pytest.raises(OSError, match="too long"):
                    sock.bind(str(tmp_path / name))


def test_a_runtime_directory_that_leaves_just_enough_room_passes() -> None:
    paths.check_socket_room("/" + "r" * (ROOM - 1))


@pytest.mark.parametrize("runtime", ["/" + "r" * ROOM, "/" + "é" * (ROOM // 2 + 1)])
def test_a_runtime_directory_that_leaves_too_little_room_is_refused_with_the_way_out(runtime: str) -> None:
    with pytest.raises(Refusal, match="runtime_dir to a shorter path") as caught:
        paths.check_socket_room(runtime)
    assert "107 bytes" in caught.value.message


def test_a_client_finds_the_runtime_directory_by_the_variable_then_the_file_then_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hyperhive" / "config.toml"
    file.parent.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(paths, "config_files", lambda: [str(tmp_path / "none"), str(file)])
    monkeypatch.delenv("HIVE_RUNTIME_DIR", raising=False)
    assert paths.runtime_dir() == paths.default_runtime_dir()
    file.write_text('runtime_dir = "/run/from-file"\n')
    assert paths.runtime_dir() == "/run/from-file"
    monkeypatch.setenv("HIVE_RUNTIME_DIR", "/run/from-variable")
    assert paths.runtime_dir() == "/run/from-variable"


def test_a_client_says_which_configuration_file_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.toml").write_text("runtime_dir = ")
    monkeypatch.setattr(paths, "config_files", lambda: [str(tmp_path / "config.toml")])
    monkeypatch.delenv("HIVE_RUNTIME_DIR", raising=False)
    with pytest.raises(Refusal, match=r"cannot read .*config\.toml"):
        paths.runtime_dir()


def test_a_socket_is_tight_and_replaces_one_that_a_dead_daemon_left(tmp_path: Path) -> None:
    path = tmp_path / "host.sock"
    listen_unix(path).close()
    assert path.is_socket()
    with listen_unix(path, 0o660):
        assert path.stat().st_mode & 0o777 == 0o660
    with listen_unix(path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_socket_does_not_replace_what_is_not_a_socket(tmp_path: Path) -> None:
    for name in ("file", "link"):
        path = tmp_path / name
        if name == "file":
            path.write_text("precious")
        else:
            path.symlink_to(tmp_path / "file")
        with pytest.raises(Refusal, match="not a socket"):
            listen_unix(path)
    assert (tmp_path / "file").read_text() == "precious"


def test_listening_changes_no_umask_since_other_threads_make_directories_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(mask: int) -> int:
        raise AssertionError(f"umask {mask:o} would reach every thread")

    monkeypatch.setattr(os, "umask", refuse)
    with listen_unix(tmp_path / "x.sock"):
        assert (tmp_path / "x.sock").stat().st_mode & 0o777 == 0o600
