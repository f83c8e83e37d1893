"""The turn loop: hello → lease → turn → ack → again.

    link      keeps the connection to the host, across its restarts
    turn      runs the coding agent's program for one message
    lines     what the program prints, shipped to the host while the turn runs

A turn that began is finished, whatever becomes of the host: only the sandbox's end or the life pipe's cuts it short.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import cast

import trio

from hive_agent.claude import Ending, Seat, run_turn
from hive_agent.descendants import adopt_orphans
from hive_agent.link import EXIT_DONE, HostLink, Unwelcome
from hive_agent.loopback import serve_loopback
from hive_agent.turn_lines import TurnLines
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Ack, Lease

REFUSED_REST_S = 2.0

SeatMaker = Callable[[str, int], Seat]  # from the agent's name and the port that leads to the model


class Stop:
    """The wish to end at a turn's edge: it cuts the wait for a message, never a turn."""

    def __init__(self) -> None:
        self.wished = False
        self._wait = trio.CancelScope()

    def wish(self) -> None:
        self.wished = True
        self._wait.cancel()

    def cuts_wait(self) -> trio.CancelScope:
        self._wait = trio.CancelScope()
        if self.wished:
            self._wait.cancel()
        return self._wait


async def serve(run_dir: str, make_seat: SeatMaker, *, role: str, life_fd: int | None, orphan_grace_s: float) -> int:
    """Take turns until told to stop; returns the exit code. Every task of a harness starts here."""
    adopt_orphans()
    link = HostLink(f"{run_dir}/harness.sock", role=role, orphan_grace_s=orphan_grace_s)
    stop = Stop()
    exit_codes = [EXIT_DONE]
    async with trio.open_nursery() as tasks:
        await tasks.start(_obey_sigterm, stop, link)
        if life_fd is not None:
            tasks.start_soon(_end_with_pipe, life_fd, tasks.cancel_scope)
        tasks.start_soon(_keep_link, link, exit_codes, tasks.cancel_scope)
        port: int = await tasks.start(serve_loopback, f"{run_dir}/model.sock")
        with stop.cuts_wait():
            await link.welcomed.wait()
        await take_turns(link, lambda: make_seat(link.agent, port), stop)
        tasks.cancel_scope.cancel()
    return exit_codes[-1]


async def take_turns(link: HostLink, seat: Callable[[], Seat], stop: Stop) -> None:
    """Return at the edge of a turn, when the host or a signal asks for it."""
    while not stop.wished:
        lease: Lease | None = None
        with stop.cuts_wait():
            lease = await next_lease(link)
        if lease is None:
            return
        link.begin_turn(lease["turn"], lease["fence"])
        ack = await take_turn(link, seat(), lease)
        stop.wished = await acknowledge(link, ack) or stop.wished
        link.end_turn()


async def next_lease(link: HostLink) -> Lease | None:
    """Wait for the next message. None when the host wants this harness to stop."""
    while True:
        try:
            answer = await link.request({"op": "lease"})
        except Refusal as refusal:
            print(f"cannot lease a message: {refusal.message}", file=sys.stderr)
            await trio.sleep(REFUSED_REST_S)
        else:
            return None if answer.get("stop") else cast("Lease", answer)


async def take_turn(link: HostLink, seat: Seat, lease: Lease) -> Ack:
    """Run one turn to its end, and return what the host is to know of it once all its lines are there."""
    lines = TurnLines()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ship_lines, link, lease["turn"], lines)
        ending = await run_turn(seat, lease, lines.add)
        link.program_ended()
        lines.close()
    return as_ack(lease, ending)


async def ship_lines(link: HostLink, turn: int, lines: TurnLines) -> None:
    """Hand a turn's lines to the host until they are closed and gone."""
    while batch := await lines.take():
        first, texts = batch
        try:
            await link.request({"op": "lines", "turn": turn, "first": first, "lines": texts})
        except Refusal as refusal:
            print(f"cannot store lines of turn {turn}: {refusal.message}", file=sys.stderr)


async def acknowledge(link: HostLink, ack: Ack) -> bool:
    """Tell the host how a turn ended. Returns whether it wants this harness to stop now."""
    try:
        answer = await link.request({"op": "ack", **ack})
    except Refusal as refusal:
        print(f"cannot end turn {ack['turn']}: {refusal.message}", file=sys.stderr)
        return False
    return bool(answer.get("stop"))


def as_ack(lease: Lease, ending: Ending) -> Ack:
    return {
        "turn": lease["turn"],
        "fence": lease["fence"],
        "outcome": ending.outcome,
        "session": ending.session,
        "error": ending.error,
        "usage": ending.usage,
    }


async def _keep_link(link: HostLink, exit_codes: list[int], all_tasks: trio.CancelScope) -> None:
    try:
        await link.run()
    except Unwelcome as exc:
        print(exc, file=sys.stderr)
        exit_codes.append(exc.exit_code)
    all_tasks.cancel()


async def _obey_sigterm(stop: Stop, link: HostLink, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop.wish()
            link.hurry()


async def _end_with_pipe(life_fd: int, all_tasks: trio.CancelScope) -> None:
    """End everything at once when the other end of the pipe is closed: whoever held it is gone."""
    while True:
        await trio.lowlevel.wait_readable(life_fd)
        if not os.read(life_fd, 4096):
            all_tasks.cancel()
            return
