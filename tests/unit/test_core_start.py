"""What keeps a daemon from starting: each cause is one sentence that names it, the place and the way out."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import trio_asyncio

from hive_core.config import Config
from hive_core.daemon import _templates, manager_prompt, take_lock
from hive_core.protocol.refusal import Refusal
from hive_core.sockets.tcp import listen_dashboard
from hive_core.store.door import open_store
from hive_core.store.errors import StoreError
from tests.needs import ROOT

# -- the database -----------------------------------------------------------------------------------------------------


async def refusal_to_open(path: Path) -> str:
    async with trio_asyncio.open_loop():
        with pytest.raises(StoreError) as caught:
            async with open_store(path):
                pass
    return str(caught.value)


def make_large_database(path: Path) -> bytes:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.executemany("INSERT INTO t VALUES (?)", [("x" * 3000,) for _ in range(20)])
    connection.commit()
    connection.close()
    return path.read_bytes()


def garbage(_: bytes) -> bytes:
    return b"no database at all\n" * 100


def cut_short(whole: bytes) -> bytes:
    return whole[:300]


def scribbled_over(whole: bytes) -> bytes:
    return whole[:100] + b"\xff" * 3996 + whole[4096:]


@pytest.mark.parametrize("spoil", [garbage, cut_short, scribbled_over])
async def test_a_damaged_database_is_named_with_the_way_out_and_left_alone(tmp_path: Path, spoil: object) -> None:
    path = tmp_path / "hive.sqlite"
    assert callable(spoil)
    path.write_bytes(data := spoil(make_large_database(path)))
    said = await refusal_to_open(path)
    assert said.startswith(f"cannot open {path}: it is no database, or a damaged one (")
    assert "restore a backup" in said
    assert "move it away with its -wal and -shm" in said
    assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["hive.sqlite"]


async def test_a_directory_in_the_place_of_the_database_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "hive.sqlite"
    path.mkdir()
    said = await refusal_to_open(path)
    assert said.startswith(f"cannot open {path}: a directory stands where a file is needed; move it away")
    assert "Errno" not in said


async def test_a_database_that_another_program_holds_is_named_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hive.sqlite"
    async with trio_asyncio.open_loop(), open_store(path):
        pass
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect
    # Without this sqlite waits five seconds for the other to let go.
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **{"timeout": 0.0, **more}))
    assert "another program has it open; end that program" in await refusal_to_open(path)
    other.close()


# -- directories ------------------------------------------------------------------------------------------------------


def refusal_to_lock(folder: Path) -> str:
    with pytest.raises(Refusal) as caught:
        take_lock(folder)
    assert "Errno" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("below", ["", "deeper/down"])
def test_a_file_where_a_directory_should_be_is_named_and_left_alone(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    folder = tmp_path / "file" / below
    said = refusal_to_lock(folder)
    assert said.startswith(f"cannot use {folder}: a file stands where a directory is needed; move it away, or set ")
    assert "state_dir or runtime_dir" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_named_with_the_way_out(tmp_path: Path) -> None:
    assert "cannot use /proc/hive: there is no such file or directory; create it, or set" in refusal_to_lock(
        Path("/proc/hive")
    )
    assert "permission is denied; run it as somebody who may, or set" in refusal_to_lock(Path("/sys/hive"))
    assert "its name is too long; set state_dir or runtime_dir to a shorter one" in refusal_to_lock(
        tmp_path / ("x" * 300)
    )


def test_a_directory_in_which_others_may_write_is_refused_with_the_way_out(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert f"`chmod 700 {tmp_path}`" in refusal_to_lock(tmp_path)


def test_a_directory_in_the_place_of_the_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "daemon.lock").mkdir()
    assert f"cannot use {tmp_path}: a directory stands where a file is needed" in refusal_to_lock(tmp_path)


# -- the dashboard's address ------------------------------------------------------------------------------------------


def refusal_to_listen(host: str, port: int = 0) -> str:
    with pytest.raises(Refusal) as caught:
        listen_dashboard(Config(dashboard_host=host, dashboard_port=port))
    return caught.value.message


@pytest.mark.parametrize(
    ("host", "cause"),
    [
        ("nowhere.invalid", "no address was found for that name"),
        ("a..b", "no address was found for that name"),
        ("192.0.2.7", "this machine has no such address"),
        ("2001:db8::1", ""),  # what is wrong with it depends on whether the machine speaks IPv6
    ],
)
def test_a_host_that_is_not_this_machine_is_told_to_change_the_host(host: str, cause: str) -> None:
    said = refusal_to_listen(host)
    assert said.startswith(f"cannot serve the dashboard on {host}:0: {cause}")
    assert said.endswith("; set dashboard_host to an address of this machine, such as 127.0.0.1")


def test_a_busy_port_is_told_to_change_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        said = refusal_to_listen("127.0.0.1", busy.getsockname()[1])
    assert "another program uses the port; stop it, or set dashboard_port to another" in said
    assert "dashboard_host" not in said


# -- the manager's prompt ---------------------------------------------------------------------------------------------


def refusal_to_read(prompt: Path) -> str:
    with pytest.raises(Refusal) as caught:
        manager_prompt(Config(manager_prompt=prompt))
    assert caught.value.code == "usage"
    assert caught.value.message.startswith(f"cannot use {prompt} as manager_prompt: ")
    return caught.value.message


def test_a_prompt_that_cannot_be_read_is_named_with_the_way_out(tmp_path: Path) -> None:
    assert "there is no such file or directory; create it, or set manager_prompt to another" in refusal_to_read(
        tmp_path / "none"
    )
    assert "a directory stands where a file is needed" in refusal_to_read(tmp_path)
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    assert "byte 3 is not UTF-8; save it as UTF-8, or set manager_prompt to another" in refusal_to_read(
        tmp_path / "prompt"
    )


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (" \n", "it is empty"),
        ("a\0b", "it contains a NUL"),
        ("x" * 60_000, "it has 60,000 bytes and the limit is 49,152"),
    ],
    ids=["empty", "NUL", "long"],
)
def test_a_prompt_that_cannot_be_is_refused_before_it_is_committed(tmp_path: Path, text: str, cause: str) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text(text)
    with pytest.raises(Refusal) as caught:
        manager_prompt(Config(manager_prompt=prompt))
    assert caught.value.message.startswith(f"cannot take the manager_prompt {prompt}: {cause}")
    assert caught.value.message.endswith("; mend it, or set manager_prompt to another")


def test_a_prompt_in_utf_8_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("You are the café's manager.\n")
    assert manager_prompt(Config(manager_prompt=tmp_path / "prompt")) == "You are the café's manager.\n"


@pytest.mark.parametrize("pronouns", [None, "she/her"])
def test_prompts_say_how_the_operator_is_spoken_of_where_it_is_known(pronouns: str | None) -> None:
    config = Config(operator_pronouns=pronouns)
    agents = _templates(config).get_template("CLAUDE.md.j2").render(name="iris", persona="You read.")
    for prompt in (manager_prompt(config), agents):
        assert ("The operator's pronouns: she/her." in prompt) == (pronouns is not None)
        assert "\n\n\n" not in prompt


# -- hive-core, the command -------------------------------------------------------------------------------------------


def serve(folder: Path, *flags: str, **more: object) -> subprocess.CompletedProcess[str]:
    """`hive-core serve`, which must not come as far as serving."""
    flags = ("--state-dir", str(folder / "s"), "--runtime-dir", str(folder / "r"), "--dashboard-port=0", *flags)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HIVE_")}
    options: dict[str, object] = {
        "env": {**kept, "XDG_CONFIG_HOME": str(folder), "PYTHONPATH": str(ROOT)},
        "capture_output": True,
        "text": True,
        "timeout": 60,
        **more,
    }
    return subprocess.run([sys.executable, "-P", "-m", "hive_core", "serve", *flags], **options)  # type: ignore[call-overload, no-any-return]


def the_one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode in (1, 2, 4), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hive-core: cannot ")
    assert "Errno" not in line
    return line


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--frob"], "cannot read the arguments: unrecognized arguments: --frob; `hive-core serve --help`"),
        (["--life-fd", "x"], "'x' is not the number of a pipe or socket that is open here"),
        (["--life-fd=-1"], "'-1' is not the number of a pipe"),
        (["--life-fd", "77"], "'77' is not the number of a pipe"),
        (["--life-fd", "9" * 5000], "(5002 characters) is not the number of a pipe"),
        (["--life-fd", "0"], "'0' is not the number of a pipe"),  # stdin is /dev/null
        (["--dashboard-port", "\x1b[31m"], r"cannot use '\x1b[31m' as dashboard_port: it must be a whole number"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_flag_that_cannot_be_is_one_line_and_nothing_is_made(tmp_path: Path, flags: list[str], cause: str) -> None:
    assert cause in the_one_line(serve(tmp_path, *flags, stdin=subprocess.DEVNULL))
    assert list(tmp_path.iterdir()) == []


def test_a_start_in_a_directory_that_was_deleted_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    said = the_one_line(serve(tmp_path, cwd=gone, preexec_fn=gone.rmdir))
    assert "the current directory was deleted; `cd` to another" in said


def test_a_system_error_that_nobody_foresaw_names_its_file() -> None:
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:  # tmp_path may be too long for sockets
        state = Path(folder) / "s"
        state.mkdir(0o700)
        (state / "applied").write_text("in the way")
        said = the_one_line(serve(Path(folder)))
        assert said.startswith(f"hive-core: cannot use the repository of hm1nd: {state}/applied")
        assert said.endswith(": a file stands where a directory is needed; move it away")
