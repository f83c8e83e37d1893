"""`hive` with words, variables and surroundings that cannot be: one line, no trace, the right exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from hive_core.cli.client import Client
from hive_core.cli.output import emit, refuse
from hive_core.cli.verbs import VERBS
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import hides
from hive_core.protocol.words import BODY_LIMIT_BYTES
from tests.needs import ROOT


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder short enough for the sockets of a daemon below it, which tmp_path may not be."""
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:
        yield Path(folder)


def hive(folder: Path, *words: str | bytes, **more: object) -> subprocess.CompletedProcess[str]:
    """`hive`, with directories in `folder`; `env` adds to the environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HIVE_")}
    added = more.pop("env", {})
    assert isinstance(added, dict)
    environment = {
        **kept,
        "XDG_CONFIG_HOME": str(folder / "config"),
        "HIVE_STATE_DIR": str(folder / "s"),
        "HIVE_RUNTIME_DIR": str(folder / "r"),
        "PYTHONPATH": str(ROOT),
        **added,
    }
    options: dict[str, object] = {"capture_output": True, "text": True, "timeout": 60, **more}
    command = [sys.executable, "-P", "-m", "hive_core.cli", *words]
    return subprocess.run(command, env=environment, **options)  # type: ignore[call-overload, no-any-return]


def the_one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("hive: cannot ")
    assert "Errno" not in line
    assert "\x1b" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_names_the_function_that_runs_it(verb: str) -> None:
    module, name = VERBS[verb][0].split(".")
    assert callable(getattr(import_module(f"hive_core.cli.{module}"), name))


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["frob"], "there is no verb 'frob'; `hive --help` says more"),
        (["fr\x1b[31mob"], r"there is no verb 'fr\x1b[31mob'"),
        (["x" * 10_000], "(10002 characters)"),
        (["list", "more"], "unrecognized arguments: more; `hive list --help` says more"),
        (["list", "\x1b[31m"], "unrecognized arguments: ⟨U+001B⟩[31m"),
        (["send"], "cannot send to nobody: name an agent"),
        (["show", "one"], "argument approval: 'one' is not a whole number"),
        (["show", "9" * 5000], "(5002 characters) is not a whole number"),
        (["show", "1.5"], "'1.5' is not a whole number"),
        (["inbox", "--limit", "many"], "argument --limit: 'many' is not a whole number"),
        (["down", "--patience", "nan"], "argument --patience: 'nan' is not a number of seconds, such as 30"),
        (["down", "--patience", "inf"], "'inf' is not a number of seconds"),
        (["down", "--patience", "-1"], "'-1' is not a number of seconds"),
        (["down", "--patience", "soon"], "'soon' is not a number of seconds"),
        (["down", "--patience"], "argument --patience: expected one argument"),
        (["send", "iris", b"caf\xe9"], "argument 3 is not UTF-8"),
    ],
    ids=lambda value: b" ".join(map(os.fsencode, value))[:24].decode("ascii", "replace") if type(value) is list else "",
)
def test_words_that_cannot_be_are_one_line_and_one_object(tmp_path: Path, words: list[str | bytes], cause: str) -> None:
    said = the_one_line(hive(tmp_path, *words), 2)
    assert cause in said
    done = hive(tmp_path, "--json", *words)
    assert json.loads(done.stdout)["error"] == {"code": "usage", "message": said.removeprefix("hive: ")}


def test_help_and_version_still_go_to_standard_output(tmp_path: Path) -> None:
    for words in (["--help"], ["down", "--help"], ["--version"]):
        done = hive(tmp_path, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_the_help_lists_every_verb_with_what_it_does_in_one_column(tmp_path: Path) -> None:
    listed = hive(tmp_path, "--help").stdout.partition("verbs (")[2].splitlines()[1:]
    texts = [verb[1] for verb in VERBS.values()]
    assert len({line.index(text) for line, text in zip(listed, texts, strict=True)}) == 1


# -- where the hive is ------------------------------------------------------------------------------------------------


def test_a_runtime_directory_too_long_for_sockets_is_told_by_every_verb(tmp_path: Path) -> None:
    long = {"HIVE_RUNTIME_DIR": f"{tmp_path}/{'x' * 120}"}
    for words in ([], ["list"], ["send", "iris", "hi"], ["down"], ["up"]):
        said = the_one_line(hive(tmp_path, *words, env=long), 2)
        assert "a socket's path may have 107 bytes" in said
        assert "set runtime_dir to a shorter path" in said


def test_a_runtime_directory_that_is_a_file_is_told_as_such(short: Path) -> None:
    (short / "file").touch()
    env = {"HIVE_RUNTIME_DIR": str(short / "file")}
    said = the_one_line(hive(short, "list", env=env), 3)
    assert "a file stands where a directory is needed; move it away, or set runtime_dir (HIVE_RUNTIME_DIR)" in said
    assert "a file stands where a directory is needed" in the_one_line(hive(short, "up", env=env), 4)


@pytest.mark.parametrize(
    ("folder", "cause"),
    [
        ("file", "a file stands where a directory is needed; move it away, or set state_dir (HIVE_STATE_DIR)"),
        ("file/deeper", "a file stands where a directory is needed"),
        ("/proc/hive", "there is no such file or directory"),
        ("/sys/hive", "permission is denied"),
    ],
)
def test_up_with_a_state_directory_that_cannot_be_says_why(tmp_path: Path, folder: str, cause: str) -> None:
    (tmp_path / "file").touch()
    said = the_one_line(hive(tmp_path, "up", env={"HIVE_STATE_DIR": str(tmp_path / folder)}), 1)
    assert cause in said
    assert "(HIVE_STATE_DIR)" in said


def test_up_with_a_directory_in_the_place_of_its_log_says_why(tmp_path: Path) -> None:
    (tmp_path / "s" / "daemon.log").mkdir(parents=True)
    assert "a directory stands where a file is needed" in the_one_line(hive(tmp_path, "up"), 1)


def test_up_in_a_temporary_folder_too_long_for_sockets_names_the_variable(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    said = the_one_line(hive(tmp_path, "up", env={"TMPDIR": str(folder)}), 1)
    assert "its name is too long; set TMPDIR to a shorter one" in said
    assert list(folder.iterdir()) == []


def test_a_demo_in_a_temporary_folder_too_long_for_sockets_names_the_variable(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    done = hive(tmp_path, "demo", "--once", "--json", env={"TMPDIR": str(folder)})
    assert done.returncode == 2
    assert "is too long for sockets; set TMPDIR to a shorter one" in json.loads(done.stdout)["error"]["message"]
    assert list(folder.iterdir()) == []


def test_up_passes_on_what_the_daemon_finds_wrong_with_a_setting(tmp_path: Path) -> None:
    said = the_one_line(hive(tmp_path, "up", env={"HIVE_DASHBOARD_PORT": "\x1b[31mred"}), 2)
    assert r"cannot use '\x1b[31mred' as dashboard_port: it must be a whole number from 0 to 65535" in said
    assert said.endswith("; change HIVE_DASHBOARD_PORT")


# -- a daemon that hangs up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", [True, False])
def test_a_daemon_that_hangs_up_is_not_running_whatever_the_kernel_calls_it(tmp_path: Path, reads: bool) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "host.sock"))
        door.listen()
        client = Client(str(tmp_path))
        connection, _ = door.accept()
        if reads:
            hang_up = threading.Thread(target=lambda: (connection.recv(1), connection.close()))
            hang_up.start()  # with bytes unread, so that the client gets a reset
        else:
            connection.close()
        with pytest.raises(Refusal, match="the daemon hung up; look at its log, then `hive up`") as caught:
            client.call("list")
        assert caught.value.code == "not_running"
        client.close()
        if reads:
            hang_up.join()


# -- whom a client believes -------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory to another user, which needs root")
@pytest.mark.parametrize(
    ("config", "mode", "trusted"),
    [
        ("runtime_dir = '{folder}'", 0o644, True),
        ("runtime_dir = '{folder}'", 0o664, False),  # others of a group could have written it
        ("runtime_dir = '/run/elsewhere'", 0o644, False),
        ("state_dir = '{folder}'", 0o644, False),
        ("runtime_dir = [", 0o644, False),
        (None, 0o644, False),
    ],
)
def test_a_directory_of_another_user_is_believed_when_roots_configuration_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str | None, mode: int, trusted: bool
) -> None:
    folder, file = tmp_path / "run", tmp_path / "config.toml"
    folder.mkdir()
    os.chown(folder, 4242, 4242)
    if config is not None:
        file.write_text(config.format(folder=folder))
        file.chmod(mode)
    monkeypatch.setattr("hive_core.cli.client.SYSTEM_CONFIG", str(file))
    monkeypatch.setattr("os.geteuid", lambda: 4343)
    with pytest.raises(Refusal) as caught:
        Client(str(folder))
    assert ("cannot trust" in caught.value.message) is not trusted
    assert trusted or caught.value.message.endswith(f"have root set runtime_dir in {file}")


# -- streams ----------------------------------------------------------------------------------------------------------


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `hive` stands for the command; its code is that of `hive`."""
    command = f"{sys.executable} -P -m hive_core.cli"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env = {**kept, "XDG_CONFIG_HOME": str(folder), "HIVE_RUNTIME_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    line = f'hive() {{ {command} "$@"; }}; {line}; exit ${{PIPESTATUS[0]}}'
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)


