"""`hive doctor` on machines with one thing wrong: that thing is named with the way out, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli.doctor import OLDEST_PYTHON, check_python
from hive_core.version import __version__
from tests.needs import ROOT
from tests.starters import run_forked

SECRET = "sk-ant-api03-not-to-be-printed"


class Machine:
    """Directories, variables and a PATH of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state, self.runtime = folder / "s", folder / "r"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HIVE_", "ANTH", "CLAUDE"))},
            "HOME": str(folder),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "HIVE_STATE_DIR": str(self.state),
            "HIVE_RUNTIME_DIR": str(self.runtime),
            "HIVE_DASHBOARD_PORT": "0",
            "ANTHROPIC_API_KEY": SECRET,
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "hive_core.cli", "doctor", *words]
        options = {"capture_output": True, "text": True, "timeout": 60, "cwd": self.folder, **more}
        done: subprocess.CompletedProcess[str] = subprocess.run(command, env=self.environment, **options)
        return done

    def look(self, check: str) -> tuple[str, str]:
        """The status and the message of one check, after the whole was seen to hang together."""
        before = sorted(self.folder.iterdir())
        with tempfile.TemporaryFile("w+") as errors:
            code, said = run_forked(
                "import sys; from hive_core.cli import main; sys.exit(main())",
                "doctor",
                "--json",
                modules=("hive_core.cli", "hive_core.cli.checks"),
                env=self.environment,
                cwd=self.folder,
                stderr=errors,
            )
            errors.seek(0)
            assert errors.read() == ""
        told = json.loads(said)
        assert SECRET not in said
        assert sorted(self.folder.iterdir()) == before
        troubled = any(one["status"] == "trouble" for one in told["checks"])
        assert (told["ok"], code) == (not troubled, int(troubled))
        (found,) = [one for one in told["checks"] if one["check"] == check]
        return found["status"], found["message"]


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:
        yield Machine(Path(folder))


def test_each_check_is_one_line_that_begins_with_its_status(machine: Machine) -> None:
    done = machine.run()
    lines = done.stdout.splitlines()
    assert len(lines) >= 10
    assert all(re.fullmatch(r"(ok {6}|warning |trouble ) \w[\w' ]{17} \S.*", line) for line in lines), done.stdout
    assert "ok       python             3." in done.stdout
    assert SECRET not in done.stdout
    assert done.stderr == ""


def test_rules_of_the_policy_that_can_never_allow_anything_are_named(machine: Machine) -> None:
    config = machine.folder / "config" / "hyperhive" / "config.toml"
    config.parent.mkdir(parents=True)
    one = "[[policy]]\nname = 'mine'\nkind = 'apply_commit'\nagents = '*'\nrequested_by = '*'\nonly = ['prompt']\n"
    config.write_text(one)
    status, message = machine.look("policy")
    assert (status, "1 rule let" in message) == ("ok", True)
    config.write_text(one.replace("prompt", "promt").replace("'*'", "['iris']", 1))
    found = json.loads(machine.run("--json").stdout)["checks"]
    said = [(one["status"], one["message"]) for one in found if one["check"] == "policy"]
    assert [status for status, _ in said] == ["warning", "warning"]
    assert "mine: only names promt, of which no effect has a line" in said[0][1]
    assert "mine: agents names iris, which no agent is called" in said[1][1]
    config.write_text(one.replace("only", "olny"))
    status, message = machine.look("configuration")
    assert (status, "rule 1: only: it is missing; change line 1 of" in message) == ("trouble", True)


def test_what_is_looked_at_is_shown_on_a_terminal_and_wiped_away(machine: Machine) -> None:
    ours, theirs = os.openpty()
    try:
        done = machine.run("--json", capture_output=False, stdout=subprocess.PIPE, stderr=theirs)
        assert select.select([ours], [], [], 0)[0]
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "looking at the configuration …" in shown
    assert "looking at sqlite …" in shown
    assert shown.endswith("\r\x1b[K")
    assert json.loads(done.stdout)["checks"]


