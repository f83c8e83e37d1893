from __future__ import annotations

import errno
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


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.EACCES, "permission is denied; run it as somebody who may, or set x to another"),
        (errno.EPERM, "permission is denied; run it as somebody who may, or set x to another"),
        (errno.EROFS, "the file system is read-only; make it writable, or set x to another"),
        (errno.ENOSPC, "no space is left; make room, or set x to another"),
        (errno.EDQUOT, "no space is left; make room, or set x to another"),
        (errno.ELOOP, "symbolic links lead in a circle; mend them, or set x to another"),
        (errno.ENAMETOOLONG, "its name is too long; set x to a shorter one"),
        (errno.ENOLCK, "this file system cannot lock files; set x to another"),
        (errno.ENXIO, "No such device or address; set x to another"),
        (socket.EAI_AGAIN, "no address was found for that name; set x to an address of this machine"),
    ],
)
def test_an_error_of_the_system_is_its_cause_and_the_way_out(number: int, cause: str) -> None:
    assert paths.explain(OSError(number, os.strerror(number)), "x").startswith(cause)
    assert str(number) not in paths.explain(OSError(number, os.strerror(number)))


def test_an_error_of_the_system_names_the_file_where_no_setting_does() -> None:
    assert paths.explain(PermissionError(errno.EACCES, "no", "/etc/x")) == (
        "/etc/x: permission is denied; run it as somebody who may"
    )


def test_a_socket_path_that_python_finds_too_long_is_explained_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError, match="too long") as caught:
        sock.bind(str(tmp_path / ("x" * 120)))
    assert paths.explain(caught.value, "x") == "its name is too long; set x to a shorter one"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("runtime_dir = 7", "cannot use 7 as runtime_dir: it must be a path"),
        ("runtime_dir = ''", "cannot use '' as runtime_dir: it must be a path"),
        ("[runtime_dir]\na = 1", "cannot use {'a': 1} as runtime_dir: it must be a path"),
        ('runtime_dir = "/a\\u0000b"', "as runtime_dir: it must be a path"),
        ("runtime_dir = '~no-such-user/x'", "cannot use '~no-such-user/x' as runtime_dir: it must be a path"),
        ("runtime_dir = ", "it is not TOML ("),
        ("a = " + "[" * 10_000, "it is nested too deep"),
        ("\ud800", "byte 0 is not UTF-8; save it as UTF-8"),
    ],
    ids=range(8),
)
def test_a_client_refuses_a_configuration_file_that_cannot_be_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    monkeypatch.setattr(paths, "config_files", lambda: [str(file)])
    monkeypatch.delenv("HIVE_RUNTIME_DIR", raising=False)
    with pytest.raises(Refusal) as caught:
        paths.runtime_dir()
    assert cause in caught.value.message
    assert str(file) in caught.value.message


def test_without_a_home_the_defaults_are_not_below_the_current_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setenv("HOME", "somewhere")
    monkeypatch.setenv("XDG_STATE_HOME", "relative, so it does not count")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative too")
    assert paths.default_runtime_dir() == "/tmp/hyperhive-12345"
    with pytest.raises(Refusal, match=r"HOME names no directory; set HOME, or state_dir \(HIVE_STATE_DIR\)"):
        paths.default_state_dir()
    monkeypatch.setenv("HOME", "/home/you")
    assert paths.default_state_dir() == "/home/you/.local/state/hyperhive"