def test_nothing_that_an_agent_wrote_moves_or_hides_in_a_terminal_as_json_and_as_a_refusal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    wild = "\x9b31m \x1b]0;x\x07 \u202e \u2066 \U000e0041 ä ◆ \n\t"
    emit(Namespace(json=True), {wild: [wild]}, "")
    printed = capsys.readouterr().out.removesuffix("\n")
    assert not hides(printed)
    assert "ä ◆" in printed
    assert json.loads(printed) == {wild: [wild]}
    refuse(Refusal("conflict", f"cannot go on: {wild}"), True)
    out, err = capsys.readouterr()
    assert not hides(out + err)
    assert json.loads(out)["error"]["message"] == f"cannot go on: {wild}"


@pytest.mark.parametrize("words", ["--help", "--version", "down --help"])
def test_a_reader_that_goes_away_is_no_trouble(tmp_path: Path, words: str) -> None:
    done = shell(tmp_path, f"hive {words} | true")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_behind_standard_output_is_one_line(tmp_path: Path) -> None:
    for words in ("--version", "--help"):
        done = shell(tmp_path, f"hive {words} > /dev/full")
        assert (done.returncode, done.stderr) == (1, "hive: cannot go on: no space is left; make room\n")


def test_closed_streams_are_no_trouble(tmp_path: Path) -> None:
    for line, code in (("hive --version >&-", 0), ("hive list >&-", 3), ("hive list 2>&-", 3), ("hive list <&-", 3)):
        done = shell(tmp_path, line)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_a_message_on_standard_input_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    done = shell(tmp_path, r"printf 'caf\xe9' > m; hive send iris < m".replace(" m", f" {tmp_path}/m"))
    assert done.stderr == "hive: cannot take the message: byte 3 is not UTF-8; give it as UTF-8\n"
    assert done.returncode == 2


