"""Agents that wait: `python -m tests.bench.idle RUNTIME COUNT` says `all wait` when each one's lease is asked."""

from __future__ import annotations

import asyncio
import sys

from hive_core.protocol.harness import PROTOCOL_VERSION
from tests.bench.clients import Lines


async def main(runtime: str, count: int) -> None:
    waiting = []
    for number in range(count):
        name = f"agent{number}"
        path = f"{runtime}/agents/{name}/harness.sock"
        while True:
            try:
                lines = await Lines.open(path)
                break
            except OSError:
                await asyncio.sleep(0.1)  # the daemon opens the sockets of so many agents one after the other
        await lines.ask({"id": 0, "op": "hello", "version": PROTOCOL_VERSION, "instance": name, "fences": []})
        waiting.append(asyncio.create_task(lines.ask({"id": 1, "op": "lease", "fence": "f"})))
    print("all wait", flush=True)
    await asyncio.gather(*waiting)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
