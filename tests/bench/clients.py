"""One client process for either side: `python -m tests.bench.clients KIND ADDRESS COUNT NAMES…`; prints one JSON line.

    send   N connections, one send outstanding on each, until COUNT were answered    {"seconds", "done"}
    cycle  N pairs of a sender and a consumer: send, blocked lease, ack, again        {"seconds", "done", "wakes_s"}
    mcp    N MCP clients that call the tool `send`, or the empty one                  {"seconds", "done"}

KIND is one of hive-send, redis-send, hive-cycle, redis-cycle, mcp. ADDRESS is the runtime directory of the daemon or
the socket of its peer. Both sides run on asyncio's own streams, so that neither has the faster client.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from hive_core.protocol.harness import PROTOCOL_VERSION

LIMIT = 4 * 1024 * 1024
Job = Callable[[], Awaitable[None]]
Wakes = list[float]


def body(number: int) -> str:
    """200 bytes that no other message has."""
    return f"{os.getpid()} {time.monotonic_ns()} {number} ".ljust(200, "x")


class Lines:
    """JSON lines over a unix socket: one request, one answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, path: str) -> Lines:
        return cls(*await asyncio.open_unix_connection(path, limit=LIMIT))

    async def ask(self, form: dict[str, Any]) -> dict[str, Any]:
        self._writer.write(json.dumps(form).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self._reader.readline())
        if not answer.get("ok", "result" in answer):
            raise SystemExit(f"refused: {answer}")
        return answer


async def hive_send(runtime: str, agent: str) -> Job:
    lines, numbers = await Lines.open(f"{runtime}/host.sock"), itertools.count()

    async def send() -> None:
        args = {"to": agent, "body": body(next(numbers))}
        await lines.ask({"v": 1, "verb": "send", "args": args})

    return send


async def redis_send(path: str, stream: str) -> Job:
    from redis.asyncio import Redis

    client, numbers = Redis(unix_socket_path=path, single_connection_client=True), itertools.count()

    async def send() -> None:
        await client.xadd(stream, {"body": body(next(numbers))})

    return send


async def mcp_send(path: str, agent: str) -> Job:
    lines, numbers = await Lines.open(path.replace("NAME", agent)), itertools.count(2)
    about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
    await lines.ask({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about})
    lines._writer.write(b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n')

    async def send() -> None:
        number = next(numbers)
        call = {"name": "send", "arguments": {"to": "hm1nd", "body": body(number)}}
        answer = await lines.ask({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call})
        assert not answer["result"].get("isError"), answer

    return send


async def hive_cycle(runtime: str, agent: str, wakes: Wakes) -> Job:
    send = await hive_send(runtime, agent)
    lines = await Lines.open(f"{runtime}/agents/{agent}/harness.sock")
    ids, fences = itertools.count(1), itertools.count(1)
    await lines.ask({"id": 0, "op": "hello", "version": PROTOCOL_VERSION, "instance": f"bench-{agent}", "fences": []})

    async def lease() -> tuple[dict[str, Any], float]:
        answer = await lines.ask({"id": next(ids), "op": "lease", "fence": f"f{next(fences)}"})
        return answer, time.perf_counter()

    async def ack(turn: dict[str, Any] | None) -> None:
        while turn is not None:
            held = {"turn": turn["turn"], "fence": turn["fence"], "next": f"f{next(fences)}"}
            answer = await lines.ask({"id": next(ids), "op": "ack", **held, "outcome": "done"})
            assert answer["counted"], answer
            turn = answer.get("lease")

    host = await Lines.open(f"{runtime}/host.sock")
    agents = (await host.ask({"v": 1, "verb": "list"}))["result"]["agents"]
    if next(each["queued"] for each in agents if each["name"] == agent):
        await ack((await lease())[0])  # what waits already: its welcome
    waiting = asyncio.create_task(lease())
    await asyncio.sleep(0)

    async def cycle() -> None:
        nonlocal waiting
        begun = time.perf_counter()
        _, (turn, at) = await asyncio.gather(send(), waiting)
        wakes.append(at - begun)
        await ack(turn)
        waiting = asyncio.create_task(lease())
        await asyncio.sleep(0)

    return cycle


async def redis_cycle(path: str, stream: str, wakes: Wakes) -> Job:
    from redis.asyncio import Redis

    send = await redis_send(path, stream)
    client = Redis(unix_socket_path=path, single_connection_client=True)
    await client.xgroup_create(stream, "g", id="$", mkstream=True)

    async def lease() -> tuple[bytes, float]:
        found: Any = await client.xreadgroup("g", "c", {stream: ">"}, count=1, block=60_000)
        return found[0][1][0][0], time.perf_counter()

    waiting = asyncio.create_task(lease())
    await asyncio.sleep(0)

    async def cycle() -> None:
        nonlocal waiting
        begun = time.perf_counter()
        _, (message, at) = await asyncio.gather(send(), waiting)
        wakes.append(at - begun)
        await client.xack(stream, "g", message)
        waiting = asyncio.create_task(lease())
        await asyncio.sleep(0)

    return cycle


async def run(kind: str, address: str, count: int, names: list[str]) -> dict[str, Any]:
    wakes: Wakes = []
    if kind.endswith("cycle"):
        make = hive_cycle if kind == "hive-cycle" else redis_cycle
        jobs = [await make(address, name, wakes) for name in names]
    else:
        open_one = {"hive-send": hive_send, "redis-send": redis_send, "mcp": mcp_send}[kind]
        jobs = [await open_one(address, name) for name in names]
    left = itertools.count()

    async def work(job: Job) -> None:
        while next(left) < count:
            await job()

    await asyncio.sleep(0.2)  # every lease waits by now
    begun = time.perf_counter()
    await asyncio.gather(*(work(job) for job in jobs))
    return {"seconds": time.perf_counter() - begun, "done": count, "wakes_s": wakes}


if __name__ == "__main__":
    kind_, address_, count_, *names_ = sys.argv[1:]
    print(json.dumps(asyncio.run(run(kind_, address_, int(count_), names_))), flush=True)
    sys.stdout.flush()
    os._exit(0)  # leases that still wait end with the process