# -- this machine -----------------------------------------------------------------------------------------------------


def test_a_python_that_is_too_old_is_trouble() -> None:
    found = check_python((3, 10))
    assert found.status == "trouble"
    assert "is too old; install 3.11 or newer" in found.message
    wanted = ".".join(map(str, OLDEST_PYTHON))
    assert f'requires-python = ">={wanted}"' in (ROOT / "pyproject.toml").read_text()


def test_a_python_without_the_libraries_is_trouble_and_nothing_else_is_looked_at(machine: Machine) -> None:
    # -S: without the folder that they are installed in.
    command = [sys.executable, "-S", "-P", "-m", "hive_core.cli", "doctor", "--json"]
    done = subprocess.run(command, env=machine.environment, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout)["checks"][-1]
    assert (done.returncode, found["check"], found["status"]) == (1, "libraries", "trouble")
    assert found["message"].startswith("No module named")
    assert found["message"].endswith("`bin/setup run` installs them all")


def test_git_that_is_missing_or_broken_is_trouble(machine: Machine) -> None:
    programs = machine.folder / "bin"
    programs.mkdir()
    machine.environment["PATH"] = str(programs)
    assert machine.look("git") == ("trouble", "not installed: `apt-get install git` (or your system's equivalent)")
    (programs / "git").write_text("#!/bin/sh\necho no libz >&2\nexit 127\n")
    (programs / "git").chmod(0o700)
    assert machine.look("git") == ("trouble", "it does not run (no libz); install it anew")


def test_a_machine_without_nixos_containers_is_told_what_they_need(machine: Machine) -> None:
    machine.environment["HIVE_SANDBOX"] = "nixos-container"
    status, message = machine.look("sandbox")
    assert status == "trouble"
    assert message.startswith(("nixos-container is not found: enable it with", "NixOS containers need root: "))


def test_a_machine_without_bubblewrap_is_in_trouble_unless_its_agents_are_rehearsals(machine: Machine) -> None:
    programs = machine.folder / "bin"
    programs.mkdir()
    (programs / "git").symlink_to(str(shutil.which("git")))
    machine.environment["PATH"] = str(programs)
    status, message = machine.look("sandbox")
    assert (status, message[:30]) == ("trouble", "bubblewrap is not installed: `")
    machine.environment["HIVE_DEFAULT_PROGRAM"] = "rehearsal"
    assert machine.look("sandbox") == ("warning", message)
    machine.environment["HIVE_UNSAFE_NO_SANDBOX"] = "true"
    assert machine.look("sandbox")[0] == "warning"
    assert machine.run("--json").returncode == 0


def test_a_proxy_that_does_not_start_is_told_of_with_its_last_word(machine: Machine) -> None:
    assert machine.look("proxy")[0] == "ok"
    broken = machine.folder / "broken"
    (broken / "h11").mkdir(parents=True)
    (broken / "sitecustomize.py").write_text(
        f"import sys\nif 'hive_core.egress' in sys.orig_argv: sys.path.insert(0, {str(broken)!r})\n"
        f"elif {str(broken)!r} in sys.path: sys.path.remove({str(broken)!r})\n"
    )
    (broken / "h11" / "__init__.py").write_text("raise ImportError('h11 is of another processor')\n")
    machine.environment["PYTHONPATH"] = f"{broken}:{ROOT}"
    status, message = machine.look("proxy")
    assert (status, message) == (
        "warning",
        "it does not run (ImportError: h11 is of another processor); agents reach their models alone until that is "
        "mended",
    )


# -- where the hive is kept -------------------------------------------------------------------------------------------


def test_a_setting_that_cannot_be_is_trouble_and_nothing_else_is_looked_at(machine: Machine) -> None:
    machine.environment["HIVE_DASHBOARD_PORT"] = "seven"
    status, message = machine.look("configuration")
    assert (status, message[:33]) == ("trouble", "cannot use 'seven' as dashboard_p")
    assert len(json.loads(machine.run("--json").stdout)["checks"][3:]) == 1


