"""How a message is taken in: whom it reaches, what is refused, what is held."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from hive_core.git.repos import harness_settings
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, OPERATOR, SYSTEM, AgentName, parse_body
from hive_core.services import rates
from hive_core.services.agents import set_deployed
from hive_core.services.archive import Archive, Query
from hive_core.services.broker import Broker
from hive_core.services.leases import Take
from hive_core.services.post import Cause, Letter, post, put_message
from hive_core.services.question_words import Ask
from hive_core.settings import parse_agent_toml
from tests.hives import PATIENCE_S, Services, held_writer, open_services

IRIS, DAMOCLES, HM1ND = (AgentName(name) for name in ("iris", "damocles", "hm1nd"))
HOUR_S = 3600
Answer = dict[str, Any]


@asynccontextmanager
async def hive_with(folder: Path, **limits: Any) -> AsyncIterator[Services]:
    """A hive of hm1nd, iris and damocles with these limits."""
    async with open_services(folder, limits=Limits(**limits)) as hive:
        await hive.add_agents("hm1nd", "iris", "damocles")
        yield hive


async def send(hive: Services, sender: str, to: str | Sequence[str], body: str = "hello", **more: Any) -> Answer:
    recipients = AgentName(to) if isinstance(to, str) else [AgentName(name) for name in to]
    return await hive.broker.send(AgentName(sender), recipients, parse_body(body), **more)


async def refusal(hive: Services, sender: str, to: str | Sequence[str], body: str = "hello", **more: Any) -> Refusal:
    """Why this is refused; it leaves no message."""
    count = "SELECT count(*) FROM messages"
    before = await hive.value(count)
    with pytest.raises(Refusal) as caught:
        await send(hive, sender, to, body, **more)
    assert await hive.value(count) == before
    return caught.value


async def deploy(hive: Services, agent: str, toml: str) -> None:
    """Let an agent run on these settings, as the gate does."""
    settings = harness_settings(parse_agent_toml(toml.encode()), "You are a test.")
    await hive.store.write(lambda tx: set_deployed(tx, agent, "1" * 40, settings))


async def chain(hive: Services, message: int) -> tuple[Any, ...]:
    """What a message was caused by: (cause, its number, where the chain began, how many turns lie between)."""
    (row,) = await hive.store.rows("SELECT cause, cause_id, chain_id, hops FROM messages WHERE id = ?", (message,))
    return tuple(row)


async def take_turn(hive: Services, agent: str, *sends: tuple[str, str]) -> list[Answer]:
    """A turn of an agent with its next message, in which it sends these."""
    with trio.fail_after(PATIENCE_S):
        begun = await hive.broker.lease(AgentName(agent))
    answers = [await send(hive, agent, to, body) for to, body in sends]
    await hive.broker.ack(AgentName(agent), begun.turn, "done")
    return answers


# -- to whom ----------------------------------------------------------------------------------------------------------


async def test_a_message_to_many_is_one_message_with_a_delivery_each(hive: Services) -> None:
    answer = await send(hive, "operator", ["iris", "damocles", "iris"])
    assert answer == {"message": 1}
    sql = "SELECT message_id, recipient, state FROM deliveries ORDER BY recipient"
    assert [tuple(row) for row in await hive.store.rows(sql)] == [(1, "damocles", "queued"), (1, "iris", "queued")]
    assert await hive.value("SELECT count(*) FROM messages") == 1
    assert (await hive.kinds()).count("message_sent") == 1
    begun = await hive.broker.lease(IRIS)
    await hive.broker.ack(IRIS, begun.turn, "failed")
    assert await hive.states("damocles") == {1: "queued"}
    assert (await hive.broker.lease(DAMOCLES)).message["attempt"] == 1


async def test_a_message_to_everyone_reaches_every_agent_but_its_sender_and_not_the_operator(hive: Services) -> None:
    await send(hive, "iris", EVERYONE)
    sql = "SELECT recipient FROM deliveries WHERE message_id = ? ORDER BY 1"
    assert [row[0] for row in await hive.store.rows(sql, (1,))] == ["damocles", "hm1nd"]
    await send(hive, "operator", EVERYONE)
    assert [row[0] for row in await hive.store.rows(sql, (2,))] == ["damocles", "hm1nd", "iris"]


async def test_a_message_to_everyone_where_nobody_else_is_is_refused(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        await hive.add_agents("iris")
        said = await refusal(hive, "iris", EVERYONE)
    assert (said.code, said.message) == (
        "not_found",
        "cannot send to everyone: there is nobody else you may write to",
    )


async def test_a_message_to_nobody_is_refused_by_name_and_nobody_else_gets_it(hive: Services) -> None:
    said = await refusal(hive, "hm1nd", ["iris", "argus", "argo"])
    assert (said.code, said.message) == (
        "not_found",
        "cannot send to argus, argo: no agent has that name; `list_agents` or `hive list` shows them",
    )
    assert await hive.states() == {}
    assert "message_sent" not in await hive.kinds()


async def test_more_recipients_than_the_limit_are_refused_with_it(tmp_path: Path) -> None:
    async with hive_with(tmp_path, fan_out=2) as hive:
        await send(hive, "operator", ["iris", "damocles"])
        for to in (["iris", "damocles", "hm1nd"], EVERYONE):
            said = await refusal(hive, "operator", to)
            assert said.message == "cannot send to 3 recipients at once: the limit is 2 (fan_out)"


async def test_first_deliveries_keep_the_order_of_sender_and_recipient_whoever_else_writes(hive: Services) -> None:
    async def write(sender: str) -> None:
        for n in range(10):
            await send(hive, sender, ["iris", "damocles"] if n % 2 else "iris", f"{sender} {n}")

    async with trio.open_nursery() as nursery:
        for sender in ("hm1nd", "damocles", "operator"):
            nursery.start_soon(write, sender)
    begun = await hive.broker.lease(IRIS)
    more = (await hive.broker.recv(IRIS, 32, 0))["messages"]
    got = [message["body"] for message in [begun.message, *more]]
    for sender in ("hm1nd", "damocles", "operator"):
        assert [body for body in got if body.startswith(sender)] == [f"{sender} {n}" for n in range(10)]


# -- replies and threads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sender", "may"), [("hm1nd", True), ("iris", True), ("damocles", False), ("operator", True), ("system", True)]
)
async def test_one_replies_only_to_what_one_sent_or_received(hive: Services, sender: str, may: bool) -> None:
    message = await hive.say("hm1nd", "iris", "hello")
    if may:
        reply = await hive.say(sender, "iris", "yes", in_reply_to=message)
        assert (await hive.broker.messages.one(reply) or {})["in_reply_to"] == message
    else:
        said = await refusal(hive, sender, "iris", in_reply_to=message)
        assert said.message == f"cannot reply to message {message}: you neither sent nor received it"


async def test_a_reply_to_no_message_is_refused(hive: Services) -> None:
    for sender in ("iris", "operator"):
        assert "cannot reply to message 77" in (await refusal(hive, sender, "hm1nd", in_reply_to=77)).message


async def test_a_reply_to_a_reply_is_in_the_thread_that_the_first_message_began(hive: Services) -> None:
    first = await hive.say("hm1nd", "iris", "a")
    second = await hive.say("iris", "hm1nd", "b", in_reply_to=first)
    third = await hive.say("hm1nd", "iris", "c", in_reply_to=second)
    await hive.say("hm1nd", "iris", "another")
    rows = await hive.store.rows("SELECT thread_id FROM messages ORDER BY id")
    assert [row[0] for row in rows] == [None, first, first, None]
    assert third == 3


async def test_a_message_to_everyone_takes_the_room_of_many_in_a_batch(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it one among 500 of its kind, a swarm of 200 would stand still until 100,000 rows are written."""
    weights: list[int] = []
    write_together = hive.store.write_together

    async def note_weight(function: Any, item: Any, weight: int) -> Any:
        weights.append(weight)
        return await write_together(function, item, weight)

    monkeypatch.setattr(hive.store, "write_together", note_weight)
    await hive.broker.send(OPERATOR, EVERYONE, parse_body("a"))
    await hive.broker.send(OPERATOR, (IRIS, HM1ND), parse_body("b"))
    assert weights == [hive.broker.limits.fan_out, 2]


