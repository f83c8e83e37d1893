"""The turn loop: hello → lease → turn → ack → again.

    link      keeps the connection to the host, across its restarts
    runner    runs the coding agent's program, whose process may take many turns
    lines     what the program prints, shipped to the host while the turn runs
    background  commands that outlive a turn

A turn that began is finished, whatever becomes of the host: only the sandbox's end or the life pipe's cuts it short.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import trio

from hive_agent.background import Background
from hive_agent.descendants import adopt_orphans
from hive_agent.link import EXIT_DONE, HostLink, Unwelcome
from hive_agent.loopback import serve_loopback
from hive_agent.projects import Projects
from hive_agent.refusals import Refusals
from hive_agent.reports import Reports
from hive_agent.runner import Activity, Ending, Runner, Seat, make_runner
from hive_agent.turn_lines import TurnLines
from hive_core.protocol.harness import RENEW_EVERY_S
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Ack, Check, Lease

REFUSED_REST_S = 2.0
LATE_TRIES = 30  # of all lines of a turn that the host cannot take, when the turn is over
CLOSE_S = 3.0  # that a program has which waits for a next turn, when its harness ends

SeatMaker = Callable[[str, int, int], Seat]  # from the agent's name, and the ports to the model and to the proxy


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


async def serve(
    run_dir: str,
    make_seat: SeatMaker,
    *,
    role: str,
    life_fd: int | None,
    orphan_grace_s: float,
    own_network: bool = True,
    shared_loopback: bool = False,
) -> int:
    """Take turns until told to stop; returns the exit code. Every task of a harness starts here.

    own_network: whether this container has one for itself, from which the hive's proxy is the way out; else others
    see its abstract sockets
    shared_loopback: whether other users of the machine are on its loopback
    """
    adopt_orphans()
    if not own_network:
        from hive_agent.own_sockets import leave_foreign_sockets  # which few need

        if not leave_foreign_sockets():
            why = "before Linux 6.12, or without Landlock, nothing keeps it from the host's abstract sockets"
            print(f"hive-agent: it has the host's network: {why}", file=sys.stderr)
    link = HostLink(f"{run_dir}/harness.sock", role=role, orphan_grace_s=orphan_grace_s)
    stop = Stop()
    exit_codes = [EXIT_DONE]
    async with trio.open_nursery() as tasks:
        await tasks.start(_obey_sigterm, stop, link)
        if life_fd is not None:
            tasks.start_soon(_end_with_pipe, life_fd, tasks.cancel_scope)
        tasks.start_soon(_keep_link, link, exit_codes, tasks.cancel_scope)
        lead_out = partial(serve_loopback, shared=shared_loopback)
        model: int = await tasks.start(lead_out, f"{run_dir}/model.sock")
        refusals = Refusals()
        lead_out = partial(lead_out, heed=refusals.heed)
        egress: int = await tasks.start(lead_out, f"{run_dir}/egress.sock") if own_network else 0
        with stop.cuts_wait():
            await link.welcomed.wait()
        if link.welcomed.is_set():
            seat, reports = make_seat(link.agent, model, egress), Reports()
            background = Background(seat.state_dir, reports, own_network=own_network)
            seat = replace(seat, harness=background.address, refusals=refusals)
            tasks.start_soon(reports.serve, link)
            await tasks.start(background.serve)
            projects = Projects(seat, link.request)
            await take_turns(link, lambda program: make_runner(program, seat), stop, background, reports, projects)
        tasks.cancel_scope.cancel()
    return exit_codes[-1]


async def take_turns(
    link: HostLink,
    make: Callable[[str], Runner],
    stop: Stop,
    background: Background,
    reports: Reports,
    projects: Projects,
) -> None:
    """Return at the edge of a turn, when the host or a signal asks for it."""
    lease: Lease | None = None
    runner: Runner | None = None
    try:
        while lease is not None or not stop.wished:
            given = lease or await wait_for_lease(link, runner, stop, reports)
            if given is None:
                return
            if runner is None or runner.name != given["settings"]["program"]:
                if runner is not None:
                    await runner.close()
                runner = make(given["settings"]["program"])
            if "check" in given:
                await check(link, runner, cast("Check", given))
                continue
            lease = given
            link.begin_turn()
            background.begin_turn(lease)
            ack = await take_turn(link, runner, lease, projects)
            background.end_turn()
            lease = await acknowledge(link, ack, stop)
    finally:
        if runner is not None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + CLOSE_S):
                await runner.close()


async def check(link: HostLink, runner: Runner, asked: Check) -> None:
    """See whether the program comes up, and tell the host."""
    error, reason, without = await runner.check(asked)
    told = {"ok": not error, "error": error, "reason": reason, "without": sorted(without)}
    try:
        await link.request({"op": "checked", "check": asked["check"], **told})
    except Refusal as refusal:  # it does not want to know any more
        print(f"cannot tell how a check ended: {refusal.message}", file=sys.stderr)


async def wait_for_lease(link: HostLink, runner: Runner | None, stop: Stop, reports: Reports) -> Lease | Check | None:
    """The next turn, or a check, while what is left of the last turn is looked after. None at a stop."""

    async def look_after(runner: Runner) -> None:
        if await runner.rest():
            reports.add({"op": "unasked_turn", "key": secrets.token_hex(8)})

    async with trio.open_nursery() as nursery:
        if runner is not None:
            nursery.start_soon(look_after, runner)
        lease: Lease | Check | None = None
        with stop.cuts_wait():
            lease = await next_lease(link)
        nursery.cancel_scope.cancel()
    return lease


async def next_lease(link: HostLink) -> Lease | Check | None:
    """Wait for the next message, or for what else is asked. None when the host wants this harness to stop."""
    fence = new_fence()
    link.hold(fence)
    while True:
        try:
            answer = await link.request({"op": "lease", "fence": fence})
        except Refusal as refusal:
            print(f"cannot lease a message: {refusal.message}", file=sys.stderr)
            await trio.sleep(REFUSED_REST_S)
        else:
            if answer.get("stop"):
                return None
            return cast("Check", answer["check"]) if "check" in answer else cast("Lease", answer)


async def take_turn(link: HostLink, runner: Runner, lease: Lease, projects: Projects) -> Ack:
    """Run one turn to its end, and return what the host is to know of it once all its lines are there."""
    lines, preparing = TurnLines(runner.seat.state_dir), trio.CancelScope()
    runner.activity = Activity("starting")

    def show(command: str) -> None:
        runner.activity = Activity("tool", command)

    def interrupt() -> None:
        preparing.cancel()
        runner.interrupt()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ship_lines, link, lease["turn"], lines, runner, interrupt)
        ending = Ending("cancelled", lease["session"], "the host has taken this turn away", reason="cancelled")
        with preparing:
            if lease["message"] is not None and (notes := await projects.prepare(lease["settings"], show)):
                lease = {**lease, "notes": notes}
            runner.activity = Activity("starting")
        if not preparing.cancelled_caught:
            ending = await runner.take_turn(lease, lines.add)
        link.program_ended()
        lines.close()
    return as_ack(lease, ending)


async def ship_lines(
    link: HostLink, turn: int, lines: TurnLines, runner: Runner, interrupt: Callable[[], None]
) -> None:
    """Hand a turn's lines to the host until they are closed and gone; with none, say that this harness lives.

    What the program does goes with them when that has changed, and whenever there are none: the host may be another
    one by then. Interrupts the turn when the host says that it is not this harness's any more.
    The first lines go with the digest of what the program was asked.
    """
    told: Activity | None = None
    late = iter(range(LATE_TRIES))
    while True:
        batch: tuple[int, list[str]] | None = (0, [])
        with trio.move_on_after(RENEW_EVERY_S):
            batch = await lines.take()
        if batch is None:
            return
        first, texts = batch
        form: dict[str, object] = {"op": "lines", "turn": turn, "first": first, "lines": texts}
        if first == 0 and texts:
            form["prompt_sha256"] = runner.asked
        if (activity := runner.activity) != told or not texts:
            form["state"] = activity._asdict()
        if (answer := await hand_over(link, form, lines, late)) is not None:
            told = activity
            if answer.get("running") is False:
                interrupt()


async def hand_over(
    link: HostLink, form: dict[str, object], lines: TurnLines, late: Iterator[int]
) -> dict[str, object] | None:
    """The host's answer to some lines; None when they are lost, or it took no word of a turn without any.

    While it cannot write them down they are offered again, and those behind them wait with their own bounds. When the
    turn is over that goes on as long as there are `late` tries, which all its lines share: its end is what counts.
    """
    refused = False
    while True:
        try:
            return await link.request(form)
        except Refusal as refusal:
            if not refused:
                print(f"cannot store lines of turn {form['turn']}: {refusal.message}", file=sys.stderr)
            if refusal.code != "unavailable" or not form["lines"] or (lines.closed and next(late, None) is None):
                return None
        refused = True
        await trio.sleep(REFUSED_REST_S)


async def acknowledge(link: HostLink, ack: Ack, stop: Stop) -> Lease | None:
    """Tell the host how a turn ended. Returns the next one, where the host has begun it with the same commit."""
    if not stop.wished:
        ack["next"] = fence = new_fence()
        link.hold(ack["fence"], fence)
    while True:
        try:
            answer = await link.request({"op": "ack", **ack})
            break
        except Refusal as refusal:
            print(f"cannot end turn {ack['turn']}: {refusal.message}", file=sys.stderr)
            if refusal.code != "unavailable":
                return None
        # The host cannot write it down just now. Unless it does, the turn would be done twice.
        await trio.sleep(REFUSED_REST_S)
    stop.wished = stop.wished or bool(answer.get("stop"))
    lease = cast("Lease | None", answer.get("lease"))
    link.hold(*([lease["fence"]] if lease else []))
    return lease


def new_fence() -> str:
    """Names a turn before the host knows of it, so that asking for it again cannot begin a second one."""
    return secrets.token_hex(8)


def as_ack(lease: Lease, ending: Ending) -> Ack:
    return {
        "turn": lease["turn"],
        "fence": lease["fence"],
        "next": None,
        "outcome": ending.outcome,
        "session": ending.session,
        "error": ending.error,
        "usage": ending.usage,
        "reason": ending.reason,
        "limited_until_ms": ending.limited_until_ms,
        "context": ending.context,
        "session_lost": ending.session_lost,
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