def test_a_runtime_directory_too_long_for_its_sockets_is_trouble(machine: Machine) -> None:
    machine.environment["HIVE_RUNTIME_DIR"] = f"/{'x' * 120}"
    assert "set runtime_dir to a shorter path" in machine.look("configuration")[1]


@pytest.mark.parametrize(("check", "setting"), [("state directory", "state_dir"), ("runtime directory", "runtime_dir")])
def test_a_directory_that_cannot_be_used_is_trouble(machine: Machine, check: str, setting: str) -> None:
    variable = f"HIVE_{setting.upper()}"
    assert machine.look(check)[0] == "ok"
    folder = Path(machine.environment[variable])
    folder.mkdir()
    folder.chmod(0o777)
    status, message = machine.look(check)
    assert (status, "nobody else may write in it" in message) == ("trouble", True)
    folder.rmdir()
    folder.touch()
    status, message = machine.look(check)
    assert status == "trouble"
    told = "a file stands where a directory is needed; move it away"
    assert message == f"cannot use {folder}: {told}, or set {setting} to another"
    machine.environment[variable] = "/sys/hive"
    assert machine.look(check)[0] == "trouble"


def test_a_database_of_a_newer_hyperhive_is_trouble_and_is_left_alone(machine: Machine) -> None:
    machine.state.mkdir(mode=0o700)
    database = machine.state / "hive.sqlite"
    made = machine.folder / "made.sqlite"
    with contextlib.closing(sqlite3.connect(made)) as connection:
        connection.execute(f"PRAGMA application_id = {0x68697665}")
        connection.execute("PRAGMA user_version = 9999")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (x)")
        # As a daemon leaves it that was killed.
        shutil.copy(made, database)
        shutil.copy(f"{made}-wal", f"{database}-wal")
    before = {path.name: path.read_bytes() for path in machine.state.iterdir()}
    assert len(before) == 2
    status, message = machine.look("state directory")
    assert (status, "a newer hyperhive wrote it" in message) == ("trouble", True)
    assert {path.name: path.read_bytes() for path in machine.state.iterdir()} == before


# -- ports ------------------------------------------------------------------------------------------------------------


