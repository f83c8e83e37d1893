"""The daemon's side of the proxy, with the real proxy as its child: what passes, who is halted, and who ends whom."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.limits import Limits
from hive_core.procedures.egress_desk import EgressDesk
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.connections import Connections
from hive_core.services.freeze import Freeze
from hive_core.sockets.unix import listen_unix
from hive_core.store.bus import DEPLOYED
from hive_core.store.writer import Transaction
from tests.hives import Services
from tests.processes import PATIENCE_S

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Look again and again, each time by a connection or at the rows: the proxy tells nobody what it has heard."""
    with trio.fail_after(PATIENCE_S):
        while not await condition():
            await trio.lowlevel.checkpoint()


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


class House:
    """The desk, a host that echoes, and agents who connect as their loopback would."""

    def __init__(self, hive: Services, folder: Path, port: int, connections: int) -> None:
        self.hive = hive
        self.folder = folder
        self.port = port
        self.asked: list[tuple[str, str, str, int]] = []
        self.fault: Exception | None = None
        self.iris_is_asked_for = trio.Event()
        self.iris_is_asked_for.set()
        self.kept = Connections(hive.store, Limits())
        limits = Limits(egress_connections=connections)
        access = hive.agents.access
        self.desk = EgressDesk(hive.store, access, self.kept, limits, lambda _: 7, self._ask, lambda: {self.own})
        self.own = 1
        self.streams: list[trio.SocketStream] = []

    async def _ask(self, name: AgentName, how: str, host: str, port: int) -> str:
        self.asked.append((name, how, host, port))
        if self.fault is not None:
            raise self.fault
        if name == IRIS:
            await self.iris_is_asked_for.wait()
        return "the operator was asked (approval 3)"

    async def let(self, name: AgentName, *entries: Any) -> None:
        """Deploy what an agent may reach."""

        def write(tx: Transaction) -> None:
            policy = json.dumps({"egress": list(entries)})
            tx.execute("UPDATE agents SET policy = ? WHERE name = ?", (policy, name))
            tx.wake(DEPLOYED)

        await self.hive.store.write(write)

    async def let_echo(self, name: AgentName = IRIS) -> None:
        await self.let(name, {"to": f"127.0.0.1:{self.port}"})

    async def connect(self, host: str = "127.0.0.1", port: int = 0, name: AgentName = IRIS) -> tuple[str, Any]:
        """The status line of a tunnel's answer, and the stream."""
        stream = await trio.open_unix_socket(str(self.folder / f"{name}.sock"))
        self.streams.append(stream)
        where = f"{host}:{port or self.port}"
        await stream.send_all(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            data = await stream.receive_some()
            assert data, head
            head += data
        return head.partition(b"\r\n")[0].decode(), stream

    async def passes(self) -> bool:
        status, stream = await self.connect()
        await stream.aclose()
        return status.startswith("HTTP/1.1 200")

    async def row(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The first connection that has ended and is as wanted; waits for it."""
        found: list[dict[str, Any]] = []

        async def is_there() -> bool:
            await self.kept.flush()
            rows = await self.hive.store.rows("SELECT * FROM connections WHERE verdict IS NOT NULL ORDER BY id")
            found[:] = [one for one in map(dict, rows) if wanted(one)]
            return bool(found)

        await wait_until(is_there)
        return found[0]


@pytest.fixture
async def house(hive: Services, tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(hive, tmp_path) as house:
        yield house


@asynccontextmanager
async def open_house(hive: Services, folder: Path, connections: int = 4) -> AsyncIterator[House]:
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        house = House(hive, folder, listeners[0].socket.getsockname()[1], connections)
        for name in (IRIS, DAMOCLES):
            nursery.start_soon(house.desk.hold, name, listen_unix(folder / f"{name}.sock"))
        nursery.start_soon(house.desk.serve)
        with trio.fail_after(PATIENCE_S):
            yield house
        for stream in house.streams:
            await stream.aclose()
        nursery.cancel_scope.cancel()


async def test_what_is_deployed_passes_and_is_kept_with_the_turn_that_ran(house: House) -> None:
    await house.let_echo()
    await wait_until(house.passes)
    status, stream = await house.connect()
    assert status == "HTTP/1.1 200 Connection established"
    await stream.send_all(b"hello")
    assert await stream.receive_some() == b"hello"
    await stream.aclose()

    row = await house.row(lambda row: row["sent"])
    assert (row["agent"], row["turn_id"], row["host"], row["port"]) == ("iris", 7, "127.0.0.1", house.port)
    assert (row["verdict"], row["sent"], row["received"], row["address"]) == ("passed", 5, 5, "127.0.0.1")


async def test_another_agent_has_nothing_of_it_and_its_wish_is_asked_for(house: House) -> None:
    await house.let_echo()
    await wait_until(house.passes)
    status, _ = await house.connect(name=DAMOCLES)
    said = f"cannot connect: 127.0.0.1:{house.port} is not in egress of agent.toml; the operator was asked (approval 3)"
    assert status == f"HTTP/1.1 403 {said}"
    assert house.asked[-1] == ("damocles", "tunnel", "127.0.0.1", house.port)
    row = await house.row(lambda row: row["agent"] == "damocles")
    assert (row["verdict"], row["reason"]) == ("refused", said)


async def test_an_agent_whose_wishes_take_long_holds_up_no_others(hive: Services, tmp_path: Path) -> None:
    async with open_house(hive, tmp_path, connections=64) as house:
        house.iris_is_asked_for = trio.Event()
        for number in range(40):
            stream = await trio.open_unix_socket(str(tmp_path / "iris.sock"))
            house.streams.append(stream)
            await stream.send_all(b"CONNECT h%d.example:443 HTTP/1.1\r\nHost: x\r\n\r\n" % number)

        async def all_are_there() -> bool:
            await house.kept.flush()
            return bool(await hive.value("SELECT count(*) FROM connections") == 40)

        await wait_until(all_are_there)
        status, _ = await house.connect("example.org", 443, DAMOCLES)
        assert status.endswith("the operator was asked (approval 3)")
        house.iris_is_asked_for.set()


async def test_a_fault_where_a_wish_is_asked_for_costs_that_answer_alone(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    house.fault = ValueError("nobody thought of this one")
    status, _ = await house.connect("example.org", 443)
    assert status.endswith("example.org:443 is not in egress of agent.toml; something went wrong on the host")
    assert "a wish of iris failed" in caplog.text
    caplog.clear()
    house.fault = None
    status, _ = await house.connect("example.org", 443)
    assert status.endswith("the operator was asked (approval 3)")


async def test_what_is_deployed_later_holds_for_the_next_connection_and_cuts_what_it_has_no_more(house: House) -> None:
    assert not await house.passes()
    await house.let_echo()
    await wait_until(house.passes)
    _, stream = await house.connect()
    await house.let(IRIS)
    assert await stream.receive_some() == b""
    assert not await house.passes()


async def test_an_entry_that_this_release_does_not_take_takes_nothing_from_the_others(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await house.let(IRIS, "of-another-release", {"to": f"127.0.0.1:{house.port}"})
    await wait_until(house.passes)
    assert "an entry of `egress` lets nothing pass" in caplog.text
    caplog.clear()


async def test_a_proxy_that_stands_still_is_ended_and_the_next_one_lets_pass(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hive_core.procedures.egress_desk.PING_EVERY_S", 0.1)
    await house.let_echo()
    await wait_until(house.passes)
    _, stream = await house.connect()
    assert house.desk.pid is not None
    os.kill(house.desk.pid, signal.SIGSTOP)
    with monkeypatch.context() as soon:
        soon.setattr("hive_core.procedures.egress_desk.ANSWER_WITHIN_S", 0.5)
        assert await stream.receive_some() == b""
    assert await house.passes()
    assert "the proxy did nothing for " in caplog.text
    caplog.clear()


@pytest.mark.parametrize("how", ["pause", "estop"])
async def test_who_is_halted_is_cut_and_reaches_nothing_until_it_goes_on(house: House, how: str) -> None:
    await house.let_echo()
    freeze = Freeze(house.hive.store, house.hive.agents.access)
    await wait_until(house.passes)
    _, stream = await house.connect()
    asked = list(house.asked)
    if how == "pause":
        await house.hive.agents.want(IRIS, "paused", OPERATOR)
    else:
        await freeze.estop(OPERATOR)
    assert await stream.receive_some() == b""

    async def is_refused() -> bool:
        return not await house.passes()

    await wait_until(is_refused)
    status, _ = await house.connect()
    assert "paused by the operator" in status if how == "pause" else "stopped the whole swarm" in status
    assert house.asked == asked
    await (house.hive.agents.want(IRIS, "up", OPERATOR) if how == "pause" else freeze.thaw(OPERATOR))
    await wait_until(house.passes)
    assert (await house.row(lambda row: row["verdict"] == "cut"))["reason"] == "the daemon cut it"


async def test_a_proxy_that_is_killed_is_started_anew_and_whoever_connects_meanwhile_waits(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    await house.let_echo()
    await wait_until(house.passes)
    _, stream = await house.connect()
    assert house.desk.pid is not None
    os.kill(house.desk.pid, signal.SIGKILL)
    assert await stream.receive_some() == b""
    assert await house.passes()
    row = await house.row(lambda row: row["verdict"] == "cut")
    assert row["reason"] == "the hive's proxy ended, and is started anew"


async def test_what_is_deployed_is_known_before_there_is_a_proxy(house: House) -> None:
    known = house.desk.moves
    await house.let_echo()

    async def is_known() -> bool:
        return house.desk.moves != known and bool(house.desk.allowed(IRIS))

    await wait_until(is_known)
    assert house.desk.pid is None


async def test_the_proxy_ends_with_the_desk(hive: Services, tmp_path: Path) -> None:
    async with open_house(hive, tmp_path) as house:
        await house.let_echo()
        await wait_until(house.passes)
        pid = house.desk.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_agent_that_is_no_more_has_no_door_and_what_it_had_open_is_cut(hive: Services, tmp_path: Path) -> None:
    async with open_house(hive, tmp_path) as house, trio.open_nursery() as nursery:
        gone = AgentName("gone")
        await hive.add_agents(gone)
        nursery.start_soon(house.desk.hold, gone, listen_unix(tmp_path / "gone.sock"))
        await house.let_echo(gone)

        async def passes() -> bool:
            return "200" in (await house.connect(name=gone))[0]

        await wait_until(passes)
        _, stream = await house.connect(name=gone)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            assert await stream.receive_some() == b""


async def test_the_hives_own_ports_are_refused_even_where_they_are_named(house: House) -> None:
    await house.let_echo()
    await wait_until(house.passes)
    house.own = house.port
    await house.let_echo()

    async def is_refused() -> bool:
        return "is the hive's own" in (await house.connect())[0]

    await wait_until(is_refused)