async def test_a_reply_in_the_batch_of_what_it_answers_finds_it_and_its_thread(hive: Services) -> None:
    letters = [
        Letter(HM1ND, (IRIS,), parse_body("a")),
        Letter(IRIS, (HM1ND,), parse_body("b"), in_reply_to=1),
        Letter(HM1ND, (IRIS,), parse_body("c"), in_reply_to=2),
    ]
    answers = await hive.store.write(lambda tx: [one.unwrap() for one in post(tx, letters, Limits())])
    assert answers == [{"message": 1}, {"message": 2}, {"message": 3}]
    rows = await hive.store.rows("SELECT thread_id FROM messages ORDER BY id")
    assert [row[0] for row in rows] == [None, 1, 1]


# -- client ids -------------------------------------------------------------------------------------------------------


async def test_the_same_key_sent_again_is_one_message_and_gets_the_first_answer_also_after_a_restart(
    hive: Services,
) -> None:
    first = await hive.say("hm1nd", "iris", "hello", key="k")
    assert await hive.say("hm1nd", "iris", "hello", key="k") == first
    hive.broker = Broker(hive.store)
    assert await hive.say("damocles", "iris", "hello", key="k") != first  # a key is its sender's own
    assert await hive.say("hm1nd", "iris", "hello") != first
    assert await hive.value("SELECT count(*) FROM messages") == 3


