from __future__ import annotations

import contextlib
import json
import sqlite3
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from hive_core.credentials import Credentials
from hive_core.limits import Limits
from hive_core.protocol.harness import (
    FENCE_LIMIT,
    LINES_PER_REQUEST,
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    REQUEST_LIMIT_BYTES,
    STREAM_LINE_LIMIT_BYTES,
)
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.breaker import Breaker
from hive_core.services.broker import Broker
from hive_core.sockets.claims import claimed_end, claimed_state
from hive_core.sockets.harness import HarnessDesk
from hive_core.sockets.harness_checks import Checked
from tests.hives import PATIENCE_S, SETTINGS, Peer, Services, connect, held_writer, run_in_hive, serve

HELLO = {"id": 1, "op": "hello", "version": PROTOCOL_VERSION, "instance": "one", "fences": []}
OUTDATED = "harness_outdated"
LEASE = {"id": 2, "op": "lease", "fence": "f-1"}


def desk_for(hive: Services, name: str = "iris") -> HarnessDesk:
    return HarnessDesk(
        AgentName(name), "agent", hive.broker, hive.turns, hive.agents, hive.background, lambda: "api_key"
    )


@pytest.fixture
async def desk(hive: Services) -> HarnessDesk:
    return desk_for(hive)


@pytest.fixture
async def door(desk: HarnessDesk, tmp_path: Path) -> AsyncIterator[Path]:
    async with serve(tmp_path / "harness.sock", desk.serve) as path:
        yield path


@asynccontextmanager
async def greeted(door: Path, **more: Any) -> AsyncIterator[Peer]:
    """A harness that has said hello."""
    async with connect(door) as peer:
        answer = await peer.ask({**HELLO, **more})
        assert answer["ok"], answer
        yield peer


async def wait_free(desk: HarnessDesk) -> None:
    """Return once the desk has seen the hang-up of the harness before."""
    with trio.fail_after(PATIENCE_S):
        while desk.instance is not None:
            await trio.testing.wait_all_tasks_blocked()


# -- hello ------------------------------------------------------------------------------------------------------------


async def test_hello_is_answered_with_the_version_and_who_the_agent_is(desk: HarnessDesk, door: Path) -> None:
    async with connect(door) as peer:
        answer = await peer.ask(HELLO)
    assert answer == {"id": 1, "ok": True, "version": PROTOCOL_VERSION, "agent": "iris", "role": "agent"}
    assert desk.said_hello.is_set()


@pytest.mark.parametrize("version", [None, 0, OLDEST_VERSION - 1, "3", 2.5, True, [], {"a": 1}, "x" * 1000])
async def test_a_harness_of_another_version_is_refused_with_both_versions_and_the_way_out(
    desk: HarnessDesk, door: Path, version: object
) -> None:
    async with connect(door) as peer:
        error = (await peer.ask({**HELLO, "version": version}))["error"]
        assert error["code"] == "refused"
        assert f"this host {OLDEST_VERSION} to {PROTOCOL_VERSION}; restart the agent" in error["message"]
        assert len(error["message"]) < 300
        assert desk.instance is None
        assert (await peer.ask(HELLO))["ok"]


async def test_a_newer_harness_is_told_that_the_host_is_the_older_one(door: Path) -> None:
    async with connect(door) as peer:
        error = (await peer.ask({**HELLO, "version": PROTOCOL_VERSION + 1}))["error"]
    assert error["code"] == "refused"
    assert "it is of a newer release: start the hive with that release, or restart the agent" in error["message"]


@pytest.mark.parametrize("instance", [None, "", "x" * 65, 7, ["one"]])
async def test_a_hello_needs_an_instance(door: Path, instance: object) -> None:
    async with connect(door) as peer:
        assert "1 to 64 characters" in (await peer.ask({**HELLO, "instance": instance}))["error"]["message"]


@pytest.mark.parametrize("op", ["lease", "lines", "ack", "background", "unasked_turn", "checked"])
async def test_nothing_is_done_before_hello(hive: Services, door: Path, op: str) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with connect(door) as peer:
        answer = await peer.ask({"id": 5, "op": op})
    assert (answer["id"], answer["error"]["code"]) == (5, "usage")
    assert await hive.value("SELECT count(*) FROM turns") == 0


