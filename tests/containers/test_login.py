"""Logins with the real sandbox; in the place of the agent program a script that prints as it does, or otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from hive_core.containers.login_program import LoginProgram, open_login_program
from hive_core.credentials import Credential
from hive_core.hive import Hive
from hive_core.procedures import logins
from hive_core.procedures.logins import LINK_WITHIN_S, LOGIN_WITHIN_S, Login
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.sockets.admin import AdminDesk
from hive_core.store.bus import CREDENTIALS
from tests.dashboards import OURS, browse, hive_of
from tests.hives import PATIENCE_S, connect, held_writer, open_services, run_hive, serve
from tests.needs import ROOT
from tests.processes import look_until, pids_naming

LINK = "https://claude.com/cai/oauth/authorize?code=true&state=a_b-c"
TOKEN = "sk-ant-oat01-" + "canary" * 15
IRIS = AgentName("iris")
SHOW_LINK = f"printf '\\033[37m%s\\033[39m\\r\\n\\033[2GPaste\\033[8Gcode\\033[13G>\\r\\n' '{LINK}'\n"
SHOW_TOKEN = f"printf 'Your OAuth token:\\r\\n\\033[93m%s\\033[39m\\r\\n' {TOKEN}\n"
WANT_CODE = 'read -r code; [ "$code" = \'the-code#state\' ] || { echo "OAuth error: $code?"; read -r code; }\n'
GOOD = SHOW_LINK + WANT_CODE + SHOW_TOKEN


@asynccontextmanager
async def house_of(folder: Path, script: str, **changes: object) -> AsyncIterator[Hive]:
    """A hive whose agent program is a script, with its logins served."""
    program = folder / "claude-of-the-test"
    program.write_text(f"#!/bin/sh\n[ $1 = setup-token ] || exit 9\n{script}")
    program.chmod(0o755)
    async with open_services(folder) as services:
        await services.add_agents("hm1nd", "iris")
        await services.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude')")
        house = hive_of(services, claude=program, **changes)
        await house.breaker.load()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.logins.serve)
            await trio.testing.wait_all_tasks_blocked()
            yield house
            nursery.cancel_scope.cancel()


async def until(house: Hive, login: Login, *states: str) -> Login:
    """The login, when it has come to one of these states."""
    with house.store.bus.listen(CREDENTIALS) as listener:
        while login.state not in states:
            await listener.wait()
    return login


async def finished(house: Hive, name: str = "default") -> Login:
    """A login that was begun, given its code when it wants one, and has ended."""
    login = house.logins.begin(name, "the test")
    with trio.fail_after(PATIENCE_S):
        await until(house, login, "link", "done", "failed")
        if login.state == "link":
            await house.logins.enter_code(name, "the-code#state")
        return await until(house, login, "done", "failed")


def is_gone(folder: Path) -> None:
    look_until(lambda: not pids_naming(str(folder / "claude-of-the-test")))


async def test_a_login_shows_its_link_takes_the_code_and_stores_the_token(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house:
        closed = house.access.closed(IRIS)
        assert closed is not None
        assert closed.state == "needs_login"
        login = house.logins.begin("default", "the test")
        await until(house, login, "link")
        assert login.link == LINK
        assert house.credentials.find("default") is None
        await house.logins.enter_code("default", " the-code#state\n")
        await until(house, login, "done", "failed")
        assert (login.state, login.sentence) == ("done", "")
        found = house.credentials.find("default")
        assert found == Credential("oauth_token", str(tmp_path / "credentials" / "claude-oauth-token"), TOKEN)
        assert Path(found.source).stat().st_mode & 0o777 == 0o600
        assert login.told["agents"] == ["hm1nd", "iris"]
        assert house.access.closed(IRIS) is None
        kept = [
            *await house.store.rows("SELECT data FROM events"),
            *await house.store.rows("SELECT body FROM messages"),
        ]
        assert not [row for row in kept if "canary" in row[0]]
        assert "canary" not in str(login.to_wire())
    is_gone(tmp_path)


async def test_the_sandbox_holds_the_program_and_nothing_of_the_hive(tmp_path: Path) -> None:
    look = f"""
        seen=$(ls -A "$HOME"; ls -d {tmp_path}/hive.sqlite /run/hive /state /agents /home/* 2>/dev/null; ls {tmp_path})
        touch /usr/x {tmp_path}/claude-of-the-test 2>/dev/null && seen="$seen writes"
        echo "OAuth error: $(echo $seen) net $(wc -l < /proc/net/dev) keys $(env | grep -c CANARY)"
        read -r wait
    """
    os.environ["CANARY_KEY"] = "x"
    try:
        async with house_of(tmp_path, look) as house:
            login = await finished(house)
    finally:
        del os.environ["CANARY_KEY"]
    hosts = len(Path("/proc/net/dev").read_text().splitlines())
    assert f"the program says: claude-of-the-test net {hosts} keys 0;" in login.sentence


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'OAuth error: Failed to exchange it'; read -r x", "the program says: Failed to exchange it"),
        (SHOW_LINK + "read -r x; echo 'OAuth error: Invalid code.'; read -r x", "the program says: Invalid code."),
        (SHOW_LINK + f"read -r x; echo 'OAuth error: {TOKEN} {TOKEN}'; read -r x", "the program says: … …"),
        ("exit 3", "ended without a token of the known form"),
        (SHOW_LINK + "read -r x; echo 'Your token: sk-ant-oat01-short'", "ended without a token of the known form"),
        (
            SHOW_LINK + "read -r x; echo 'Your token: sk-ant-xyz99-0123456789012345678901234567'",
            "ended without a token",
        ),
        ("head -c 300000 /dev/urandom", "ended without a token of the known form"),
        ("yes canary", "prints without an end"),
        ("echo https://evil.example/x; echo http://x/oauth/authorize?x; exit 0", "ended without a token"),
    ],
)
async def test_a_login_that_goes_wrong_says_how_and_leaves_what_was_there(
    tmp_path: Path, script: str, said: str
) -> None:
    async with house_of(tmp_path, script) as house:
        house.credentials.put("work", "api_key", "sk-ant-api03-before-0123")
        login = await finished(house, "work")
        assert login.state == "failed"
        assert said in login.sentence
        assert "canary" not in login.sentence
        assert [path.name for path in house.credentials.folder.iterdir()] == ["work.api-key"]
        assert house.logins.running("work") is None
    is_gone(tmp_path)


@pytest.mark.parametrize(
    ("script", "after_s", "said"),
    [
        ("read -r x", LINK_WITHIN_S, "showed no link within 60 s"),
        (SHOW_LINK + "read -r x", LOGIN_WITHIN_S, "not finished within 10 minutes"),
        (SHOW_LINK + "trap '' HUP TERM INT; read -r x; while :; do sleep 9; done", LOGIN_WITHIN_S, "within 10 minutes"),
    ],
)
async def test_a_login_that_hangs_ends_with_its_sandbox(
    tmp_path: Path, mock_clock: MockClock, script: str, after_s: float, said: str
) -> None:
    async with house_of(tmp_path, script) as house:
        login = house.logins.begin("default", "the test")
        if LINK in script:
            await until(house, login, "link")
        else:
            await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(after_s - 1)
        await trio.testing.wait_all_tasks_blocked()
        assert login.state != "failed"
        mock_clock.jump(2)
        await until(house, login, "failed")
        assert said in login.sentence
        await trio.to_thread.run_sync(is_gone, tmp_path)


async def test_one_login_of_a_credential_runs_and_a_second_is_told_where(tmp_path: Path) -> None:
    async with house_of(tmp_path, SHOW_LINK + "read -r x") as house:
        login = house.logins.begin("default", "the dashboard")
        await until(house, login, "link")
        with pytest.raises(Refusal, match="runs already, begun from the dashboard") as refused:
            house.logins.begin("default", "the command line")
        assert refused.value.code == "conflict"
        other = house.logins.begin("work", "the command line")
        assert other.state == "starting"
        house.logins.cancel("default")
        await until(house, login, "failed")
        house.logins.begin("default", "the command line")


async def test_a_cancelled_login_leaves_no_process_and_no_credential(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house:
        login = house.logins.begin("default", "the test")
        await until(house, login, "link")
        assert "was cancelled" in house.logins.cancel("default").sentence
        assert login.link is None
        await trio.to_thread.run_sync(is_gone, tmp_path)
        assert house.credentials.find("default") is None
        with pytest.raises(Refusal, match="no login of default runs"):
            house.logins.cancel("default")
        with pytest.raises(Refusal, match="no login of default waits"):
            await house.logins.enter_code("default", "the-code#state")


async def test_what_is_left_of_a_code_is_typed_into_no_other_file_when_its_login_has_ended(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with house_of(tmp_path, "stty -echo\n" + SHOW_LINK + "read -r x; sleep 9") as house:
        login = house.logins.begin("default", "the test")
        await until(house, login, "link")
        assert login.program is not None
        number = login.program._terminal
        async with trio.open_nursery() as nursery:
            nursery.start_soon(house.logins.enter_code, "default", "the-code#state")  # waits for an echo
            await until(house, login, "code")
            await trio.testing.wait_all_tasks_blocked()
            house.logins.cancel("default")
            while login.program is not None:
                await trio.testing.wait_all_tasks_blocked(0.001)
            another = os.open(tmp_path / "another", os.O_WRONLY | os.O_CREAT)
            os.dup2(another, number)  # as any file may have it, that is opened next
            mock_clock.jump(2)
            await trio.testing.wait_all_tasks_blocked()
            for descriptor in {another, number}:
                os.close(descriptor)
    assert (tmp_path / "another").read_bytes() == b""


async def test_a_login_whose_token_is_being_stored_cannot_be_cancelled_and_is_done(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house:
        login = house.logins.begin("default", "the test")
        await until(house, login, "link")
        async with trio.open_nursery() as nursery, held_writer(house.store, nursery):
            await house.logins.enter_code("default", "the-code#state")
            while house.credentials.find("default") is None:
                await trio.testing.wait_all_tasks_blocked(0.001)
            with pytest.raises(Refusal, match="its token is being stored; `hive credentials remove default` takes it"):
                house.logins.cancel("default")
        await until(house, login, "done")
        assert (login.sentence, house.logins.all) == ("", {})
        assert house.credentials.find("default") is not None


async def test_a_login_that_is_cancelled_when_its_program_has_ended_stores_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def open_and_cancel(claude: Path) -> AsyncIterator[LoginProgram]:
        async with open_login_program(claude) as program:
            yield program
        house.logins.cancel("default")

    monkeypatch.setattr(logins, "open_login_program", open_and_cancel)
    async with house_of(tmp_path, GOOD) as house:
        login = await finished(house)
        while login.program is not None:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert (login.state, house.credentials.find("default")) == ("failed", None)


async def test_a_login_that_is_cancelled_while_its_sandbox_starts_leaves_no_process(tmp_path: Path) -> None:
    async with house_of(tmp_path, "trap '' HUP; while :; do sleep 9; done") as house:
        for number in range(30):
            login = house.logins.begin("default", "the test")
            with trio.move_on_after(number / 5000):  # another moment of its start each time
                await until(house, login, "link")
            house.logins.cancel("default")
            while login.program is not None:
                await trio.testing.wait_all_tasks_blocked(0.001)
        await trio.to_thread.run_sync(is_gone, tmp_path)


@pytest.mark.parametrize("code", ["", " ", "a b", "a\nb", "\x03", "\x1b[A", "é", "x" * 2000, None, 7])
async def test_a_code_that_would_be_other_keys_is_not_typed(tmp_path: Path, code: object) -> None:
    async with house_of(tmp_path, GOOD) as house:
        login = house.logins.begin("default", "the test")
        await until(house, login, "link")
        with pytest.raises(Refusal, match="cannot take the code"):
            await house.logins.enter_code("default", code)
        assert login.state == "link"


async def test_where_no_login_can_run_the_way_out_is_told(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD, bwrap_trouble="bwrap is missing") as house:
        told = r"bwrap is missing; run `claude setup-token` as yourself.* `hive login default --api-key`"
        with pytest.raises(Refusal, match=told):
            house.logins.begin("default", "the test")
        house.logins.claude = None
        with pytest.raises(Refusal, match="claude is not installed"):
            house.logins.begin("default", "the test")
        await house.logins.give("default", "oauth_token", TOKEN, OPERATOR)
        assert house.access.closed(IRIS) is None


def test_the_sandbox_ends_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "claude-of-the-test"
    program.write_text(f"#!/bin/sh\n{SHOW_LINK}trap '' HUP TERM INT; while :; do read -r x; done\n")
    program.chmod(0o755)
    main = f"""
import trio
from pathlib import Path
from hive_core.containers.login_program import open_login_program
async def main():
    async with open_login_program(Path({str(program)!r})) as login:
        while await login.read():
            if login.screen.link:
                print("link", flush=True)
trio.run(main)
"""
    with killed(main) as line:
        assert line() == "link\n"
        assert pids_naming(str(program))
    is_gone(tmp_path)


@contextmanager
def killed(main: str) -> Iterator[Callable[[], str]]:
    """A Python that runs `main`, killed when the block is left; within, what it printed next."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", main], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline
        finally:
            process.send_signal(signal.SIGKILL)


async def test_a_login_from_the_page_shows_its_link_and_takes_the_code_back(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house, browse(house) as client:
        data = {"credential": "work"}
        assert (await client.post("/credentials/login", data=data, headers=OURS)).status_code == 303
        login = await until(house, house.logins.all["work"], "link")
        page = (await client.get("/")).text
        assert LINK.replace("&", "&amp;") in page
        answer = await client.post("/credentials/code", data={**data, "code": "the-code#state"}, headers=OURS)
        assert answer.status_code == 303
        await until(house, login, "done", "failed")
        assert house.credentials.names() == ["default", "work"]
        page = (await client.get("/")).text
        assert 'id="code-work"' not in page
        assert "canary" not in page


# -- from the command line --------------------------------------------------------------------------------------------


async def test_hive_login_prints_the_link_and_takes_the_code_back(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house, serve(tmp_path / "host.sock", AdminDesk(house).serve):
        done = await run_hive(tmp_path, "login", stdin=b"the-code#state\n")
        assert done.returncode == 0, done.stderr
        assert LINK in done.stderr.decode()
        assert "agents on it that go on: hm1nd, iris" in done.stdout.decode()
        assert b"canary" not in done.stdout + done.stderr
        done = await run_hive(tmp_path, "login", stdin=b"wrong\n")
        assert done.returncode == 1
        assert "the program says: wrong?" in done.stderr.decode()
        done = await run_hive(tmp_path, "login", stdin=b"")
        assert done.returncode == 2
        assert "no code was given" in done.stderr.decode()


async def test_a_login_ends_when_whoever_asked_for_it_hangs_up(tmp_path: Path, mock_clock: MockClock) -> None:
    async with house_of(tmp_path, GOOD) as house, serve(tmp_path / "host.sock", AdminDesk(house).serve):
        async with connect(tmp_path / "host.sock") as peer:
            await peer.send({"v": 1, "verb": "login", "args": {}})
            while (await peer.read())["result"]["state"] != "link":
                pass
            login = house.logins.all["default"]
        await trio.testing.wait_all_tasks_blocked()
        while login.state != "failed":
            mock_clock.jump(6)
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert "was cancelled" in login.sentence
        await trio.to_thread.run_sync(is_gone, tmp_path)


async def test_hive_login_cancel_ends_the_one_that_runs(tmp_path: Path) -> None:
    async with house_of(tmp_path, GOOD) as house, serve(tmp_path / "host.sock", AdminDesk(house).serve):
        login = house.logins.begin("work", "the dashboard")
        await until(house, login, "link")
        done = await run_hive(tmp_path, "login", "work", "--cancel")
        assert done.stdout.decode() == "the login of work is cancelled\n"
        assert login.state == "failed"