LARGE = "x" * 100_000


@pytest.mark.parametrize(
    ("sender", "first", "second"),
    [
        ("hm1nd", {}, {"body": "other words"}),
        ("hm1nd", {}, {"recipients": "damocles"}),
        ("hm1nd", {}, {"recipients": ["iris", "damocles"]}),
        ("hm1nd", {}, {"in_reply_to": 1}),
        ("operator", {"recipients": "*"}, {"recipients": "iris"}),
        ("operator", {"recipients": "iris"}, {"recipients": "*"}),
        ("hm1nd", {"body": LARGE}, {"body": f"{LARGE}y"}),
    ],
)
@pytest.mark.parametrize("together", [False, True])
async def test_a_key_that_another_message_has_is_refused_and_says_so(
    hive: Services, sender: str, first: dict[str, Any], second: dict[str, Any], together: bool
) -> None:
    await hive.say("hm1nd", "iris", "before")
    words = {"recipients": "iris", "body": "hello", "in_reply_to": None}

    async def once_more(**changes: Any) -> Any:
        given = {**words, **changes}
        return await hive.broker.send(AgentName(sender), body=parse_body(given.pop("body")), key="k", **given)

    refused: list[str] = []

    async def say(**changes: Any) -> None:
        try:
            await once_more(**changes)
        except Refusal as refusal:
            refused.append(refusal.message)

    async with trio.open_nursery() as nursery:
        if together:
            async with held_writer(hive.store, nursery):
                nursery.start_soon(partial(say, **first))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(partial(say, **{**first, **second}))
                await trio.testing.wait_all_tasks_blocked()
        else:
            await say(**first)
            await say(**{**first, **second})
    (said,) = refused
    why = "message 2 has it, and is another one; give each message a key of its own"
    assert said == f"cannot use this key for this message: {why}"
    assert await hive.value("SELECT count(*) FROM messages") == 2


async def test_whom_everyone_is_may_change_between_two_sends_of_one_message(hive: Services) -> None:
    first = await send(hive, "operator", ["*"], key="k")
    await hive.add_agents("argus")
    assert await send(hive, "operator", ["*"], key="k") == first


async def test_the_same_key_sent_many_times_at_once_is_one_message(hive: Services) -> None:
    answers: list[int] = []

    async def say(key: str) -> None:
        answers.append(await hive.say("hm1nd", "iris", "hello", key=key))

    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        for n in range(12):
            nursery.start_soon(say, f"k{n % 2}")
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(answers) == [1] * 6 + [2] * 6
    assert await hive.value("SELECT count(*) FROM messages") == 2


async def test_messages_without_a_key_are_never_taken_for_one_another(hive: Services) -> None:
    answers: list[int] = []

    async def say(**more: str) -> None:
        answers.append(await hive.say("hm1nd", "iris", "hello", **more))

    async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
        nursery.start_soon(partial(say, key=""))
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            nursery.start_soon(say)
        await trio.testing.wait_all_tasks_blocked()
    assert sorted(answers) == [1, 2, 3, 4]


async def test_a_send_that_was_refused_does_not_use_its_key_up(hive: Services) -> None:
    await refusal(hive, "hm1nd", "argus", key="k")
    await hive.add_agents("argus")
    await send(hive, "hm1nd", "argus", key="k")
    assert await hive.states("argus") == {1: "queued"}


