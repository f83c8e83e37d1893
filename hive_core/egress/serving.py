"""The proxy's whole task tree: the daemon's words, and an exit for each agent."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import trio

from hive_core.destinations import Allowed
from hive_core.egress.channel import Channel, ChannelBroken
from hive_core.egress.exits import Bounds, Exit
from hive_core.egress.reaching import Resolver, system_resolver
from hive_core.egress.reports import Reports
from hive_core.protocol.carrying import Pipes

PIPES_LIMIT = 16


async def serve_proxy(sock: socket.socket, resolver: Callable[[], Resolver] = system_resolver) -> None:
    """Do what the daemon says on the socket, until it hangs up. resolver: makes one for each agent."""
    channel = Channel(sock)
    pipes = Pipes(PIPES_LIMIT)
    try:
        async with trio.open_nursery() as nursery:
            proxy = _Proxy(channel, pipes, resolver, nursery)
            while (line := await channel.next()) is not None:
                proxy.take(line)
            nursery.cancel_scope.cancel()
    except* ChannelBroken:
        pass  # what was open ends with this process
    finally:
        channel.close()


class _Proxy:
    def __init__(self, channel: Channel, pipes: Pipes, resolver: Callable[[], Resolver], nursery: trio.Nursery) -> None:
        self._channel = channel
        self._pipes = pipes
        self._resolver = resolver
        self._nursery = nursery
        self._reports = Reports(channel)
        self._exits: dict[str, Exit] = {}
        self._own_ports: set[int] = set()

    def take(self, line: dict[str, Any]) -> None:
        """One line of the daemon's. What is not of the protocol is a bug, and ends the process."""
        match line["op"]:
            case "serve":
                self._serve(line["agent"], line, self._channel.take_file())
            case "rules":
                if line["agent"] in self._exits:
                    self._exits[line["agent"]].set_rules(_rules(line))
            case "cut":
                if line["agent"] in self._exits:
                    self._exits[line["agent"]].cut()
            case "end":
                self._end(line["agent"])
            case "own_ports":
                self._own_ports.clear()
                self._own_ports.update(line["ports"])
            case "ping":
                self._nursery.start_soon(self._channel.send, {"op": "pong"})
            case "answer":
                self._reports.answered(line["id"], line["sentence"])
            case other:
                raise ChannelBroken(f"{other!r} is no op of this protocol")

    def _serve(self, agent: str, line: dict[str, Any], listener: socket.socket) -> None:
        self._end(agent)
        bounds = Bounds(**line["limits"])
        self._exits[agent] = Exit(
            agent, _rules(line), bounds, self._reports, self._pipes, self._resolver(), self._own_ports
        )
        self._nursery.start_soon(self._exits[agent].serve, listener)

    def _end(self, agent: str) -> None:
        if agent in self._exits:
            self._exits.pop(agent).end()


def _rules(line: dict[str, Any]) -> tuple[Allowed, ...]:
    return tuple(Allowed.from_wire(one) for one in line["rules"])
