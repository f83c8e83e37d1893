"""The whole harness as the host starts it, with a rehearsal as its program and the test as its host."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from hive_agent.link import HostLink
from hive_agent.own_command import own_command
from hive_agent.projects import Projects
from hive_agent.runner import Seat, make_runner
from hive_agent.serve import take_turn
from tests.git_socket import git_socket
from tests.harness_host import HarnessConnection, HarnessHost, a_lease, open_host
from tests.processes import PATIENCE_S, PROGRAMS, look_until
from tests.scripted_tools import ScriptedTools
from tests.unit.test_agent_connect import open_proxy

Harnesses = Any


class Harness:
    def __init__(self, folder: Path, *arguments: str, module: str = "hive_agent", fd: int | None = None) -> None:
        main = Path(own_command()[-1]).parents[1] / module / "__main__.py"
        arguments = (*arguments, "--life-fd", str(fd)) if fd is not None else arguments
        self._said = folder / "stderr"
        with self._said.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(main), "serve", "--run", str(folder), "--state", str(folder), *arguments],
                env={"HOME": str(folder), "PATH": PROGRAMS},
                stderr=stderr,
                pass_fds=() if fd is None else (fd,),
            )

    async def ended(self) -> tuple[int, str]:
        """The exit code and what it said on stderr."""
        await wait_end(self.process.pid)
        return self.process.wait(), self._said.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    running: list[Harness] = []

    def start(*arguments: str, **options: Any) -> Harness:
        running.append(Harness(tmp_path, "--sandbox", "bwrap", *arguments, **options))
        return running[-1]

    with ScriptedTools(tmp_path / "mcp.sock"):
        yield start
        for harness in running:
            harness.close()


def follow(*steps: dict[str, Any]) -> str:
    return f"```rehearsal\n{json.dumps([{'do': list(steps)}])}\n```"


async def welcomed(host: HarnessHost) -> HarnessConnection:
    connection = await host.accept()
    await connection.welcome()
    return connection


async def wait_end(pid: int, limit_s: float = PATIENCE_S) -> None:
    """Wait until a process, which need not be a child, has ended. Raises trio.TooSlowError."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with trio.fail_after(limit_s):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        os.close(pidfd)


class Gate:
    """A program stops here until the test lets it on; what it wrote on its way in is what `reached` returns."""

    def __init__(self, folder: Path) -> None:
        self._in, self._out = folder / "gate-in", folder / "gate-out"
        os.mkfifo(self._in)
        os.mkfifo(self._out)
        self.step = {"run": f"echo $$ > {self._in}; read _ < {self._out}"}

    async def reached(self) -> int:
        """Wait for the program; returns the process id of its shell."""
        with trio.fail_after(PATIENCE_S):
            return int(await trio.to_thread.run_sync(self._in.read_text, abandon_on_cancel=True))

    async def open(self) -> None:
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(self._out.write_text, "\n", abandon_on_cancel=True)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


async def test_a_turn_is_run_streamed_and_acked_and_the_next_goes_on_in_its_session(
    start: Harnesses, tmp_path: Path
) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        fence = await connection.give(a_lease(1, prompt=follow({"say": "first"})))
        lines, ack = await connection.rest_of_turn()
        assert [json.loads(line)["type"] for line in lines] == ["system", "assistant", "result"]
        assert (ack["turn"], ack["fence"], ack["outcome"], ack["error"]) == (1, fence, "done", None)
        assert ack["usage"]["num_turns"] == 1
        lines, again = await connection.take_turn(a_lease(2, session=ack["session"], prompt=follow({"say": "second"})))
        assert again["session"] == ack["session"]
        assert json.loads(lines[-1])["result"] == "second"
        await connection.give({"stop": True})
        assert await harness.ended() == (0, "")


async def test_what_a_program_runs_finds_its_way_out_through_egress_sock(start: Harnesses, tmp_path: Path) -> None:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nthrough")

    fetch = f"{sys.executable} -c \"import urllib.request as r; print(r.urlopen('http://plain.example/x').read())\""
    async with open_host(tmp_path) as host:
        with open_proxy(tmp_path / "egress.sock", answer) as heads:
            start()
            connection = await welcomed(host)
            lines, ack = await connection.take_turn(a_lease(1, prompt=follow({"run": fetch})))
    assert ack["outcome"] == "done"
    assert heads[0].startswith(b"GET http://plain.example/x HTTP/1.1")
    assert "b'through'" in "".join(lines)