async def test_a_held_message_sent_again_gets_the_first_answer_with_why_it_is_held(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await send(hive, "iris", "damocles")
        first = await send(hive, "iris", ["damocles", "hm1nd"], key="k")
        assert first == {"message": 2, "held": {"damocles": "rate"}}
        assert await send(hive, "iris", ["damocles", "hm1nd"], key="k") == first


# -- policy -----------------------------------------------------------------------------------------------------------


async def test_the_deployed_settings_say_to_whom_an_agent_may_write(hive: Services) -> None:
    await deploy(hive, "iris", 'program = "rehearsal"\nrecipients = ["hm1nd", "operator"]')
    await send(hive, "iris", ["hm1nd", "operator"])
    said = await refusal(hive, "iris", ["hm1nd", "damocles"])
    assert said.code == "refused"
    assert said.message == (
        "cannot send to damocles: the settings of iris allow only hm1nd, operator (recipients in agent.toml); "
        "ask hm1nd for a change"
    )
    await send(hive, "damocles", "iris")  # the other way round is the other's policy
    await send(hive, "iris", EVERYONE)
    sql = "SELECT recipient FROM deliveries WHERE message_id = 3"
    assert [row[0] for row in await hive.store.rows(sql)] == ["hm1nd"]
    await deploy(hive, "iris", 'program = "rehearsal"')
    await send(hive, "iris", "damocles")


async def test_an_agent_that_may_write_to_nobody_is_told_so(hive: Services) -> None:
    await deploy(hive, "iris", "recipients = []")
    assert "allow only nobody" in (await refusal(hive, "iris", "hm1nd")).message
    assert "nobody else you may write to" in (await refusal(hive, "iris", EVERYONE)).message


async def test_the_policy_stays_with_the_host_and_the_rest_goes_to_the_harness(hive: Services) -> None:
    await deploy(hive, "iris", 'program = "rehearsal"\nrecipients = ["hm1nd"]\npair_rate_per_hour = 7')
    assert json.loads(await hive.value("SELECT policy FROM agents WHERE name = 'iris'")) == {
        "recipients": ["hm1nd"],
        "pair_rate_per_hour": 7,
    }
    await send(hive, "hm1nd", "iris")
    told = (await hive.broker.lease(IRIS)).settings or {}
    assert told["program"] == "rehearsal"
    assert not {"policy", "recipients", "pair_rate_per_hour"} & told.keys()


# -- the rate of a pair -----------------------------------------------------------------------------------------------


async def test_messages_of_a_pair_over_its_rate_are_held_for_an_hour_and_nobody_elses(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=3) as hive:
        for _ in range(3):
            assert "held" not in await send(hive, "iris", "damocles")
        assert (await send(hive, "iris", "damocles"))["held"] == {"damocles": "rate"}
        assert (await send(hive, "iris", ["damocles", "hm1nd"]))["held"] == {"damocles": "rate"}
        for sender, to in (("iris", "operator"), ("hm1nd", "damocles"), ("damocles", "iris")):
            assert "held" not in await send(hive, sender, to)
        assert await hive.states("damocles") == {
            1: "queued",
            2: "queued",
            3: "queued",
            4: "held",
            5: "held",
            7: "queued",
        }
        hive.clock.ahead_s += HOUR_S - 61
        assert (await send(hive, "iris", "damocles"))["held"] == {"damocles": "rate"}
        hive.clock.ahead_s += 122  # it is counted by minutes
        assert "held" not in await send(hive, "iris", "damocles")


async def test_a_rate_is_known_after_a_restart(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=3) as hive:
        for _ in range(2):
            await send(hive, "iris", "damocles")
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=3)) as hive:
        held = [(await send(hive, "iris", "damocles")).get("held") for _ in range(2)]
        assert held == [None, {"damocles": "rate"}]
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=5)) as hive:
        await Archive(hive.store, Limits(), tmp_path / "bodies").search(
            Query("hello")
        )  # which notes when the messages were sent
        held = [(await send(hive, "iris", "damocles")).get("held") for _ in range(2)]
        assert held == [None, {"damocles": "rate"}]