def test_a_port_of_the_dashboard_that_is_taken_is_trouble_and_one_of_a_page_a_warning(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.socket() as another:
        another.bind(("127.0.0.1", 0))
        taken, free = one.getsockname()[1], another.getsockname()[1]
        another.close()
        machine.environment.update(HIVE_DASHBOARD_PORT=str(taken), HIVE_AGENT_PORTS=f"{free}-{free}")
        status, message = machine.look("ports")
        assert status == "trouble"
        assert "another program uses the port; stop it, or set dashboard_port to another" in message
        machine.environment.update(HIVE_DASHBOARD_PORT=str(free), HIVE_MANAGER_PORT=str(taken))
        status, message = machine.look("ports")
        assert status == "warning"
        assert f"{taken} of the agents' pages" in message


# -- what agents need -------------------------------------------------------------------------------------------------


def test_a_credential_is_told_by_its_place_alone(machine: Machine) -> None:
    assert machine.look("credential") == ("ok", "ANTHROPIC_API_KEY")
    del machine.environment["ANTHROPIC_API_KEY"]
    status, message = machine.look("credential")
    assert (status, message[:20]) == ("trouble", "none: `hive login`, ")
    (machine.state / "credentials").mkdir(mode=0o700, parents=True)
    machine.state.chmod(0o700)
    key = machine.state / "credentials" / "anthropic-api-key"
    key.write_text(SECRET)
    key.chmod(0o644)
    assert machine.look("credential") == ("warning", f"{key}, which others may read; `chmod 600 {key}`")
    key.chmod(0o600)
    assert machine.look("credential") == ("ok", str(key))
    key.write_text(f"{SECRET} twice")
    status, message = machine.look("credential")
    assert (status, "it must be one word of printable ASCII" in message) == ("trouble", True)


def test_a_named_credential_that_others_may_read_is_told_beside_the_default(machine: Machine) -> None:
    folder = machine.state / "credentials"
    folder.mkdir(mode=0o700, parents=True)
    machine.state.chmod(0o700)
    for name, mode in (("open", 0o644), ("work", 0o600)):
        key = folder / f"{name}.api-key"
        key.write_text(SECRET)
        key.chmod(mode)
    told = json.loads(machine.run("--json").stdout)["checks"]
    found = [(one["status"], one["message"]) for one in told if one["check"] == "credential"]
    assert [status for status, _ in found] == ["ok", "warning"]
    assert f"chmod 600 {folder}/open.api-key" in found[1][1]


def test_claude_that_is_missing_or_cannot_run_is_trouble(machine: Machine) -> None:
    program = machine.folder / "claude"
    program.touch()
    machine.environment["HIVE_CLAUDE"] = str(program)
    assert machine.look("claude") == ("trouble", f"{program} is not an executable; change the setting")
    program.chmod(0o700)
    status, message = machine.look("claude")
    assert (status, f"cannot start {program}: Exec format error; install the version" in message) == ("trouble", True)
    machine.environment["HIVE_DEFAULT_PROGRAM"] = "rehearsal"
    assert machine.look("claude") == ("warning", message)


# -- a daemon that runs -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def answering(machine: Machine, answer: bytes | None) -> Iterator[None]:
    """Somebody on host.sock who gives every connection this answer, or none."""
    machine.runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as ear, contextlib.ExitStack() as connections:
        ear.bind(str(machine.runtime / "host.sock"))
        ear.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = connections.enter_context(ear.accept()[0])
                    if answer is not None and connection.recv(1 << 16):
                        connection.sendall(answer + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ear.shutdown(socket.SHUT_RDWR)
            thread.join()


def status_of(machine: Machine, **changes: Any) -> bytes:
    told = {
        "version": __version__,
        "state_dir": str(machine.state),
        "dashboard": "http://127.0.0.1:7000",
        "credential": None,
        "credential_missing": "it was started without one",
        "claude": None,
        "claude_chosen": None,
        **changes,
    }
    return json.dumps({"v": 1, "ok": True, "result": told}).encode()


def test_of_a_daemon_that_runs_the_version_and_what_it_found_count(machine: Machine) -> None:
    machine.environment["HIVE_DASHBOARD_PORT"] = "1"
    with answering(machine, status_of(machine)):
        assert machine.look("daemon") == ("ok", f"{__version__} runs, http://127.0.0.1:7000")
        assert machine.look("ports") == ("ok", "the daemon that runs has http://127.0.0.1:7000")
        assert machine.look("credential") == ("trouble", "it was started without one")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to another user, which needs root")
def test_nobody_is_told_to_take_another_users_hive_from_him(machine: Machine) -> None:
    machine.state.mkdir(mode=0o700)
    os.chown(machine.state, 65533, 65533)
    status, message = machine.look("state directory")
    assert (status, "chown" in message) == ("trouble", False)
    assert message.endswith("; do this as uid 65533, or set state_dir or runtime_dir to another")


def test_a_daemon_of_another_version_or_another_hive_is_a_warning(machine: Machine) -> None:
    with answering(machine, status_of(machine, version="0.0.1")):
        status, message = machine.look("daemon")
        assert status == "warning"
        assert message.startswith(f"the one that runs is 0.0.1 and this command {__version__}; `hive down; hive up`")
    (machine.runtime / "host.sock").unlink()
    machine.runtime.rmdir()
    with answering(machine, status_of(machine, state_dir="/elsewhere")):
        status, message = machine.look("daemon")
        assert status == "warning"
        assert message.startswith(f"the one that runs keeps its state in /elsewhere, not in {machine.state}")


def test_a_daemon_that_does_not_answer_is_trouble(machine: Machine) -> None:
    with answering(machine, None):
        status, message = machine.look("daemon")
        assert (status, message[:43]) == ("trouble", "one runs and did not answer within 5 s; loo")