async def test_in_the_hosts_network_nothing_is_led_to_the_proxy_and_nobody_else_is_either(
    start: Harnesses, tmp_path: Path
) -> None:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nthrough")

    async with open_host(tmp_path) as host:
        with open_proxy(tmp_path / "egress.sock", answer) as heads:
            start("--network", "host")
            connection = await welcomed(host)
            lines, ack = await connection.take_turn(a_lease(1, prompt=follow({"run": "env; echo that is all"})))
    assert (ack["outcome"], heads) == ("done", [])
    said = "".join(lines)
    assert "that is all" in said
    assert "proxy" not in said.lower()


async def test_a_check_starts_the_program_sees_its_tools_and_leaves_neither_process_nor_session(
    start: Harnesses, tmp_path: Path
) -> None:
    check = {"check": "k", "settings": a_lease(1)["settings"], "credential": "api_key"}
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await host.accept()
        assert (await connection.welcome())["checks"] is True
        await connection.give({"check": check})
        told = await connection.expect("checked")
        assert (told["check"], told["ok"], told["error"]) == ("k", True, "")
        await connection.answer(told, counted=True)
        assert not list(tmp_path.rglob("rehearsal-sessions"))
        missing = {**check, "settings": {**check["settings"], "program": "claude"}, "check": "l"}
        await connection.give({"check": missing})
        told = await connection.expect("checked")
        assert (told["check"], told["ok"]) == ("l", False)
        assert "this host has no claude program" in told["error"]
        await connection.refuse(told, "usage", "nobody asked")
        _, ack = await connection.take_turn(a_lease(2, prompt=follow({"say": "hello"})))
        assert ack["outcome"] == "done"
        await connection.give({"stop": True})
        assert (await harness.ended())[0] == 0


# -- one process for many turns ---------------------------------------------------------------------------------------

TELL_PID = {"run": "echo $PPID"}


def told_pid(lines: list[str]) -> str:
    (told,) = (json.loads(line)["message"]["content"][0] for line in lines if json.loads(line)["type"] == "user")
    pid: str = told["content"]
    return pid


async def two_turns(connection: HarnessConnection, *, later: dict[str, Any], **settings: Any) -> tuple[str, str]:
    """Two turns of one session, the second with other settings: the process of each."""
    given = {"prompt": follow(TELL_PID), **settings}
    lines, ack = await connection.take_turn(a_lease(1, **given))
    again, last = await connection.take_turn(a_lease(2, session=ack["session"], **{**given, **later}))
    assert (ack["outcome"], last["outcome"], last["session"]) == ("done", "done", ack["session"])
    return told_pid(lines), told_pid(again)