async def test_a_message_that_was_rolled_back_counts_for_no_rate(tmp_path: Path) -> None:
    """Whoever raises has the whole batch run once more, and both runs count."""

    async def stumble(hive: Services) -> None:
        with pytest.raises(Refusal):
            await hive.broker.cancel_turn(AgentName("damocles"), OPERATOR)

    async with hive_with(tmp_path, pair_rate_per_hour=4) as hive:
        async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
            for n in range(4):
                nursery.start_soon(send, hive, "iris", "damocles", str(n))
                nursery.start_soon(stumble, hive)
            await trio.testing.wait_all_tasks_blocked()
        assert set((await hive.states("damocles")).values()) == {"queued"}
        assert (await send(hive, "iris", "damocles"))["held"] == {"damocles": "rate"}


async def test_what_went_silent_for_hours_is_forgotten_and_what_speaks_is_not(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=2) as hive:
        await send(hive, "iris", "damocles")
        for _ in range(4):
            hive.clock.ahead_s += HOUR_S * 12
            await send(hive, "iris", "hm1nd")
        assert await hive.store.write(lambda tx: [key[1:] for key in tx.memo if key[0] == "rates"]) == [
            ("iris", "hm1nd")
        ]
        await send(hive, "iris", "hm1nd")
        assert (await send(hive, "iris", "hm1nd"))["held"] == {"hm1nd": "rate"}


async def test_the_operator_and_the_hive_have_no_rate(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        for _ in range(3):
            assert "held" not in await send(hive, "operator", "iris")
            assert "held" not in await send(hive, "system", "iris")


async def test_a_rate_in_the_settings_of_the_sender_is_that_of_its_pairs(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await deploy(hive, "iris", "pair_rate_per_hour = 2")
        held = [(await send(hive, sender, "hm1nd")).get("held") for sender in ("iris", "damocles") for _ in range(3)]
        assert held == [None, None, {"hm1nd": "rate"}, None, {"hm1nd": "rate"}, {"hm1nd": "rate"}]


async def test_the_rate_counts_what_comes_in_one_batch(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=3) as hive:
        async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
            for n in range(10):
                nursery.start_soon(send, hive, "iris", "damocles", str(n))
            await trio.testing.wait_all_tasks_blocked()
        assert sorted((await hive.states("damocles")).values()) == ["held"] * 7 + ["queued"] * 3


async def test_the_hour_is_read_again_but_never_more_than_so_much_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "RECALLED", 2)
    async with hive_with(tmp_path, pair_rate_per_hour=3) as hive:
        for _ in range(3):
            await send(hive, "iris", "damocles")
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=3)) as hive:
        held = [(await send(hive, "iris", "damocles")).get("held") for _ in range(2)]
        assert held == [None, {"damocles": "rate"}]


async def test_a_clock_that_is_ahead_for_a_moment_undoes_no_rate(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=2) as hive:
        for _ in range(2):
            await send(hive, "iris", "damocles")
        hive.clock.ahead_s += 2 * HOUR_S
        await send(hive, "iris", "damocles")
        hive.clock.ahead_s -= 2 * HOUR_S
        assert (await send(hive, "iris", "damocles"))["held"] == {"damocles": "rate"}


