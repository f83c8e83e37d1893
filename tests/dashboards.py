"""A whole hive whose agents never start, for the tests of the dashboard; and its pages over HTTP without a network."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import h11
import httpx2
import trio

from dashboard.app import at_home, build_app
from hive_core.config import Config
from hive_core.containers.mounts import agent_dirs
from hive_core.containers.process import ProcessDriver
from hive_core.credentials import Credentials
from hive_core.hive import Hive
from hive_core.kept import Keeper
from hive_core.procedures.pinned_claude import PinnedClaude
from hive_core.procedures.reconcile import Reconciler
from hive_core.protocol.words import AgentName
from hive_core.services.agents import Agent
from hive_core.services.sign_ins import SignIns
from hive_core.sockets.http import serve_asgi
from tests.hives import PATIENCE_S, Services

PORT = 7000
HOST = f"hive.localhost:{PORT}"
ORIGIN = f"http://{HOST}"
OURS = {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin"}


def _never(*_: object) -> NoReturn:
    raise AssertionError("no agent is started here")


def hive_of(services: Services, **changes: Any) -> Hive:
    """The hive as the daemon would open it around these services."""
    folder = services.state_dir
    config = Config(state_dir=folder, runtime_dir=folder / "run", unsafe_no_sandbox=changes.pop("unsafe", False))
    driver = ProcessDriver(folder, sandbox="bwrap", claude=None, orphan_grace_s=1.0, life_fd=None)
    dirs = partial(agent_dirs, folder, folder / "run")

    def may_run(agent: Agent) -> str | None:
        return None

    return Hive(
        config=config,
        store=services.store,
        broker=services.broker,
        turns=services.turns,
        agents=services.agents,
        approvals=services.approvals,
        gate=services.gate,
        reconciler=Reconciler(services.store, services.agents, driver, dirs, may_run, _never, services.broker.put_back),
        keeper=Keeper(folder, lambda name: folder / "run" / "agents" / name),
        sign_ins=SignIns(services.store),
        **{
            "credentials": Credentials(folder, {}),
            "claude": None,
            "pinned": PinnedClaude(services.store, folder, Path("/dev/null")),
            "sandbox": "bwrap",
            "sandbox_trouble": None,
            **changes,
        },
    )


async def signed_in(hive: Hive) -> dict[str, str]:
    """The headers of a browser that signed in."""
    cookie = await hive.sign_ins.redeem(hive.sign_ins.new_code())
    return {"Cookie": f"hive_operator={cookie}"}


@asynccontextmanager
async def browse(
    hive: Hive, home: str | None = None, headers: dict[str, str] | None = None, base: str = ORIGIN
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the pages; signed in unless `headers` are given."""
    app = at_home(build_app(hive), AgentName(home)) if home else build_app(hive)
    headers = await signed_in(hive) if headers is None else headers
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app), base_url=base, headers=headers, follow_redirects=False
    ) as client:
        yield client


@asynccontextmanager
async def gate_open(hive: Hive) -> AsyncIterator[None]:
    """What is approved is carried out for as long as the block runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.serve)
        yield
        nursery.cancel_scope.cancel()


class Frame(NamedTuple):
    id: str | None
    event: str
    data: dict[str, Any]

    @property
    def target(self) -> str:
        return str(self.data.get("target"))


class Answer:
    """One answer of the server as it comes in: its frames, and its end."""

    def __init__(self, peer: trio.SocketStream) -> None:
        self.peer = peer
        self._parser = h11.Connection(h11.CLIENT)
        self._text = ""
        self.status = 0

    async def begin(self, method: str, path: str, headers: dict[str, str]) -> None:
        request = h11.Request(method=method, target=path, headers=list(headers.items()))
        await self.peer.send_all(self._parser.send(request) + self._parser.send(h11.EndOfMessage()))
        head = await self._next_event()
        assert isinstance(head, h11.Response)
        self.status = head.status_code

    async def frame(self) -> Frame | None:
        """The next frame that is more than a comment; None at the end."""
        while True:
            while "\r\n\r\n" not in self._text:
                event = await self._next_event()
                if not isinstance(event, h11.Data):
                    return None
                self._text += bytes(event.data).decode()
            block, _, self._text = self._text.partition("\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in block.split("\r\n") if not line.startswith(":"))
            if "data" in fields or "event" in fields:
                data = json.loads(fields["data"]) if fields.get("data") else {}
                return Frame(fields.get("id"), fields.get("event", "message"), data)

    async def until(self, target: str) -> list[Frame]:
        """The frames up to the first with this target, or kind of event."""
        seen: list[Frame] = []
        with trio.fail_after(PATIENCE_S):
            while (frame := await self.frame()) is not None:
                seen.append(frame)
                if target in (frame.target, frame.event):
                    return seen
        raise AssertionError(f"the stream ended before {target}: {[frame.target for frame in seen]}")

    async def rest(self) -> list[str]:
        """The targets of all frames until the stream ends."""
        targets = []
        with trio.fail_after(PATIENCE_S):
            while (frame := await self.frame()) is not None:
                targets.append(frame.target)
        return targets

    async def _next_event(self) -> Any:
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            self._parser.receive_data(bytes(await self.peer.receive_some()))
        return event


class Browser:
    """One signed-in browser at the front page's port."""

    def __init__(self, port: int, headers: dict[str, str]) -> None:
        self.port = port
        self.headers = {"Host": f"hive.localhost:{port}", **headers}

    @asynccontextmanager
    async def stream(self, path: str, method: str = "GET", **headers: str) -> AsyncIterator[Answer]:
        async with await trio.open_tcp_stream("127.0.0.1", self.port) as peer:
            answer = Answer(peer)
            with trio.fail_after(PATIENCE_S):
                await answer.begin(method, path, {**self.headers, **headers})
            assert answer.status == 200
            yield answer

    async def told(self, path: str, until: str, **headers: str) -> list[Frame]:
        """What a new stream tells, up to the first frame with this target."""
        async with self.stream(path, **headers) as answer:
            return await answer.until(until)


@asynccontextmanager
async def served(hive: Hive, cookie: dict[str, str] | None = None) -> AsyncIterator[Browser]:
    """The dashboard on a free port of a real server, which has stopped when the block is left."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    cookie = cookie or await signed_in(hive)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve_asgi, build_app(hive), sock, stopping=hive.stopping))
        yield Browser(port, cookie)
        hive.stopping.set()
