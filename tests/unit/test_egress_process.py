"""The proxy as the process that it is: what it has given up, how it ends, and what a kill of it costs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.egress_desk import Desk, dial, echo, named, open_host, read_all, tunnel
from tests.needs import ROOT


@asynccontextmanager
async def open_process(folder: Path) -> AsyncIterator[tuple[Desk, trio.Process]]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", "hive_core.egress"]
        process = await trio.lowlevel.open_process(command, stdin=theirs, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    desk = Desk(ours, folder)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.hear)
        yield desk, process
        desk.channel.hang_up()
        await process.wait()
    desk.channel.close()


def status(process: trio.Process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


async def test_a_process_serves_and_ends_with_the_daemon(tmp_path: Path) -> None:
    async with open_process(tmp_path) as (desk, process), open_host(echo) as port:
        path = await desk.serve([named(f"localhost:{port}")])
        async with await tunnel(path, f"localhost:{port}") as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            desk.channel.hang_up()
            assert await read_all(stream) == b""
            assert await process.wait() == 0
            assert (await desk.ended())["verdict"] == "cut"


async def test_it_has_no_rights_and_the_filter_of_system_calls(tmp_path: Path) -> None:
    async with open_process(tmp_path) as (desk, process), open_host(echo) as port:
        path = await desk.serve([named(f"localhost:{port}")])
        async with await tunnel(path, f"localhost:{port}"):
            told = status(process)
            limits = Path(f"/proc/{process.pid}/limits").read_text()
    assert {told[f"Cap{which}"] for which in ("Prm", "Eff", "Inh", "Amb")} == {"0" * 16}
    assert told["NoNewPrivs"] == "1"
    if os.uname().machine in ("x86_64", "aarch64"):
        assert told["Seccomp"] == "2"
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert int(soft) == min(65_536, int(hard)) or int(soft) > 65_536


async def test_a_signal_to_the_whole_group_does_not_end_it_before_the_daemon(tmp_path: Path) -> None:
    async with open_process(tmp_path) as (desk, process), open_host(echo) as port:
        path = await desk.serve([named(f"localhost:{port}")])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            async with await tunnel(path, f"localhost:{port}") as stream:
                process.send_signal(number)
                await stream.send_all(b"still here")
                assert await stream.receive_some() == b"still here"


async def test_a_killed_proxy_ends_its_connections_and_who_knocks_meanwhile_is_served_by_the_next(
    tmp_path: Path,
) -> None:
    async with open_host(echo) as port:
        entries = [named(f"localhost:{port}")]
        async with open_process(tmp_path) as (desk, process):
            path = tmp_path / "iris.sock"
            with socket.socket(socket.AF_UNIX) as kept:  # as the daemon keeps it
                kept.bind(str(path))
                kept.listen(128)
                await desk.serve_on(kept, entries)
                async with await tunnel(path, f"localhost:{port}") as stream:
                    process.kill()
                    assert await read_all(stream) == b""
                assert await process.wait() == -signal.SIGKILL
                async with await dial(path) as waiting:
                    await waiting.send_all(f"CONNECT localhost:{port} HTTP/1.1\r\nHost: x\r\n\r\nhello".encode())
                    async with open_process(tmp_path) as (next_desk, _):
                        await next_desk.serve_on(kept, entries)
                        await waiting.send_eof()
                        assert (await read_all(waiting)).endswith(b"\r\n\r\nhello")


def test_it_starts_without_what_only_the_daemon_needs() -> None:
    code = "import hive_core.egress.serving, sys; print(*{'pydantic', 'sqlite3', 'starlette'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
