"""The daemon as a process: its start, its end, what it refuses, and what survives a SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hive_core.protocol.refusal import Refusal
from tests.daemons import WITHIN_S, open_daemon

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def hive(daemon_runtime: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hive_core.cli", *words],
        env={**os.environ, "HIVE_RUNTIME_DIR": str(daemon_runtime)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_manager_is_there_on_every_start() -> None:
    with open_daemon() as daemon:
        assert [agent["name"] for agent in daemon.start().call("list")["agents"]] == ["hm1nd"]
        assert daemon.stop() == 0
        assert [agent["name"] for agent in daemon.start().call("list")["agents"]] == ["hm1nd"]


def test_a_message_survives_sigkill_the_moment_send_has_answered() -> None:
    with open_daemon() as daemon:
        client = daemon.start()
        sent = client.call("send", to="hm1nd", body="do not lose me")["message"]
        daemon.kill()
        assert daemon.start().call("message", message=sent)["body"] == "do not lose me"


def test_a_second_daemon_on_the_same_state_is_refused_and_told_who_holds_it() -> None:
    with open_daemon() as daemon:
        daemon.start()
        first = daemon.process
        with pytest.raises(Refusal, match=rf"a daemon \(pid {first.pid}\) runs on it"):
            daemon.start()
        assert daemon.process is first


def test_a_busy_dashboard_port_is_named_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with open_daemon(f"--dashboard-port={port}") as daemon, pytest.raises(Refusal) as refused:
            daemon.start()
        assert f"127.0.0.1:{port}" in refused.value.message
        assert "set dashboard_port" in refused.value.message


def test_a_runtime_directory_that_is_too_deep_is_refused_before_anything_is_made() -> None:
    with open_daemon() as daemon:
        daemon.runtime = daemon.folder / ("x" * 80)
        with pytest.raises(Refusal, match="set runtime_dir to a shorter path"):
            daemon.start()
        assert not daemon.state.exists()


def test_an_unknown_setting_is_refused_by_name() -> None:
    with open_daemon(HIVE_DASHBORD_PORT="7000") as daemon, pytest.raises(Refusal, match="HIVE_DASHBORD_PORT"):
        daemon.start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean_and_leaves_no_socket_of_the_operator(number: signal.Signals) -> None:
    with open_daemon() as daemon:
        daemon.start()
        daemon.process.send_signal(number)
        assert daemon.process.wait(WITHIN_S) == 0
        assert not (daemon.runtime / "host.sock").exists()


def test_sockets_and_directories_are_closed_to_others() -> None:
    with open_daemon() as daemon:
        client = daemon.start()
        client.call("send", to="hm1nd", body="hello")
        daemon.events(client, lambda event: event["kind"] == "message_sent")
        assert (daemon.runtime.stat().st_mode & 0o777) == 0o700
        assert (daemon.state.stat().st_mode & 0o777) == 0o700
        for path in daemon.runtime.rglob("*.sock"):
            assert path.stat().st_mode & 0o117 == 0, path
        assert ((daemon.state / "hive.sqlite").stat().st_mode & 0o777) == 0o600


def test_logs_are_json_lines_when_asked() -> None:
    with open_daemon("--log-format=json") as daemon:
        daemon.start()
        daemon.stop()
        lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
        assert any("ready" in line["message"] and line["level"] == "info" for line in lines)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["list"], 0),
        (["list", "--json"], 0),
        (["--json", "list"], 0),
        ([], 0),
        (["pending", "--json"], 0),
        (["events", "--json"], 0),
        (["inbox"], 0),
        (["dashboard"], 0),
        (["send", "hm1nd", "hello"], 0),
        (["send", "nobody", "hello"], 3),
        (["send", "../etc", "hello"], 2),
        (["send", "x" * 300, "hello"], 2),
        (["send", "hm1nd", " "], 2),
        (["show", "99"], 3),
        (["approve", "99"], 3),
        (["approve", "x"], 2),
        (["nonsense"], 2),
    ],
)
def test_the_command_line_ends_with_the_code_of_what_happened(words: list[str], code: int, standing: Path) -> None:
    done = hive(standing, *words)
    assert done.returncode == code, done.stderr
    if "--json" in words:
        assert [json.loads(line) for line in done.stdout.splitlines()]
    if code:
        assert done.stderr.strip()
        assert "Traceback" not in done.stderr


def shell(runtime: Path, line: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which `hive` is the command; its code is that of the first `hive`."""
    line = f'hive() {{ {sys.executable} -m hive_core.cli "$@"; }}; {line}; exit ${{PIPESTATUS[0]}}'
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env = {**kept, "HIVE_RUNTIME_DIR": str(runtime)}
    return subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "line",
    [
        "hive list | true",
        "hive list | head -1",
        "hive events --json | head -1",
        "hive list >&-",
        "hive list >&- 2>&- <&-",
        "PYTHONIOENCODING=ascii hive send hm1nd café; PYTHONIOENCODING=ascii hive",
    ],
)
def test_streams_that_take_nothing_more_or_not_everything_are_no_trouble(standing: Path, line: str) -> None:
    done = shell(standing, line)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_message_on_a_closed_standard_input_is_an_empty_one(standing: Path) -> None:
    done = shell(standing, "hive send hm1nd <&-")
    assert (done.returncode, done.stderr) == (2, "hive: cannot take the message: it is empty\n")


def test_a_file_in_the_place_of_a_directory_is_named_and_nothing_else_is_made() -> None:
    with open_daemon() as daemon:
        daemon.runtime.write_text("precious")
        with pytest.raises(Refusal, match="a file stands where a directory is needed; move it away, or set"):
            daemon.start()
        assert daemon.runtime.read_text() == "precious"
        assert not (daemon.state / "hive.sqlite").exists()


def test_after_a_prompt_that_was_no_good_the_next_start_is_well() -> None:
    with open_daemon() as daemon:
        prompt = daemon.folder / "prompt"
        prompt.write_text("x" * 100_000)
        good = daemon._flags
        daemon._flags = (*good, f"--manager-prompt={prompt}")
        with pytest.raises(Refusal, match="it has 100,000 bytes and the limit is 49,152"):
            daemon.start()
        daemon._flags = good
        assert [agent["name"] for agent in daemon.start().call("list")["agents"]] == ["hm1nd"]


def test_without_a_daemon_the_command_line_says_how_to_start_one(tmp_path: Path) -> None:
    done = hive(tmp_path, "list")
    assert done.returncode == 3
    assert "`hive up` starts one" in done.stderr


@pytest.fixture(scope="module")
def standing() -> object:
    with open_daemon() as daemon:
        daemon.start()
        yield daemon.runtime