async def test_a_second_harness_is_refused_and_the_one_that_is_connected_is_named(
    desk: HarnessDesk, door: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with greeted(door) as first:
        async with connect(door) as second:
            error = (await second.ask({**HELLO, "instance": "two"}))["error"]
            assert error["code"] == "conflict"
            assert "one is connected" in error["message"]
            assert (await second.ask(LEASE))["error"]["code"] == "usage"
        assert desk.instance == "one"
        assert (await first.ask({**HELLO, "id": 9}))["ok"]
    await wait_free(desk)
    async with greeted(door, instance="two"):
        assert desk.instance == "two"


async def test_a_lease_that_waits_on_a_connection_which_was_succeeded_is_refused_and_does_not_say_stop(
    door: Path,
) -> None:
    """To stop is what the host asks of a harness; one that comes back is to go on, on its new connection."""
    async with greeted(door) as old:
        await old.send({"id": 2, "op": "lease", "fence": "f"})
        await trio.testing.wait_all_tasks_blocked(0.02)
        async with greeted(door):
            answer = await old.read()
    assert (answer["ok"], answer["error"]["code"]) == (False, "conflict")
    assert "connected again" in answer["error"]["message"]


async def test_a_harness_that_comes_back_before_its_hang_up_was_seen_takes_its_place_over(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    async with greeted(door) as old, greeted(door) as new:
        await old.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        async with connect(door) as other:
            assert (await other.ask({**HELLO, "instance": "two"}))["error"]["code"] == "conflict"
        message = await hive.say("hm1nd", "iris", "hello")
        assert (await new.ask(LEASE))["message"]["id"] == message


async def test_the_place_that_was_taken_over_gets_no_mail(hive: Services, door: Path) -> None:
    async with greeted(door) as old:
        await old.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        async with greeted(door) as new:
            assert (await old.read()).get("turn") is None
            await new.send(LEASE)
            await trio.testing.wait_all_tasks_blocked()
            message = await hive.say("hm1nd", "iris", "hello")
            assert (await new.read())["message"]["id"] == message


async def test_what_a_harness_tells_beside_its_turns_is_answered_while_its_lease_waits(
    hive: Services, door: Path
) -> None:
    async with greeted(door) as peer:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        work = {"id": 3, "op": "background", "work": "a1", "turn": 1, "command": "make", "note": "", "output": "/x"}
        assert await peer.ask({**work, "state": "running"}) == {"id": 3, "ok": True, "counted": True}
        assert await peer.ask({"id": 4, "op": "unasked_turn", "key": "k"}) == {"id": 4, "ok": True, "counted": True}
        assert (await peer.ask({**work, "state": "gone"}))["error"]["code"] == "usage"
        await peer.send({**work, "id": 5, "state": "ended", "code": 0})
        answers = {answer["id"]: answer for answer in (await peer.read(), await peer.read())}
        assert answers[5]["counted"] is True
        assert "work a1 has ended with exit code 0" in answers[2]["message"]["body"]
        assert await peer.ask({"id": 6, "op": "background", "state": "none"}) == {"id": 6, "ok": True, "counted": False}


# -- a check ----------------------------------------------------------------------------------------------------------


async def test_a_harness_that_is_held_is_asked_for_a_check_and_begins_no_turn_before_it_is_let_go(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    ends: list[Checked | None] = []

    async def check() -> None:
        ends.append(await desk.check())

    message = await hive.say("hm1nd", "iris", "hello")
    desk.hold(True)
    async with greeted(door, checks=True) as peer, trio.open_nursery() as nursery:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(check)
        asked = (await peer.read())["check"]
        assert (asked["settings"], asked["credential"]) == (SETTINGS, "api_key")
        wrong = {"op": "checked", "ok": True, "check": "another"}
        assert await peer.ask({"id": 3, **wrong}) == {"id": 3, "ok": True, "counted": False}
        told = {
            "op": "checked",
            "check": asked["check"],
            "ok": False,
            "error": "no tools\ud800" + "x" * 1000,
            "reason": "mine",
        }
        assert (await peer.ask({"id": 4, **told}))["counted"] is True
        assert (await peer.ask({"id": 5, **told}))["counted"] is False
        await trio.testing.wait_all_tasks_blocked()
        assert [(end.error[:9], len(end.error), end.reason) for end in ends if end] == [("no tools?", 400, None)]
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        assert await hive.value("SELECT count(*) FROM turns") == 0
        desk.hold(False)
        assert (await peer.read())["message"]["id"] == message


async def test_a_check_that_was_asked_is_asked_again_on_the_next_connection(desk: HarnessDesk, door: Path) -> None:
    desk.hold(True)
    async with trio.open_nursery() as nursery:
        async with greeted(door, checks=True) as peer:
            nursery.start_soon(desk.check)
            first = (await peer.ask(LEASE))["check"]
        await wait_free(desk)
        async with greeted(door, checks=True) as peer:
            assert (await peer.ask(LEASE))["check"] == first
            assert (await peer.ask({"id": 3, "op": "checked", "check": first["check"], "ok": True}))["counted"]


async def test_a_harness_of_a_release_without_checks_is_asked_for_none(desk: HarnessDesk, door: Path) -> None:
    desk.hold(True)
    async with greeted(door):
        assert await desk.check() is None


# -- lease, lines, ack ------------------------------------------------------------------------------------------------


async def test_a_turn_walks_from_lease_over_lines_to_ack(hive: Services, door: Path) -> None:
    message = await hive.say("hm1nd", "iris", "do it")
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        assert (lease["id"], lease["ok"], lease["waiting"], lease["session"]) == (2, True, 0, None)
        assert lease["message"].items() >= {"id": message, "sender": "hm1nd", "body": "do it", "attempt": 1}.items()
        assert (lease["settings"], lease["credential"]) == (SETTINGS, "api_key")
        assert hive.agents.live("iris").state == "thinking"
        lines = {"id": 3, "op": "lines", "turn": lease["turn"], "first": 0, "lines": ["{}", "not json"]}
        assert await peer.ask({**lines, "state": state("tool", "Bash")}) == {
            "id": 3,
            "ok": True,
            "kept": 2,
            "running": True,
        }
        live = hive.agents.live("iris")
        assert (live.state, live.detail) == ("tool", "Bash")
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": lease["fence"], "outcome": "done"}
        assert await peer.ask({**ack, "session": "s-1", "usage": {"output_tokens": 3}}) == {
            "id": 4,
            "ok": True,
            "counted": True,
            "stop": False,
        }
        assert hive.agents.live("iris").state == "idle"
        assert await peer.ask({**ack, "id": 5}) == {"id": 5, "ok": True, "counted": True, "stop": False}
        other = {**ack, "id": 6, "outcome": "failed"}
        assert await peer.ask(other) == {"id": 6, "ok": True, "counted": False, "stop": False}
        assert await peer.ask(lines) == {"id": 3, "ok": True, "kept": 0, "running": False}
        await hive.say("hm1nd", "iris", "again")
        assert (await peer.ask(LEASE))["session"] == "s-1"
    assert [turn["usage"] for turn in await hive.turns.recent("iris")] == [None, {"output_tokens": 3}]


async def test_a_lease_waits_for_mail(hive: Services, door: Path) -> None:
    async with greeted(door) as peer:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        await hive.say("hm1nd", "iris", "hello")
        assert (await peer.read())["message"]["body"] == "hello"


async def test_settings_that_were_deployed_meanwhile_come_with_the_next_lease(hive: Services, door: Path) -> None:
    async with greeted(door) as peer:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        await hive.sql("UPDATE agents SET settings = ? WHERE name = 'iris'", json.dumps({**SETTINGS, "model": "opus"}))
        await hive.say("hm1nd", "iris", "hello")
        assert (await peer.read())["settings"]["model"] == "opus"


async def test_a_hang_up_while_a_lease_waits_frees_the_agent_for_the_next_hello(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    async with greeted(door) as peer:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
    await wait_free(desk)
    message = await hive.say("hm1nd", "iris", "hello")
    async with greeted(door, instance="two") as peer:
        got = (await peer.ask(LEASE))["message"]
        assert (got["id"], got["attempt"]) == (message, 1)


async def test_a_hang_up_behind_many_requests_frees_the_agent_too(desk: HarnessDesk, door: Path) -> None:
    async with greeted(door) as peer:
        with contextlib.suppress(trio.BrokenResourceError):  # the host hangs up first when it has seen enough
            for number in range(100):
                await peer.send({**LEASE, "id": number})
        await wait_free(desk)


async def test_a_turn_that_its_harness_left_is_lost_and_its_message_comes_again(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        first = await peer.ask(LEASE)
    await wait_free(desk)
    async with greeted(door, instance="two") as peer:
        again = await peer.ask(LEASE)
        assert (again["message"]["id"], again["message"]["attempt"]) == (first["message"]["id"], 2)
        late = {"id": 3, "op": "ack", "turn": first["turn"], "fence": first["fence"], "outcome": "done"}
        assert (await peer.ask(late))["counted"] is False


async def test_a_harness_that_comes_back_with_its_turn_goes_on_with_it(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
    await wait_free(desk)
    async with greeted(door, fences=["another", lease["fence"]]) as peer:
        assert hive.agents.live("iris").state == "thinking"
        ack = {"id": 3, "op": "ack", "turn": lease["turn"], "fence": lease["fence"], "outcome": "done"}
        assert (await peer.ask(ack))["counted"] is True


async def test_a_stop_ends_a_lease_that_waits_and_is_told_with_the_ack(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    async with greeted(door) as peer:
        await peer.send(LEASE)
        await trio.testing.wait_all_tasks_blocked()
        desk.ask_to_stop()
        assert await peer.read() == {"id": 2, "ok": True, "stop": True}
        await hive.say("hm1nd", "iris", "too late")
        assert await peer.ask(LEASE) == {"id": 2, "ok": True, "stop": True}
    assert await hive.value("SELECT state FROM deliveries") == "queued"


async def test_a_stop_in_the_middle_of_a_turn_lets_the_turn_end(hive: Services, desk: HarnessDesk, door: Path) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        desk.ask_to_stop()
        lines = {"id": 3, "op": "lines", "turn": lease["turn"], "first": 0, "lines": ["a"]}
        assert (await peer.ask(lines))["kept"] == 1
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": lease["fence"], "outcome": "done"}
        assert await peer.ask(ack) == {"id": 4, "ok": True, "counted": True, "stop": True}


OLD_HELLO = {**HELLO, "version": OLDEST_VERSION}


async def test_a_harness_of_an_older_version_finishes_its_turn_and_gets_no_other(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
    await wait_free(desk)
    async with connect(door) as old:
        hello = await old.ask({**OLD_HELLO, "fences": [lease["fence"]]})
        assert hello == {"id": 1, "ok": True, "version": OLDEST_VERSION, "agent": "iris", "role": "agent"}
        assert hive.agents.live("iris").state == "thinking"
        lines = {"id": 3, "op": "lines", "turn": lease["turn"], "first": 0, "lines": ["a"]}
        assert await old.ask(lines) == {"id": 3, "ok": True, "kept": 1, "running": True}
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": lease["fence"], "outcome": "done", "next": "f-2"}
        assert await old.ask(ack) == {"id": 4, "ok": True, "counted": True, "stop": True}
        assert await old.ask(LEASE) == {"id": 2, "ok": True, "stop": True}
    await wait_free(desk)
    assert await hive.states() == {1: "acked", 2: "queued"}
    async with greeted(door, instance="two") as new:
        assert (await new.ask(LEASE))["message"]["body"] == "1"


async def test_a_harness_of_an_older_version_that_waits_is_told_to_stop_and_events_say_once_why(
    hive: Services, door: Path
) -> None:
    for _ in range(2):
        async with connect(door) as old:
            assert (await old.ask(OLD_HELLO))["ok"]
            assert await old.ask(LEASE) == {"id": 2, "ok": True, "stop": True}
    told = [
        json.loads(row["data"]) for row in await hive.store.rows("SELECT * FROM events WHERE kind = ?", (OUTDATED,))
    ]
    assert told == [{"version": OLDEST_VERSION, "current": PROTOCOL_VERSION, "turn": None}]


async def test_a_lease_asked_again_after_a_lost_connection_is_the_same_turn(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        first = await peer.ask(LEASE)
    await wait_free(desk)
    async with greeted(door, fences=[LEASE["fence"]]) as peer:
        assert await peer.ask(LEASE) == first
        assert (await peer.ask({**LEASE, "fence": "f-2"}))["error"]["code"] == "conflict"


async def test_an_ack_that_names_a_fence_brings_the_next_lease(hive: Services, door: Path) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": "f-1", "outcome": "done", "next": "f-2"}
        answer = await peer.ask(ack)
        assert (answer["counted"], answer["stop"]) == (True, False)
        assert (answer["lease"]["fence"], answer["lease"]["message"]["body"]) == ("f-2", "1")
        assert (answer["lease"]["settings"], answer["lease"]["credential"]) == (SETTINGS, "api_key")
        assert await peer.ask(ack) == answer
        assert hive.agents.live("iris").state == "thinking"
        last = {**ack, "turn": answer["lease"]["turn"], "fence": "f-2", "next": "f-3"}
        assert await peer.ask(last) == {"id": 4, "ok": True, "counted": True, "stop": False}
        assert hive.agents.live("iris").state == "idle"


async def test_an_ack_that_says_until_when_its_program_is_limited_closes_that_agent_alone(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude')")
    credentials = Credentials(hive.state_dir, {"ANTHROPIC_API_KEY": "sk-ant-api03-canary"})
    breaker = Breaker(hive.store, credentials, hive.agents.access, clock=hive.clock)
    await breaker.load()
    desk.limited = partial(breaker.claimed, desk.name)
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": "f-1", "outcome": "waiting", "next": "f-2"}
        until_ms = hive.now_ms() + 60_000
        assert "lease" not in await peer.ask({**ack, "reason": "rate_limited", "limited_until_ms": until_ms})
        assert (hive.agents.live("iris").state, hive.agents.live("iris").until_ms) == ("rate_limited", until_ms)
        assert hive.agents.access.closed(AgentName("damocles")) is None
        await breaker.resume("default", OPERATOR)
        # It is the word of a turn that runs: of one that has ended it counts for nothing.
        await peer.ask({**ack, "next": None, "limited_until_ms": until_ms})
        assert hive.agents.access.closed(desk.name) is None


async def test_an_ack_brings_no_lease_to_a_harness_that_shall_stop(
    hive: Services, desk: HarnessDesk, door: Path
) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        desk.ask_to_stop()
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": "f-1", "outcome": "done", "next": "f-2"}
        assert await peer.ask(ack) == {"id": 4, "ok": True, "counted": True, "stop": True}
    assert await hive.states() == {1: "acked", 2: "queued"}


async def test_a_harness_hears_that_its_turn_was_cancelled_and_renews_no_other_agents(
    hive: Services, door: Path
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    await hive.say("hm1nd", "damocles", "hello")
    other = (await hive.broker.lease(AgentName("damocles"))).turn
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        quiet = {"id": 3, "op": "lines", "turn": lease["turn"], "first": 0, "lines": []}
        assert (await peer.ask(quiet))["running"] is True
        assert (await peer.ask({**quiet, "turn": other.id}))["running"] is False
        await hive.broker.cancel_turn(AgentName("iris"), AgentName("operator"))
        assert (await peer.ask(quiet))["running"] is False
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": "f-1", "outcome": "done"}
        assert (await peer.ask(ack))["counted"] is False


# -- claims that are refused ------------------------------------------------------------------------------------------

GOOD_LINES = {"id": 3, "op": "lines", "turn": 1, "first": 0, "lines": ["a"]}
GOOD_ACK = {"id": 4, "op": "ack", "turn": 1, "fence": "f", "outcome": "done"}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"lines": ["x"] * (LINES_PER_REQUEST + 1)}, f"the limit is {LINES_PER_REQUEST}"),
        ({"lines": ["x" * (STREAM_LINE_LIMIT_BYTES + 1)]}, "65,536 bytes"),
        ({"lines": ["é" * (STREAM_LINE_LIMIT_BYTES // 2 + 1)]}, "65,536 bytes"),
        ({"lines": "text"}, "list of strings"),
        ({"lines": [1]}, "list of strings"),
        ({"lines": None}, "list of strings"),
        ({"first": -1}, "`first`"),
        ({"first": True}, "`first`"),
        ({"first": 2**40}, "`first`"),
        ({"first": "0"}, "`first`"),
        ({"turn": 0}, "a turn"),
        ({"turn": 2**63}, "a turn"),
        ({"turn": None}, "a turn"),
    ],
)
async def test_lines_that_pass_a_limit_are_refused_with_it_and_the_connection_lives(
    door: Path, change: dict[str, Any], cause: str
) -> None:
    async with greeted(door) as peer:
        error = (await peer.ask({**GOOD_LINES, **change}))["error"]
        assert error["code"] == "usage"
        assert cause in error["message"]
        assert (await peer.ask(GOOD_LINES)) == {"id": 3, "ok": True, "kept": 0, "running": False}


async def test_as_many_and_as_long_lines_as_allowed_are_kept(hive: Services, door: Path) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        lines = ["é" * (STREAM_LINE_LIMIT_BYTES // 2)] * LINES_PER_REQUEST
        request = {"id": 3, "op": "lines", "turn": lease["turn"], "first": 0, "lines": lines}
        await peer.send_bytes(json.dumps(request, ensure_ascii=False).encode() + b"\n")
        assert (await peer.read())["kept"] == LINES_PER_REQUEST


@pytest.mark.parametrize(
    "change",
    [
        {"turn": "1"},
        {"turn": -1},
        {"fence": None},
        {"fence": 7},
        {"outcome": None},
        {"outcome": "lost"},
        {"outcome": ["done"]},
        {"outcome": "x" * 10_000},
    ],
)
async def test_a_malformed_ack_is_refused_and_the_connection_lives(door: Path, change: dict[str, Any]) -> None:
    async with greeted(door) as peer:
        assert (await peer.ask({**GOOD_ACK, **change}))["error"]["code"] == "usage"
        assert (await peer.ask(GOOD_ACK)) == {"id": 4, "ok": True, "counted": False, "stop": False}


DEEP: Any = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    "change",
    [
        {"error": "half \ud800"},
        {"error": DEEP},
        {"error": "x" * 100_000},
        {"error": {"a": 1}},
        {"session": "\udc00"},
        {"session": "\x1b[2J"},
        {"session": "x" * 10_000},
        {"session": 7},
        {"usage": DEEP},
        {"usage": {"a": "\ud800"}},
        {"usage": ["x" * 500_000]},
        {"usage": {str(n): n for n in range(20_000)}},
        {"usage": "text"},
    ],
)
async def test_whatever_an_ack_claims_it_counts_and_little_of_it_is_kept(
    hive: Services, door: Path, change: dict[str, Any]
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        lease = await peer.ask(LEASE)
        ack = {"id": 4, "op": "ack", "turn": lease["turn"], "fence": lease["fence"], "outcome": "failed"}
        assert await peer.ask({**ack, **change}) == {"id": 4, "ok": True, "counted": True, "stop": False}
    sizes = "SELECT length(coalesce(error, '')) + length(coalesce(usage, '')) FROM turns"
    assert await hive.value(sizes) < 20_000
    session = (await hive.agents.get("iris")).session or ""
    assert len(session) <= 64
    assert session.isprintable()


@pytest.mark.parametrize("fence", ["\ud800", "\0", "é", "", "x" * (FENCE_LIMIT + 1), "x" * 100_000, 7, ["f"]])
async def test_a_fence_is_a_short_word_of_visible_characters(hive: Services, door: Path, fence: object) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        for request in (
            {**HELLO, "fences": [fence]},
            {**LEASE, "fence": fence},
            {**GOOD_ACK, "fence": fence},
            {**GOOD_ACK, "next": fence},
        ):
            error = (await peer.ask(request))["error"]
            assert (error["code"], "cannot use the fence" in error["message"]) == ("usage", True)
    assert await hive.value("SELECT count(*) FROM turns") == 0


@pytest.mark.parametrize("fences", [None, "f-1", {"f-1": 1}, ["a", "b", "c"]])
async def test_a_hello_names_at_most_two_fences_in_a_list(door: Path, fences: object) -> None:
    async with connect(door) as peer:
        assert "a list of at most 2" in (await peer.ask({**HELLO, "fences": fences}))["error"]["message"]
        assert (await peer.ask(HELLO))["ok"]


@pytest.mark.parametrize(
    "data",
    [
        b"junk\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"{}\n",
        b'{"op":"fly"}\n',
        b'{"op":["hello"]}\n',
        b'{"id":{"a":[1]},"op":null}\n',
        b'{"op":"lease","id":' + b"[" * 900 + b"]" * 900 + b"}\n",
        b'{"op":"fly","id":1e999}\n',
        b'{"op":"fly","id":NaN}\n',
        b"[" * 100_000 + b"\n",
        b"x" * (REQUEST_LIMIT_BYTES + 1) + b"\n",
    ],
    ids=lambda data: repr(data[:30]),
)
async def test_garbage_is_answered_with_what_is_wrong_and_the_connection_lives(door: Path, data: bytes) -> None:
    async with connect(door) as peer:
        await peer.send_bytes(data)
        answer = await peer.read()
        assert (answer["ok"], answer["error"]["code"]) == (False, "usage")
        assert (await peer.ask(HELLO))["ok"]


async def test_a_harness_that_never_reads_is_no_harm(desk: HarnessDesk, door: Path) -> None:
    async with connect(door) as peer:
        for _ in range(50):
            await peer.send_bytes(b"junk\n" * 100)
        await trio.testing.wait_all_tasks_blocked()
    async with greeted(door, instance="two"):
        assert desk.instance == "two"


JUNK = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(["hello", "lease", "lines", "ack", "fly"]).map(lambda op: json.dumps({"op": op, "id": 1}).encode()),
    st.dictionaries(
        st.sampled_from(
            ["id", "op", "turn", "fence", "fences", "next", "first", "lines", "outcome", "version", "instance", "usage"]
        ),
        st.sampled_from(["hello", "lines", "ack", "lease"]) | st.none() | st.integers() | st.text() | st.just([[]]),
        max_size=6,
    ).map(lambda obj: json.dumps(obj).encode()),
).map(lambda data: data.replace(b"\n", b" ") + b"\n")


@settings(deadline=None, max_examples=15)
@given(st.lists(JUNK, max_size=20))
def test_no_junk_keeps_the_next_harness_from_its_turn(junk: list[bytes]) -> None:
    async def check(hive: Services) -> None:
        desk = desk_for(hive)
        with tempfile.TemporaryDirectory() as folder:
            async with serve(Path(folder) / "h.sock", desk.serve) as door:
                async with connect(door) as peer:
                    await peer.send_bytes(b"".join(junk) + b'{"half": ')
                    await peer.stream.send_eof()
                    await peer.wait_hung_up()
                await wait_free(desk)
                await hive.say("operator", "iris", "hello")
                async with greeted(door, instance="after") as peer:
                    assert (await peer.ask(LEASE))["message"]["body"] == "hello"

    run_in_hive(check, "iris")


async def test_half_a_line_of_a_harness_that_still_reads_is_answered_with_its_cause_then_the_end(
    desk: HarnessDesk, door: Path
) -> None:
    async with greeted(door) as peer:
        await peer.send_bytes(b'{"id": 2, "op"')
        await peer.stream.send_eof()
        answer = await peer.read()
        assert (answer["id"], answer["ok"], answer["error"]["code"]) == (None, False, "usage")
        assert "its newline is missing after 14 bytes" in answer["error"]["message"]
        with pytest.raises(trio.EndOfChannel):
            await peer.read()
    await wait_free(desk)


async def test_half_a_line_of_a_harness_that_is_gone_frees_the_agent_and_logs_nothing(
    desk: HarnessDesk, door: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for lingers in (True, False):
        async with greeted(door) as peer:
            if not lingers:  # a reset instead of an end
                await peer.send(LEASE)
            await peer.send_bytes(b'{"id": 2, "op"')
        await wait_free(desk)
    assert caplog.messages == []


# -- what a harness claims ---------------------------------------------------------------------------------------------


def state(name: object, detail: object = "", until_ms: object = None) -> dict[str, Any]:
    return {"state": name, "detail": detail, "until_ms": until_ms}


@pytest.mark.parametrize(
    "claimed",
    [
        state("thinking"),
        state("tool", "Bash"),
        state("rate_limited", "five_hour", 1_800_000_000_000),
        state("stuck", "never_started"),
    ],
)
async def test_what_the_program_does_is_shown_with_its_detail_and_its_end(
    hive: Services, door: Path, claimed: dict[str, Any]
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        turn = (await peer.ask(LEASE))["turn"]
        answer = await peer.ask({"id": 3, "op": "lines", "turn": turn, "first": 0, "lines": ["{}"], "state": claimed})
        assert (answer["kept"], answer["running"]) == (1, True)
        live = hive.agents.live("iris")
        assert (live.state, live.detail, live.until_ms) == tuple(claimed.values())


async def test_a_harness_that_lost_its_turn_in_silence_is_shown_as_stuck_and_hangs_until_it_speaks(
    hive: Services, tmp_path: Path
) -> None:
    hive.broker = Broker(hive.store, Limits(lease_silence_s=0.2), silent=lambda _, after_s: desk.lost_turn(after_s))
    desk = desk_for(hive)
    await hive.say("hm1nd", "iris", "hello")
    async with (
        serve(tmp_path / "harness.sock", desk.serve) as door,
        greeted(door) as peer,
        trio.open_nursery() as nursery,
    ):
        turn = (await peer.ask(LEASE))["turn"]
        await peer.ask(
            {"id": 3, "op": "lines", "turn": turn, "first": 0, "lines": ["x"], "state": state("tool", "Bash")}
        )
        nursery.start_soon(hive.broker.serve_leases)
        with trio.fail_after(PATIENCE_S), hive.store.bus.listen("live") as listener:
            while hive.agents.live("iris").state == "tool":
                await listener.wait()
        nursery.cancel_scope.cancel()
        live, why = hive.agents.live("iris"), "its harness said nothing for 0 s and lost its turn"
        assert (live.state, live.detail.partition(";")[0], await desk.hung()) == ("stuck", why, why)
        ack = {"id": 4, "op": "ack", "turn": turn, "fence": "f-1", "outcome": "cancelled"}
        assert not (await peer.ask(ack))["counted"]
        assert (hive.agents.live("iris").state, desk.silence.why) == ("idle", "its harness asked for no turn for 1 s")
    assert desk.silence.why == "its harness was not connected for 1 s"


@pytest.mark.parametrize("after", ["hello", "ack", "stop"])
async def test_a_harness_that_asks_for_no_turn_hangs_and_one_that_waits_for_its_turn_does_not(
    hive: Services, tmp_path: Path, after: str
) -> None:
    hive.broker = Broker(hive.store, Limits(lease_silence_s=0.1))
    desk = desk_for(hive)
    async with serve(tmp_path / "harness.sock", desk.serve) as door, greeted(door) as peer:
        if after == "ack":
            await hive.say("hm1nd", "iris", "hello")
            turn = (await peer.ask(LEASE))["turn"]
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.7):
                await desk.hung()  # in a turn it is the turn that counts
            await peer.ask({"id": 4, "op": "ack", "turn": turn, "fence": "f-1", "outcome": "done"})
        elif after == "stop":
            await peer.send({**LEASE, "fence": "f-2"})
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.7):
                await desk.hung()  # it waits for its turn
            desk.ask_to_stop()
            assert (await peer.read())["stop"]
        with trio.fail_after(PATIENCE_S):
            assert await desk.hung() == "its harness asked for no turn for 0 s"


async def test_a_harness_whose_lines_the_disk_does_not_take_is_not_silent(
    hive: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.store.writer.LOCKED_MS", 1)
    monkeypatch.setattr("hive_core.store.door.BUSY_REST_S", 0.01)
    silence_s = 1.0
    hive.broker = Broker(hive.store, Limits(lease_silence_s=silence_s))
    await hive.say("hm1nd", "iris", "hello")
    other = sqlite3.connect(hive.state_dir / "hive.sqlite", isolation_level=None)
    async with (
        serve(tmp_path / "harness.sock", desk_for(hive).serve) as door,
        greeted(door) as peer,
        trio.open_nursery() as nursery,
    ):
        lines = {"id": 3, "op": "lines", "turn": (await peer.ask(LEASE))["turn"], "first": 0, "lines": ["x"]}
        nursery.start_soon(hive.broker.serve_leases)
        with contextlib.closing(other):
            other.execute("BEGIN IMMEDIATE")
            until = trio.current_time() + 2 * silence_s
            while trio.current_time() < until:
                assert (await peer.ask(lines))["error"]["code"] == "unavailable"
        while trio.current_time() < until + silence_s:
            assert (await peer.ask(lines))["running"]
        nursery.cancel_scope.cancel()
    assert await hive.value("SELECT state FROM turns") == "running"


async def test_a_harness_whose_lines_a_slow_disk_keeps_waiting_is_not_silent(
    hive: Services, tmp_path: Path, mock_clock: MockClock
) -> None:
    hive.broker = Broker(hive.store, Limits(lease_silence_s=60))
    await hive.say("hm1nd", "iris", "hello")
    async with (
        serve(tmp_path / "harness.sock", desk_for(hive).serve) as door,
        greeted(door) as peer,
        trio.open_nursery() as nursery,
    ):
        lines = {"id": 3, "op": "lines", "turn": (await peer.ask(LEASE))["turn"], "first": 0, "lines": ["x"]}
        async with held_writer(hive.store, nursery):
            await peer.send(lines)
            nursery.start_soon(hive.broker.serve_leases)
            for _ in range(10):
                mock_clock.jump(15)
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await peer.read())["running"]
        await hive.store.write(lambda tx: None)  # what waited is written
        assert (await peer.ask(lines))["running"]
        nursery.cancel_scope.cancel()
    assert await hive.value("SELECT state FROM turns") == "running"


async def test_a_silent_turn_of_an_agent_that_is_down_leaves_it_shown_as_down(hive: Services) -> None:
    hive.agents.observe("iris", "crashed", "ended with code 1")
    hive.agents.observe_silence("iris", 60)
    assert hive.agents.live("iris").state == "crashed"


async def test_a_state_of_a_turn_that_is_over_is_not_shown(hive: Services, door: Path) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        turn = (await peer.ask(LEASE))["turn"]
        await hive.broker.cancel_turn(AgentName("iris"), AgentName("operator"))
        await peer.ask({"id": 3, "op": "lines", "turn": turn, "first": 0, "lines": [], "state": state("compacting")})
        assert hive.agents.live("iris").state != "compacting"


@pytest.mark.parametrize(
    "claimed",
    [state("down"), state("stuck", "well"), state(["tool"]), state("tool", 7), state("tool", None), "tool", 7, [], {}],
)
async def test_a_state_of_another_form_costs_no_line(hive: Services, door: Path, claimed: object) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        turn = (await peer.ask(LEASE))["turn"]
        answer = await peer.ask({"id": 3, "op": "lines", "turn": turn, "first": 0, "lines": ["{}"], "state": claimed})
        assert answer["kept"] == 1
        assert hive.agents.live("iris").state == "thinking"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)
@given(ANYTHING, ANYTHING, ANYTHING)
def test_whatever_is_claimed_what_is_kept_is_short_and_of_its_form(one: object, two: object, three: object) -> None:
    seen = claimed_state(state(one, two, three)) or claimed_state(state("tool", two, three))
    assert seen is None or (len(seen.detail.encode()) <= 240 and isinstance(seen.until_ms, int | None))
    told = claimed_end({"reason": one, "limited_until_ms": two, "context": three, "session_lost": two})
    numbers = (told.limited_until_ms, told.context_tokens, told.context_window)
    assert all(number is None or 0 < number < 2**63 for number in numbers)


@pytest.mark.parametrize("name", ["\ud800", "x" * 1000], ids=["half", "long"])
def test_a_tool_of_any_name_can_be_shown(name: str) -> None:
    seen = claimed_state(state("tool", name))
    assert seen is not None
    assert 0 < len(seen.detail.encode()) <= 240


async def test_an_ack_keeps_why_the_turn_failed_and_how_full_the_session_is(hive: Services, door: Path) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        turn = (await peer.ask(LEASE))["turn"]
        told = {"reason": "overloaded", "context": {"tokens": 7, "window": 200}, "session_lost": True, "next": None}
        ack = {"id": 3, "op": "ack", "turn": turn, "fence": "f-1", "outcome": "failed", "error": "529"}
        assert (await peer.ask({**ack, **told}))["counted"]
    assert await hive.value("SELECT reason FROM turns") == "overloaded"
    row = await hive.store.row("SELECT context_tokens, context_window FROM agents WHERE name = 'iris'")
    assert row is not None
    assert tuple(row) == (7, 200)
    assert "session_lost" in await hive.kinds()


@pytest.mark.parametrize(
    "told",
    [
        {"reason": "because"},
        {"reason": ["stuck"]},
        {"context": {"tokens": -1, "window": "many"}},
        {"context": [1, 2]},
        {"limited_until_ms": 2**80},
        {"session_lost": "yes"},
    ],
)
async def test_a_claim_of_another_form_costs_no_ack(hive: Services, door: Path, told: dict[str, Any]) -> None:
    await hive.say("hm1nd", "iris", "hello")
    async with greeted(door) as peer:
        turn = (await peer.ask(LEASE))["turn"]
        ack = {"id": 3, "op": "ack", "turn": turn, "fence": "f-1", "outcome": "done", "next": None}
        assert (await peer.ask({**ack, **told}))["counted"]
    row = await hive.store.row("SELECT reason, context_tokens, rests_until_ms FROM turns JOIN agents ON name = agent")
    assert row is not None
    assert tuple(row) == (None, None, None)
    assert "session_lost" not in await hive.kinds()