@pytest.mark.parametrize("count", [BODY_LIMIT_BYTES + 1, 3_000_000])
def test_a_message_on_standard_input_over_the_limit_of_a_body_is_refused_before_it_is_sent(
    tmp_path: Path, count: int
) -> None:
    done = shell(tmp_path, f"head -c {count} /dev/zero | tr '\\0' x | hive send iris")
    assert done.stderr.startswith(
        "hive: cannot take the message: it has 524,289 bytes or more and the limit is 524,288"
    )


def test_an_endless_standard_input_is_refused_all_the_same(tmp_path: Path) -> None:
    said = the_one_line(shell(tmp_path, "hive send iris < /dev/zero"), 2)
    assert "the limit is 524,288; shorten it" in said


def test_a_message_on_standard_input_of_just_the_limit_is_sent(tmp_path: Path) -> None:
    done = shell(tmp_path, f"hive send iris < <(head -c {BODY_LIMIT_BYTES} /dev/zero)")
    assert "no daemon answers" in the_one_line(done, 3)  # it got as far as that


# -- down, without a daemon -------------------------------------------------------------------------------------------


def test_down_without_a_daemon_and_without_agents_says_just_that(tmp_path: Path) -> None:
    for made in (False, True):
        if made:
            (tmp_path / "s" / "processes").mkdir(parents=True)
            (tmp_path / "s" / "processes" / "iris.status").touch()
        said = the_one_line(hive(tmp_path, "down"), 3)
        assert said.endswith("no daemon answers on " + str(tmp_path / "r" / "host.sock") + "; `hive up` starts one")


def test_down_whose_daemon_was_killed_names_the_agents_that_still_run_and_how_they_end(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "processes"
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as held:
        for name in ("iris", "damocles", "argus"):
            file = held.enter_context((folder / f"{name}.status").open("ab"))
            if name != "argus":
                fcntl.flock(file, fcntl.LOCK_EX)
        said = the_one_line(hive(tmp_path, "down"), 3)
    assert "agents of it still run (damocles, iris)" in said
    assert "orphan_grace_s (600 s" in said
    assert "`hive up`, then `hive down`, ends them at once" in said


def test_down_that_cannot_look_for_agents_says_that_some_may_run(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "processes").write_text("not a folder")
    said = the_one_line(hive(tmp_path, "down"), 3)
    assert "agents of it may still run" in said
    assert "`hive up`, then `hive down`, ends them at once" in said
