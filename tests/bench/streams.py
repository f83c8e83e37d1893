"""A provider that streams by the clock, and readers of such streams, each a process of its own.

    provider                      says its port, then answers until it is ended
    read COUNT EVENTS ADDRESS…    COUNT streams at once, by turns from each address, of EVENTS events, 50 a second each;
                                  {"late_s": each event's way}
    first COUNT ADDRESS           COUNT calls, one after the other; {"first_s": to the first byte of each}

ADDRESS is the port of the provider, or the path of an agent's model.sock. Each event says when it was written, by the
clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

RATE = 50
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PADDING = "x" * 120  # an event of a model's stream has about this size
SENT = re.compile(rb'"sent":(\d+)')


def _chunk() -> bytes:
    text = {"type": "text_delta", "text": PADDING}
    event = {"type": "content_block_delta", "index": 0, "delta": text, "sent": time.monotonic_ns()}
    data = f"event: content_block_delta\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    assert length is not None, head
    await reader.readexactly(int(length[1]))
    events = re.search(rb"events=(\d+)", head)
    assert events is not None, head
    writer.write(HEAD)
    begun = time.monotonic()
    for number in range(int(events[1])):
        await asyncio.sleep(begun + number / RATE - time.monotonic())
        writer.write(_chunk())
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def _provide() -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _ask(address: str, events: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.isdigit():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(address))
    else:
        reader, writer = await asyncio.open_unix_connection(address)
    head = f"POST /v1/messages?events={events} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 2\r\n\r\n"
    writer.write(head.encode() + b"{}")
    return reader, writer


async def _read(address: str, events: int, late_s: list[float]) -> None:
    reader, writer = await _ask(address, events)
    for _ in range(events):
        sent = None
        while sent is None:
            line = await reader.readline()
            assert line, "the stream ended early"
            sent = SENT.search(line)
        late_s.append(time.monotonic() - int(sent[1]) / 1e9)
    writer.close()


async def read(count: int, events: int, addresses: list[str]) -> list[float]:
    late_s: list[float] = []
    await asyncio.gather(*(_read(addresses[number % len(addresses)], events, late_s) for number in range(count)))
    return late_s


async def first(count: int, address: str) -> list[float]:
    first_s = []
    for _ in range(count):
        begun = time.monotonic()
        reader, writer = await _ask(address, 1)
        await reader.readuntil(b"data: ")
        first_s.append(time.monotonic() - begun)
        writer.close()
    return first_s


if __name__ == "__main__":
    kind, *given = sys.argv[1:]
    if kind == "provider":
        asyncio.run(_provide())
    elif kind == "read":
        count_, events_, *addresses_ = given
        print(json.dumps({"late_s": asyncio.run(read(int(count_), int(events_), addresses_))}))
    else:
        print(json.dumps({"first_s": asyncio.run(first(int(given[0]), given[1]))}))