async def test_messages_of_the_future_which_a_clock_set_back_leaves_are_not_recent(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await send(hive, "iris", "damocles")
        hive.clock.ahead_s -= 24 * 3600.0
        assert "held" not in await send(hive, "iris", "damocles")
        hive.clock.ahead_s += 24 * 3600.0
        assert (await send(hive, "iris", "damocles"))["held"] == {"damocles": "rate"}


# -- chains -----------------------------------------------------------------------------------------------------------


async def test_every_message_carries_the_chain_that_caused_it(hive: Services) -> None:
    first = (await send(hive, "operator", "iris"))["message"]
    assert await chain(hive, first) == ("operator", None, first, 0)
    (second,) = await take_turn(hive, "iris", ("damocles", "go on"))
    (third,) = await take_turn(hive, "damocles", ("iris", "and on"))
    assert await chain(hive, second["message"]) == ("turn", 1, first, 1)
    assert await chain(hive, third["message"]) == ("turn", 2, first, 2)
    other = (await send(hive, "operator", "hm1nd"))["message"]
    assert await chain(hive, other) == ("operator", None, other, 0)
    system = await hive.store.write(lambda tx: put_message(tx, SYSTEM, IRIS, parse_body("approval_resolved")))
    assert await chain(hive, system) == ("system", None, system, 0)


async def test_what_an_agent_sends_behind_its_turn_belongs_to_the_chain_of_its_last_one(hive: Services) -> None:
    alone = (await send(hive, "iris", "damocles"))["message"]  # it never had a turn
    assert await chain(hive, alone) == ("turn", None, alone, 0)
    first = (await send(hive, "operator", "iris"))["message"]
    await take_turn(hive, "iris")
    behind = (await send(hive, "iris", "damocles"))["message"]
    assert await chain(hive, behind) == ("turn", 1, first, 1)


async def test_a_turn_that_receives_a_message_of_a_longer_chain_goes_on_in_that_one(hive: Services) -> None:
    await send(hive, "operator", "iris", "short")
    long = (await send(hive, "operator", "damocles", "long"))["message"]
    ((deeper),) = await take_turn(hive, "damocles", ("iris", "longer"))
    begun = await hive.broker.lease(IRIS)
    before = (await send(hive, "iris", "hm1nd"))["message"]
    await hive.broker.recv(IRIS, 32, 0)
    after = (await send(hive, "iris", "hm1nd"))["message"]
    assert await chain(hive, before) == ("turn", begun.turn.id, 1, 1)
    assert await chain(hive, deeper["message"]) == ("turn", 1, long, 1)
    assert await chain(hive, after) == ("turn", begun.turn.id, long, 2)


async def test_a_chain_over_its_hop_limit_is_held_until_the_operator_releases_it(tmp_path: Path) -> None:
    async with hive_with(tmp_path, hops=3) as hive:
        await send(hive, "operator", "iris")
        held = None
        for n in range(4):
            sender, to = ("iris", "damocles") if n % 2 == 0 else ("damocles", "iris")
            (answer,) = await take_turn(hive, sender, (to, f"ping {n}"))
            held = answer.get("held")
            assert held == (None if n < 3 else {"iris": "hops"})
        (aside,) = await hive.broker.messages.aside("held")
        assert (aside["id"], aside["recipient"], aside["held"], aside["hops"]) == (5, "iris", "hops", 4)
        assert (await hive.states())[5] == "held"
        with hive.store.bus.listen("mail:iris") as listener:
            assert await hive.broker.messages.release(5, OPERATOR) == ["iris"]
            with trio.fail_after(PATIENCE_S):
                await listener.wait()
        assert await chain(hive, 5) == ("turn", 4, 5, 0)  # the chain begins anew with it
        (answer,) = await take_turn(hive, "iris", ("damocles", "pong"))
        assert "held" not in answer
        assert await chain(hive, answer["message"]) == ("turn", 5, 5, 1)
        sql = "SELECT kind, actor FROM events WHERE message_id = 5"
        assert [tuple(row) for row in await hive.store.rows(sql)] == [("message_released", "operator")]


async def test_a_held_message_that_is_dropped_reaches_nobody(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await send(hive, "iris", "damocles")
        await send(hive, "iris", ["damocles", "hm1nd"])
        assert await hive.broker.messages.drop(2, OPERATOR) == ["damocles"]
        assert await hive.states("damocles") == {1: "queued", 2: "dropped"}
        assert await hive.states("hm1nd") == {2: "queued"}
        assert await hive.broker.messages.aside("held") == []


async def test_a_held_message_wakes_nobody(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await send(hive, "iris", "damocles")
        await take_turn(hive, "damocles")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.broker.lease, DAMOCLES)
            await trio.testing.wait_all_tasks_blocked()
            assert "held" in await send(hive, "iris", "damocles")
            await trio.testing.wait_all_tasks_blocked()
            assert await hive.value("SELECT count(*) FROM turns WHERE state = 'running'") == 0
            nursery.cancel_scope.cancel()


# -- the depth of an inbox --------------------------------------------------------------------------------------------


async def test_one_is_told_as_one(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=1, held_depth=1, pair_rate_per_hour=1) as hive:
        await send(hive, "hm1nd", "iris", "one")
        said = await refusal(hive, "operator", "iris")
        assert "cannot send to iris: 1 message waits there already, which" in said.message
        await hive.broker.lease(IRIS)
        await send(hive, "hm1nd", "iris", "two")
        said = await refusal(hive, "hm1nd", "iris")
        assert "1 message of hm1nd is held for the operator already" in said.message


async def test_a_full_inbox_refuses_by_name_and_counts_what_it_did_not_take(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=2) as hive:
        await send(hive, "hm1nd", "iris", "one")
        await send(hive, "operator", "iris", "two")
        for n in range(12):
            said = await refusal(hive, "hm1nd" if n else "operator", ["iris", "damocles"], key="k")
            assert said.code == "refused"
            assert said.message == (
                "cannot send to iris: 2 messages wait there already, which is the limit (inbox_depth); "
                "send again when some are read"
            )
        assert await hive.states("damocles") == {}
        assert (await hive.agents.get("iris")).refused == 12
        # Each counts, but a flood leaves few events.
        sql = "SELECT actor, agent, data FROM events WHERE kind = 'inbox_full' ORDER BY seq"
        assert [tuple(row) for row in await hive.store.rows(sql)] == [
            ("operator", "iris", '{"refused":1}'),
            ("hm1nd", "iris", '{"refused":10}'),
        ]
        # The recipient is told; what its turn took waits no more.
        begun = await hive.broker.lease(IRIS)
        assert (begun.waiting, begun.refused) == (1, 12)
        await send(hive, "hm1nd", "iris", "three", key="k")
        await refusal(hive, "hm1nd", "iris")


async def test_an_inbox_is_full_however_its_mail_came_to_be_there(tmp_path: Path) -> None:
    """What the writer remembers of an inbox must never be less than what waits there."""
    async with hive_with(tmp_path, inbox_depth=4, tries=1) as hive:
        await send(hive, "hm1nd", "iris")
        for n in range(3):
            await hive.questions.ask(HM1ND, Ask(IRIS, f"what is {n}?"))
        with pytest.raises(Refusal, match="inbox_depth"):
            await send(hive, "hm1nd", "iris")
        lease = await hive.broker.lease(IRIS)
        await hive.broker.recv(IRIS, 2, 0)
        await send(hive, "hm1nd", "iris")
        await hive.broker.ack(IRIS, lease.turn, "waiting")
        with pytest.raises(Refusal, match="inbox_depth"):
            await send(hive, "hm1nd", "iris")


async def test_mail_of_a_turn_that_had_to_wait_fills_the_inbox_again(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=2) as hive:
        for _ in range(2):
            await send(hive, "operator", "iris")
        lease = await hive.broker.lease(IRIS)
        await hive.broker.ack(IRIS, lease.turn, "waiting")
        assert "inbox_depth" in (await refusal(hive, "operator", "iris")).message


@pytest.mark.parametrize("state", ["dead", "held"])
async def test_mail_that_the_operator_lets_through_fills_the_inbox_again(tmp_path: Path, state: str) -> None:
    async with hive_with(tmp_path, inbox_depth=2, tries=1, pair_rate_per_hour=1) as hive:
        first = (await send(hive, "hm1nd", "iris"))["message"]
        aside = first if state == "dead" else (await send(hive, "hm1nd", "iris"))["message"]
        await send(hive, "operator", "iris")
        lease = await hive.broker.lease(IRIS)
        await hive.broker.ack(IRIS, lease.turn, "failed" if state == "dead" else "done")
        await (hive.broker.messages.requeue if state == "dead" else hive.broker.messages.release)(aside, OPERATOR)
        assert "inbox_depth" in (await refusal(hive, "operator", "iris")).message


async def test_mail_that_a_cancelled_recv_gives_back_fills_the_inbox_again(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=3) as hive:
        for _ in range(3):
            await send(hive, "operator", "iris")
        await hive.broker.lease(IRIS)
        take = Take(IRIS, 2, "k", hive.broker.limits)
        await hive.store.write(partial(take, last=True))
        for _ in range(2):
            await send(hive, "operator", "iris")
        await hive.store.write(take.undo)
        assert list((await hive.states()).values()).count("queued") == 4
        assert "inbox_depth" in (await refusal(hive, "operator", "iris")).message


async def test_the_depth_counts_what_comes_in_one_batch(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=3) as hive:
        refused: list[str] = []

        async def say(n: int) -> None:
            try:
                await send(hive, "operator", "iris", str(n))
            except Refusal as exc:
                refused.append(exc.code)

        async with trio.open_nursery() as nursery, held_writer(hive.store, nursery):
            for n in range(10):
                nursery.start_soon(say, n)
            await trio.testing.wait_all_tasks_blocked()
        assert list((await hive.states()).values()) == ["queued"] * 3
        assert refused == ["refused"] * 7
        assert (await hive.agents.get("iris")).refused == 7


async def test_the_hive_itself_is_never_refused_for_depth_and_the_operators_inbox_has_none(tmp_path: Path) -> None:
    async with hive_with(tmp_path, inbox_depth=1) as hive:
        await send(hive, "operator", "iris")
        for _ in range(2):
            await hive.store.write(
                lambda tx: put_message(tx, SYSTEM, IRIS, parse_body("approval_resolved"), limits=hive.broker.limits)
            )
            await send(hive, "iris", "operator")
        assert len(await hive.states()) == 3
        assert await hive.broker.messages.unread() == 2


# -- large bodies -----------------------------------------------------------------------------------------------------


async def test_large_bodies_count_in_their_senders_quota(tmp_path: Path) -> None:
    async with hive_with(tmp_path, body_quota_bytes=1000) as hive:

        async def keep(sender: AgentName, size: int) -> Answer:
            letter = Letter(sender, (HM1ND,), parse_body("begins so"), file=("a" * 64, size))
            return await hive.store.write(lambda tx: post(tx, [letter], hive.broker.limits)[0].unwrap())

        assert await keep(IRIS, 600) == {"message": 1}
        with pytest.raises(Refusal, match=r"cannot send 401 bytes: .* take 600 bytes already and the limit is 1,000"):
            await keep(IRIS, 401)
        assert await keep(IRIS, 400) == {"message": 2}
        assert await keep(DAMOCLES, 1000) == {"message": 3}
        begun = await hive.broker.lease(HM1ND)
        assert (begun.message["body"], begun.message["body_bytes"]) == ("begins so", 600)


async def test_what_is_held_for_one_sender_has_a_limit_and_what_need_not_be_held_still_goes(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1, held_depth=2) as hive:
        for _ in range(3):
            await send(hive, "hm1nd", "iris")
        assert await hive.states() == {1: "queued", 2: "held", 3: "held"}
        said = await refusal(hive, "hm1nd", ["damocles", "iris"])
        assert said.code == "refused"
        assert said.message == (
            "cannot send to iris: 2 messages of hm1nd are held for the operator already and the limit is 2 "
            "(held_depth); wait until some are released or dropped"
        )
        assert await send(hive, "hm1nd", "damocles") == {"message": 4}
        await hive.broker.messages.drop(2, OPERATOR)
        assert await send(hive, "hm1nd", "iris") == {"message": 5, "held": {"iris": "rate"}}


async def test_letters_of_one_commit_count_for_each_other(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1, held_depth=1) as hive:
        letters = [Letter(HM1ND, (IRIS,), parse_body(f"{n}")) for n in range(3)]
        outcomes = await hive.store.write(lambda tx: post(tx, letters, hive.broker.limits))
        assert [type(outcome).__name__ for outcome in outcomes] == ["Value", "Value", "Error"]
        assert await hive.states() == {1: "queued", 2: "held"}


async def test_a_notice_about_a_message_that_was_let_through_is_not_held(hive: Services) -> None:
    cause = Cause("system", None, 1, Limits().hops + 1)
    await hive.store.write(lambda tx: put_message(tx, SYSTEM, IRIS, parse_body("message_dead: …"), cause=cause))
    assert await hive.states() == {1: "queued"}
    begun = await hive.broker.lease(IRIS)
    assert await send(hive, "iris", "hm1nd") == {"message": 2, "held": {"hm1nd": "hops"}}  # what it sets off is braked
    assert begun.message["id"] == 1


async def test_a_notice_about_a_message_that_was_held_for_its_hops_is_held_too(hive: Services) -> None:
    cause = Cause("system", None, 1, Limits().hops + 2)
    await hive.store.write(lambda tx: put_message(tx, SYSTEM, IRIS, parse_body("question_expired: …"), cause=cause))
    assert await hive.states() == {1: "held"}


async def test_a_message_that_is_held_cannot_be_replied_to_by_whom_it_is_held_from(tmp_path: Path) -> None:
    async with hive_with(tmp_path, pair_rate_per_hour=1) as hive:
        await send(hive, "hm1nd", "iris")
        await send(hive, "hm1nd", "iris")
        assert "cannot reply to message 2" in (await refusal(hive, "iris", "hm1nd", in_reply_to=2)).message
        await hive.broker.messages.release(2, OPERATOR)
        await send(hive, "iris", "hm1nd", in_reply_to=2)