async def test_one_process_takes_many_turns(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        start()
        first, second = await two_turns(await welcomed(host), later={})
    assert first == second


@pytest.mark.parametrize(
    ("settings", "later"),
    [
        ({"turns": "cold"}, {}),
        ({"warm_turns": 1}, {}),
        ({"warm_memory_mib": 1}, {}),
        ({}, {"model": "opus"}),
        ({}, {"tools": ["Read"]}),
        ({}, {"prompt": follow(TELL_PID) + "\nAnd be kind."}),
    ],
    ids=["cold", "turns", "memory", "model", "tools", "prompt"],
)
async def test_a_turn_has_a_process_of_its_own_where_the_one_before_does_not_fit(
    start: Harnesses, tmp_path: Path, settings: dict[str, Any], later: dict[str, Any]
) -> None:
    async with open_host(tmp_path) as host:
        start()
        first, second = await two_turns(await welcomed(host), later=later, **settings)
    assert first != second


async def test_a_process_that_nobody_needs_ends_after_its_idle_time_with_all_that_it_started(
    start: Harnesses, tmp_path: Path
) -> None:
    leave = {"run": "setsid sh -c 'echo $$ > left; exec sleep 600' >/dev/null 2>&1 & while ! test -s left; do :; done"}
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        lines, ack = await connection.take_turn(a_lease(prompt=follow(TELL_PID, leave), warm_idle_s=1))
        assert ack["outcome"] == "done"
        pid = json.loads(lines[2])["message"]["content"][0]["content"]
        await wait_end(int(pid))
        await wait_end(int((tmp_path / "left").read_text()))


async def test_another_session_gets_another_process(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        lines, ack = await connection.take_turn(a_lease(1, prompt=follow(TELL_PID)))
        again, other = await connection.take_turn(a_lease(2, prompt=follow(TELL_PID)))
    assert told_pid(lines) != told_pid(again)
    assert ack["session"] != other["session"]


async def test_a_process_that_died_between_two_turns_costs_the_next_one_nothing(
    start: Harnesses, tmp_path: Path
) -> None:
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        lines, ack = await connection.take_turn(a_lease(1, prompt=follow(TELL_PID)))
        pid = int(told_pid(lines))
        os.kill(pid, signal.SIGKILL)
        again, last = await connection.take_turn(a_lease(2, session=ack["session"], prompt=follow(TELL_PID)))
    assert last["outcome"] == "done"
    assert told_pid(again) != str(pid)


async def test_a_turn_that_nobody_asked_for_ends_the_process_and_is_shown_with_the_next(
    start: Harnesses, tmp_path: Path
) -> None:
    """A program that wakes itself would spend money behind everybody's back."""
    program = tmp_path / "program"
    init = '{"type":"system","subtype":"init","session_id":"s","mcp_servers":[{"name":"hive","status":"connected"}]}'
    program.write_text(
        f'#!/bin/sh\nread _; echo \'{init}\'; echo \'{{"type":"result","is_error":false}}\'\n'
        f"test -e second && {{ read _; exit; }}\necho $$ > first; sleep 0.1; echo '{init}'; exec sleep 600\n"
    )
    program.chmod(0o755)
    async with open_host(tmp_path) as host:
        start("--claude", str(program))
        connection = await welcomed(host)
        await connection.take_turn(a_lease(1, program="claude"))
        await wait_end(int((tmp_path / "first").read_text()))
        (tmp_path / "second").touch()
        lines, ack = await connection.take_turn(a_lease(2, program="claude", session="s"))
    assert ack["outcome"] == "done"
    assert "unasked_turn" in [json.loads(line).get("subtype") for line in lines]
    assert [one["op"] for one in connection.told] == ["background", "unasked_turn"]


# -- how turns end ----------------------------------------------------------------------------------------------------


async def test_a_lost_session_is_replaced_in_the_same_turn(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        lost = "0bad5e55-0000-4000-8000-000000000000"
        lines, ack = await connection.take_turn(a_lease(session=lost, prompt=follow({"say": "anew"})))
    told = [json.loads(line) for line in lines]
    assert {"type": "hive", "subtype": "session_lost", "session": lost} in told
    assert told[-1]["result"] == "anew"
    assert ack["outcome"] == "done"
    assert ack["session"] not in (None, lost)


async def test_a_program_that_crashes_has_failed_with_its_last_words(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        _, ack = await connection.take_turn(a_lease(prompt=follow({"exit": 7})))
        assert (ack["outcome"], ack["error"]) == ("failed", "the program ended with exit code 7 before its result")
        _, ack = await connection.take_turn(a_lease(2, prompt=follow({"say": "the next one is not harmed"})))
        assert ack["outcome"] == "done"


async def test_what_the_program_says_on_stderr_is_a_line_of_the_stream(start: Harnesses, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nprintf trouble >&2\nprintf 'not json'\nexit 1\n")
    program.chmod(0o755)
    async with open_host(tmp_path) as host:
        start("--claude", str(program))
        lines, ack = await (await welcomed(host)).take_turn(a_lease(program="claude"))
    assert {json.loads(line)["subtype"] for line in lines} == {"stderr", "malformed"}
    assert (ack["outcome"], ack["error"]) == ("failed", "trouble")


@pytest.mark.parametrize("arguments", [[], ["--claude", "/nowhere/claude"]])
async def test_a_missing_program_is_not_the_turns_fault(start: Harnesses, tmp_path: Path, arguments: list[str]) -> None:
    async with open_host(tmp_path) as host:
        start(*arguments)
        _, ack = await (await welcomed(host)).take_turn(a_lease(program="claude"))
    assert ack["outcome"] == "waiting"
    assert "cannot start" in ack["error"]


async def test_nothing_that_a_turn_started_outlives_its_process(start: Harnesses, tmp_path: Path) -> None:
    # A session of its own, and its parent gone: the way a program's shell tools leave processes behind.
    leave = {"run": "setsid sh -c 'echo $$ > left; exec sleep 600' >/dev/null 2>&1 & while ! test -s left; do :; done"}
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        _, ack = await connection.take_turn(a_lease(prompt=follow(leave), turns="cold"))
        assert ack["outcome"] == "done"
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "left").read_text()), 0)


async def test_a_command_in_the_background_outlives_its_turns_process_and_ends_with_the_harness(
    start: Harnesses, tmp_path: Path
) -> None:
    begin = {"tool": "run_in_background", "args": {"command": "echo $$ > pid; exec sleep 600"}, "save": "begun"}
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        _, ack = await connection.take_turn(a_lease(1, prompt=follow(begin), turns="cold"))
        assert ack["outcome"] == "done"
        await connection.take_turn(a_lease(2, prompt=follow({"say": "next"}), turns="cold"))
        assert [(one["state"], one.get("turn")) for one in connection.told] == [("none", None), ("running", 1)]
        pid = int(await trio.to_thread.run_sync(look_until, lambda: (tmp_path / "pid").read_text()))
        os.kill(pid, 0)
        harness.process.terminate()
        assert (await harness.ended())[0] == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_child_that_holds_the_pipes_does_not_hold_the_turn(start: Harnesses, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nsleep 600 &\nexit 3\n")
    program.chmod(0o755)
    async with open_host(tmp_path) as host:
        start("--claude", str(program))
        begin = time.monotonic()
        _, ack = await (await welcomed(host)).take_turn(a_lease(program="claude"))
    assert ack["outcome"] == "failed"
    assert time.monotonic() - begin < PATIENCE_S


async def test_sigterm_while_waiting_ends_at_once(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        await (await welcomed(host)).expect("lease")
        harness.process.terminate()
        assert await harness.ended() == (0, "")


async def test_sigterm_in_a_turn_ends_after_its_ack(start: Harnesses, tmp_path: Path, gate: Gate) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow(gate.step, {"say": "finished"})))
        await gate.reached()
        harness.process.terminate()
        await gate.open()
        lines, ack = await connection.rest_of_turn()
        assert json.loads(lines[-1])["result"] == "finished"
        assert ack["outcome"] == "done"
        assert await harness.ended() == (0, "")


async def test_an_ack_that_says_stop_ends_the_harness(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow({"say": "x"})))
        await connection.rest_of_turn(stop=True)
        assert await harness.ended() == (0, "")


async def test_a_host_killed_in_a_turn_is_succeeded_by_one_that_gets_all_of_it(
    start: Harnesses, tmp_path: Path, gate: Gate
) -> None:
    start()
    async with open_host(tmp_path) as host:
        connection = await welcomed(host)
        fence = await connection.give(a_lease(7, prompt=follow({"say": "one"}, gate.step, {"say": "two"})))
        await gate.reached()
    await gate.open()
    async with open_host(tmp_path) as host:
        connection = await host.accept()
        hello = await connection.welcome()
        assert hello["fences"] == [fence]
        lines, ack = await connection.rest_of_turn()
    said = [json.loads(line) for line in lines]
    assert [event["type"] for event in said] == ["system", "assistant", "assistant", "user", "assistant", "result"]
    assert (ack["turn"], ack["fence"], ack["outcome"]) == (7, fence, "done")


async def test_an_orphan_finishes_its_turn_and_ends(start: Harnesses, tmp_path: Path, gate: Gate) -> None:
    harness = start("--orphan-grace", "0.1")
    async with open_host(tmp_path) as host:
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow(gate.step, {"run": "echo > ended"})))
        await gate.reached()
    with pytest.raises(trio.TooSlowError):
        await wait_end(harness.process.pid, limit_s=0.5)
    await gate.open()
    assert (await harness.ended())[0] == 0
    assert (tmp_path / "ended").exists()


