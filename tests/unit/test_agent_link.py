"""The link to the host: a host of the test's own on the other side of a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from hive_agent.link import EXIT_CONFLICT, EXIT_MISMATCH, HostLink, Unwelcome
from hive_agent.runner import Ending, Runner, Seat
from hive_agent.serve import ship_lines
from hive_agent.turn_lines import TurnLines
from hive_core.protocol.harness import LINES_PER_REQUEST, PROTOCOL_VERSION
from hive_core.protocol.refusal import Refusal
from tests.harness_host import open_host
from tests.processes import PATIENCE_S

if TYPE_CHECKING:
    from hive_core.protocol.harness import Check, Lease


class Stopwatch(Runner):
    """A program that runs no process, and notes when its turn is interrupted."""

    name = "stopwatch"
    interrupted = False

    def __init__(self) -> None:
        super().__init__(Seat("iris", "", "", "", "", "", None, False, 0))

    async def take_turn(self, lease: Lease, pass_on: Callable[[str], None]) -> Ending:
        await trio.sleep_forever()
        raise AssertionError

    async def check(self, check: Check) -> str:
        raise AssertionError

    def interrupt(self) -> None:
        self.interrupted = True

    async def rest(self) -> bool:
        await trio.lowlevel.checkpoint()
        return False

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def running(link: HostLink) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield nursery
        nursery.cancel_scope.cancel()


def nothing() -> None:
    pass


def a_link(folder: Path, orphan_grace_s: float = 600.0) -> HostLink:
    return HostLink(str(folder / "harness.sock"), orphan_grace_s=orphan_grace_s)


async def run_to_its_end(link: HostLink) -> None:
    with trio.fail_after(PATIENCE_S):
        await link.run()


async def test_hello_tells_version_instance_and_that_no_turn_is_held(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, running(link := a_link(tmp_path)):
        hello = await (await host.accept()).welcome("iris")
        await link.welcomed.wait()
    assert (hello["version"], hello["fences"]) == (PROTOCOL_VERSION, [])
    assert len(hello["instance"]) == 32
    assert (link.agent, link.role) == ("iris", "agent")


async def test_requests_are_answered_in_order(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, running(link := a_link(tmp_path)):
        connection = await host.accept()
        await connection.welcome()
        for number in (1, 2):
            async with trio.open_nursery() as nursery:

                @nursery.start_soon
                async def ask(number: int = number) -> None:
                    assert (await link.request({"op": "lease"}))["n"] == number

                request = await connection.expect("lease")
                assert request["id"] == number
                await connection.answer(request, n=number)


async def test_a_request_without_an_answer_is_asked_of_the_next_host(tmp_path: Path) -> None:
    link = a_link(tmp_path)
    async with running(link), trio.open_nursery() as nursery:
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            first = await connection.welcome()
            link.hold("fence", "next")

            @nursery.start_soon
            async def ask() -> None:
                assert (await link.request({"op": "ack", "turn": 5}))["counted"] is True

            request = await connection.expect("ack")
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            hello = await connection.welcome()
            assert (hello["fences"], hello["instance"]) == (["fence", "next"], first["instance"])
            again = await connection.expect("ack")
            assert again == request
            await connection.answer(again, counted=True)


async def test_a_host_that_dies_in_a_quiet_turn_is_replaced_without_being_asked(tmp_path: Path) -> None:
    link = a_link(tmp_path)
    async with running(link):
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            await connection.welcome()
            link.hold("fence")
        async with open_host(tmp_path) as host:
            hello = await (await host.accept()).welcome()
    assert hello["fences"] == ["fence"]


async def test_lines_that_were_not_kept_are_sent_again_with_their_numbers(tmp_path: Path) -> None:
    link, lines = a_link(tmp_path), TurnLines()
    async with running(link), trio.open_nursery() as nursery:
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            await connection.welcome()
            nursery.start_soon(ship_lines, link, 3, lines, Stopwatch(), nothing)
            lines.add("one")
            request = await connection.expect("lines")
            await connection.answer(request, kept=1)
            lines.add("two")
            lost = await connection.expect("lines")
            assert (lost["first"], lost["lines"]) == (1, ["two"])
        lines.add("three")
        lines.close()
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            await connection.welcome()
            assert await connection.expect("lines") == lost
            await connection.answer(lost, kept=2)
            last = await connection.expect("lines")
            assert (last["first"], last["lines"]) == (2, ["three"])
            await connection.answer(last, kept=3)


async def test_lines_that_the_host_cannot_write_down_are_offered_again_and_those_behind_them_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hive_agent.serve.REFUSED_REST_S", 0.01)
    link, lines = a_link(tmp_path), TurnLines()
    async with open_host(tmp_path) as host, running(link), trio.open_nursery() as nursery:
        connection = await host.accept()
        await connection.welcome()
        nursery.start_soon(ship_lines, link, 3, lines, Stopwatch(), nothing)
        lines.add("one")
        refused = await connection.expect("lines")
        for _ in range(3):
            await connection.refuse(refused, "unavailable", "the disk is full")
            lines.add("more")
            again = await connection.expect("lines")
            assert {**again, "id": 0} == {**refused, "id": 0}
            refused = again
        await connection.answer(again, kept=1)
        rest = await connection.expect("lines")
        assert (rest["first"], rest["lines"]) == (1, ["more"] * 3)
        await connection.answer(rest, kept=4)
        lines.close()
    assert capfd.readouterr().err == "cannot store lines of turn 3: the disk is full\n"


@pytest.mark.parametrize(("code", "times"), [("usage", 3), ("unavailable", 3 + 3)])
async def test_lines_that_are_refused_for_good_or_long_after_their_turn_are_lost_and_hold_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, times: int
) -> None:
    monkeypatch.setattr("hive_agent.serve.REFUSED_REST_S", 0.01)
    monkeypatch.setattr("hive_agent.serve.LATE_TRIES", 3)
    link, lines = a_link(tmp_path), TurnLines()
    for _ in range(2 * LINES_PER_REQUEST + 1):
        lines.add("one of three batches")
    lines.close()
    refused = 0
    async with open_host(tmp_path) as host, running(link), trio.open_nursery() as nursery:
        connection = await host.accept()
        await connection.welcome()

        async def refuse() -> None:
            nonlocal refused
            while True:
                request = await connection.expect("lines")
                refused += 1
                await connection.refuse(request, code, "never")

        nursery.start_soon(refuse)
        await ship_lines(link, 3, lines, Stopwatch(), nothing)
        nursery.cancel_scope.cancel()
    assert refused == times


async def test_a_quiet_turn_says_that_it_lives_and_one_that_was_taken_away_ends_its_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_agent.serve.RENEW_EVERY_S", 0.01)
    program = Stopwatch()
    async with open_host(tmp_path) as host, running(link := a_link(tmp_path)), trio.open_nursery() as nursery:
        lines = TurnLines()
        connection = await host.accept()
        await connection.welcome()
        nursery.start_soon(ship_lines, link, 3, lines, program, program.interrupt)
        for alive in (True, True, False):
            assert not program.interrupted
            renewal = await connection.expect("lines")
            assert (renewal["turn"], renewal["lines"], renewal["state"]["state"]) == (3, [], "starting")
            await connection.answer(renewal, kept=0, running=alive)
        await connection.answer(await connection.expect("lines"), kept=0, running=False)
        assert program.interrupted
        nursery.cancel_scope.cancel()


async def test_a_refused_request_raises_what_the_host_said(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, running(link := a_link(tmp_path)), trio.open_nursery() as nursery:
        connection = await host.accept()
        await connection.welcome()

        @nursery.start_soon
        async def ask() -> None:
            with pytest.raises(Refusal, match="cannot lease: paused"):
                await link.request({"op": "lease"})

        await connection.refuse(await connection.expect("lease"), "refused", "cannot lease: paused")


@pytest.mark.parametrize("answer", [b"oops\n", b'{"id":99,"ok":true}\n', b"[]\n"])
async def test_a_host_that_talks_nonsense_is_left_for_the_next(tmp_path: Path, answer: bytes) -> None:
    async with open_host(tmp_path) as host, running(link := a_link(tmp_path)), trio.open_nursery() as nursery:
        connection = await host.accept()
        await connection.welcome()
        nursery.start_soon(link.request, {"op": "lease"})
        await connection.expect("lease")
        await connection.send_raw(answer)
        assert await connection.next() is None
        connection = await host.accept()
        await connection.welcome()
        await connection.answer(await connection.expect("lease"), stop=True)


async def test_a_second_harness_is_told_so_and_ends(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            with pytest.raises(Unwelcome, match="another harness") as caught:
                await run_to_its_end(a_link(tmp_path))
            assert caught.value.exit_code == EXIT_CONFLICT

        connection = await host.accept()
        await connection.refuse(await connection.expect("hello"), "conflict", "another harness is connected")


@pytest.mark.parametrize(
    ("welcome", "said"),
    [
        ({"version": PROTOCOL_VERSION + 1, "agent": "iris", "role": "agent"}, f"version {PROTOCOL_VERSION + 1}"),
        ({"version": PROTOCOL_VERSION, "agent": "iris", "role": "agent"}, "as manager"),
    ],
)
async def test_a_host_that_does_not_fit_ends_the_harness(tmp_path: Path, welcome: dict[str, object], said: str) -> None:
    async with open_host(tmp_path) as host, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def run() -> None:
            with pytest.raises(Unwelcome, match=said) as caught:
                await run_to_its_end(HostLink(str(tmp_path / "harness.sock"), role="manager"))
            assert caught.value.exit_code == EXIT_MISMATCH

        connection = await host.accept()
        await connection.answer(await connection.expect("hello"), **welcome)


async def test_a_host_that_is_not_ready_yet_is_asked_again(tmp_path: Path) -> None:
    async with open_host(tmp_path) as host, running(a_link(tmp_path)):
        connection = await host.accept()
        await connection.refuse(await connection.expect("hello"), "unavailable", "starting")
        await (await host.accept()).welcome()


async def test_without_a_host_the_link_gives_up_after_the_grace(tmp_path: Path) -> None:
    begin = trio.current_time()
    await run_to_its_end(a_link(tmp_path, orphan_grace_s=0.3))
    assert trio.current_time() - begin >= 0.3


async def test_a_program_that_runs_keeps_the_link_past_the_grace(tmp_path: Path) -> None:
    link = a_link(tmp_path, orphan_grace_s=0.01)
    link.begin_turn()
    with trio.move_on_after(0.5) as limit:
        await link.run()
    assert limit.cancelled_caught
    link.program_ended()
    await run_to_its_end(link)


async def test_the_grace_counts_from_the_loss_of_the_host(tmp_path: Path) -> None:
    link = a_link(tmp_path, orphan_grace_s=1.0)
    async with trio.open_nursery() as nursery, open_host(tmp_path) as host:
        nursery.start_soon(run_to_its_end, link)
        connection = await host.accept()
        await connection.welcome()
        with trio.move_on_after(1.1):
            await connection.next()
        begin = trio.current_time()
    assert trio.current_time() - begin >= 1.0


async def test_what_is_told_beside_the_turns_does_not_wait_for_a_lease_and_both_are_asked_again(
    tmp_path: Path,
) -> None:
    answers: dict[str, Any] = {}
    link = a_link(tmp_path)

    async def ask(name: str, request: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]) -> None:
        answers[name] = await request({"op": name})

    async with running(link) as nursery:
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            await connection.welcome()
            nursery.start_soon(ask, "lease", link.request)
            lease = await connection.expect("lease")
            nursery.start_soon(ask, "unasked_turn", link.tell)
            told = await connection._next()
            assert told is not None
            assert (told["op"], told["id"] != lease["id"]) == ("unasked_turn", True)
        async with open_host(tmp_path) as host:
            connection = await host.accept()
            await connection.welcome()
            again = [await connection._next(), await connection._next()]
            assert sorted(again, key=lambda one: one["id"] if one else 0) == [lease, told]
            await connection.answer(told, counted=True)
            await connection.answer(lease, stop=True)
            with trio.fail_after(PATIENCE_S):
                while len(answers) < 2:
                    await trio.testing.wait_all_tasks_blocked()
    assert (answers["lease"]["stop"], answers["unasked_turn"]["counted"]) == (True, True)