async def test_the_end_of_the_life_pipe_ends_harness_and_program_at_once(
    start: Harnesses, tmp_path: Path, gate: Gate
) -> None:
    life, ours = os.pipe()
    async with open_host(tmp_path) as host:
        harness = start(fd=life)
        os.close(life)
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow(gate.step)))
        program = await gate.reached()
        os.close(ours)
        assert (await harness.ended())[0] == 0
        await wait_end(program)


async def test_a_second_harness_ends_with_3_and_says_why(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await host.accept()
        await connection.refuse(await connection.expect("hello"), "conflict", "another harness is connected")
        assert await harness.ended() == (3, "cannot serve this agent: another harness is connected\n")


async def test_the_managers_harness_serves_nobody_else(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start(module="hive_mind")
        await (await host.accept()).welcome("iris", "agent")
        assert await harness.ended() == (4, "cannot serve iris as manager: the host says its role is agent\n")


async def test_the_managers_harness_serves_the_manager(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start(module="hive_mind")
        connection = await host.accept()
        await connection.welcome("hm1nd", "manager")
        await connection.give({"stop": True})
        assert await harness.ended() == (0, "")


async def test_an_ack_that_brings_the_next_lease_saves_asking_for_it(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        fence = await connection.give(a_lease(1, prompt=follow({"say": "first"})))
        lines, ack = await connection.lines_and_ack()
        assert (json.loads(lines[-1])["result"], ack["fence"]) == ("first", fence)
        assert ack["next"] not in (None, ack["fence"])
        second = {**a_lease(2, prompt=follow({"say": "second"})), "fence": ack["next"]}
        await connection.answer(ack, counted=True, stop=False, lease=second)
        lines, last = await connection.lines_and_ack()
        assert (json.loads(lines[-1])["result"], last["fence"]) == ("second", ack["next"])
        await connection.answer(last, counted=True, stop=True)
        assert await harness.ended() == (0, "")


async def test_an_ack_that_the_host_cannot_write_down_is_sent_again_until_it_can(
    start: Harnesses, tmp_path: Path
) -> None:
    """Were it given up, the turn would be done twice."""
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow({"say": "done once"})))
        _, first = await connection.lines_and_ack()
        await connection.refuse(first, "unavailable", "no space is left")
        again = await connection.expect("ack")
        assert {**again, "id": first["id"]} == first
        await connection.answer(again, counted=True, stop=True)
        code, said = await harness.ended()
    assert code == 0
    assert "cannot end turn 1: no space is left" in said


async def test_an_ack_that_is_refused_for_good_is_not_sent_again(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow({"say": "whatever"})))
        _, ack = await connection.lines_and_ack()
        await connection.refuse(ack, "usage", "there is no such turn")
        await connection.give({"stop": True})
        code, said = await harness.ended()
    assert code == 0
    assert "cannot end turn 1: there is no such turn" in said


async def test_a_harness_that_waits_for_the_answer_of_its_ack_holds_both_fences(
    start: Harnesses, tmp_path: Path
) -> None:
    start()
    async with open_host(tmp_path) as host:
        connection = await welcomed(host)
        fence = await connection.give(a_lease(7, prompt=follow({"say": "one"})))
        _, ack = await connection.lines_and_ack()
    async with open_host(tmp_path) as host:
        connection = await host.accept()
        assert (await connection.welcome())["fences"] == [fence, ack["next"]]
        assert await connection.expect("ack") == ack


async def test_a_turn_that_was_taken_away_ends_its_program_and_is_acked_as_cancelled(
    start: Harnesses, tmp_path: Path, gate: Gate
) -> None:
    async with open_host(tmp_path) as host:
        start()
        connection = await welcomed(host)
        await connection.give(a_lease(prompt=follow({"say": "one"}, gate.step)))
        program = await gate.reached()
        _, ack = await connection.lines_and_ack(running=False)
        assert (ack["outcome"], ack["error"]) == ("cancelled", "the host has taken this turn away")
        await wait_end(program)


async def test_a_refused_lease_is_asked_again(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.refuse(await connection.expect("lease"), "conflict", "a turn runs")
        await connection.give({"stop": True})
        code, said = await harness.ended()
    assert code == 0
    assert "cannot lease a message: a turn runs" in said


def test_wrong_arguments_get_the_usage() -> None:
    done = subprocess.run([*own_command(), "sing"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: hive-agent serve" in done.stderr


def test_the_signal_of_an_interrupted_terminal_is_polite_too(start: Harnesses, tmp_path: Path) -> None:
    async def main() -> None:
        async with open_host(tmp_path) as host:
            harness = start()
            await (await welcomed(host)).expect("lease")
            harness.process.send_signal(signal.SIGINT)
            assert await harness.ended() == (0, "")

    trio.run(main)


# -- errands and states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("errand", "prompts"), [("compact", 1), ("save_and_compact", 2)])
async def test_an_errand_is_a_turn_without_a_message(
    start: Harnesses, tmp_path: Path, errand: str, prompts: int
) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        _, first = await connection.take_turn(a_lease(1, prompt=follow({"say": "first"})))
        lease = {**a_lease(2, session=first["session"]), "message": None, "errand": errand}
        lines, ack = await connection.take_turn(lease)
        told = [json.loads(line) for line in lines]
        assert "compact_boundary" in [line.get("subtype") for line in told]
        assert [line["type"] for line in told].count("result") == prompts
        assert (ack["outcome"], ack["session"]) == ("done", first["session"])
        assert ack["context"]["tokens"] == 1
        await connection.give({"stop": True})
        assert (await harness.ended())[0] == 0


async def test_an_errand_of_an_agent_that_has_no_session_is_done_at_once(start: Harnesses, tmp_path: Path) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        lines, ack = await connection.take_turn({**a_lease(1), "message": None, "errand": "compact"})
        assert (lines, ack["outcome"], ack["session"]) == ([], "done", None)
        await connection.give({"stop": True})
        assert (await harness.ended())[0] == 0


async def test_what_the_program_does_goes_with_the_lines_that_say_so(
    start: Harnesses, tmp_path: Path, gate: Gate
) -> None:
    async with open_host(tmp_path) as host:
        harness = start()
        connection = await welcomed(host)
        await connection.give(a_lease(1, prompt=follow(gate.step)))
        states: list[dict[str, Any]] = []
        await gate.reached()
        while not states or states[-1]["state"] != "tool":
            request = await connection.expect("lines")
            states += [request["state"]] if "state" in request else []
            await connection.answer(request, kept=request["first"] + len(request["lines"]), running=True)
        assert states[-1] == {"state": "tool", "detail": "Bash", "until_ms": None}
        await gate.open()
        while (request := await connection.next() or {}).get("op") == "lines":
            await connection.answer(request, kept=request["first"] + len(request["lines"]), running=True)
        await connection.answer(request, counted=True, stop=True)
        assert (await harness.ended())[0] == 0


async def test_a_turn_begins_when_its_projects_are_looked_after_and_tells_of_their_trouble(
    start: Harnesses, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    state = {"name": "x", "path": "/projects/x", "branch": None, "push": "", "trouble": "its server is away"}
    async with open_host(tmp_path) as host:
        start("--projects", str(tmp_path), "--mirrors", str(tmp_path))
        connection = await welcomed(host)
        await connection.give(a_lease(1, projects=[{"name": "x"}], prompt=follow({"say": "hi"})))
        await connection.answer(await connection.expect("projects"), projects=[state])
        lines, ack = await connection.rest_of_turn()
        assert ack["outcome"] == "done"
        notes = [json.loads(line)["text"] for line in lines if json.loads(line).get("subtype") == "project"]
        assert notes[0] == 'x: "its server is away"'
        assert notes[1].startswith(f'x: {tmp_path}/x could not be brought up to date: "what is there is no clone; ')
        await connection.give(a_lease(2, projects=[{"name": "x"}]))
        await connection.refuse(await connection.expect("projects"), "usage", "cannot do 'projects'")
        lines, ack = await connection.rest_of_turn()
        assert ack["outcome"] == "done"
        assert "did not say how its projects are" in json.loads(lines[0])["text"]


async def test_a_turn_that_is_taken_away_while_a_project_is_cloned_is_never_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_agent.serve.RENEW_EVERY_S", 0.05)
    where = str(tmp_path)
    places = {"projects_dir": where, "mirrors_dir": where}
    seat = Seat("iris", where, where, where, where, PROGRAMS, None, True, 1, **places)
    state = {"name": "x", "path": "/projects/x", "branch": None, "push": "", "trouble": None}

    def hang(client: socket.socket, _: dict[str, Any]) -> None:
        client.sendall(b'{"ok":true}\n')
        client.recv(1)

    with git_socket(tmp_path / "git.sock", hang):
        async with open_host(tmp_path) as host, trio.open_nursery() as nursery:
            link = HostLink(f"{where}/harness.sock", role="", orphan_grace_s=600)
            nursery.start_soon(link.run)
            connection = await welcomed(host)
            lease = cast("Any", a_lease(1, program="claude", projects=[{"name": "x"}]))
            acks: list[Any] = []

            async def take() -> None:
                runner, projects = make_runner("claude", seat), Projects(seat, link.request)
                acks.append(await take_turn(link, runner, lease, projects))
                nursery.cancel_scope.cancel()

            nursery.start_soon(take)
            await connection.answer(await connection.expect("projects"), projects=[state])
            shown = {"state": "tool", "detail": "git clone hive://x", "until_ms": None}
            while (request := await connection.next()) is not None:
                assert (request["op"], request["lines"], request["state"]) == ("lines", [], shown)
                await connection.answer(request, kept=0, running=False)
    assert [(ack["outcome"], ack["reason"]) for ack in acks] == [("cancelled", "cancelled")]
    assert not (tmp_path / "x.new").exists()
