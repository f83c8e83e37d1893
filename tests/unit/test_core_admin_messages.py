"""What the operator sees of messages and does to them: `hive` itself, against the real door."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli import show
from hive_core.limits import Limits
from hive_core.protocol.held import WHY_HELD, say_held
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import Services, open_services, run_hive, serve
from tests.tools import program_of

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
LIMITS = Limits(tries=1, pair_rate_per_hour=2, inbox_depth=3)
Command = Callable[..., Awaitable[str]]


class Failed(Exception):
    def __init__(self, code: int, said: str) -> None:
        super().__init__(code, said)
        self.code = code
        self.said = said


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """One failed turn is death, two messages of a pair are the limit, three fill an inbox."""
    async with open_services(tmp_path, limits=LIMITS) as services:
        await services.add_agents("hm1nd", "iris", "damocles")
        yield services


@pytest.fixture
async def command(hive: Services, tmp_path: Path) -> AsyncIterator[Command]:
    """`hive WORD …` as a process; what it prints. Raises Failed."""

    async def run(*words: str, stdin: bytes = b"") -> str:
        done = await run_hive(tmp_path, *words, stdin=stdin)
        if done.returncode:
            raise Failed(done.returncode, done.stderr.decode())
        return done.stdout.decode().rstrip("\n")

    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        yield run


async def make_dead(hive: Services, body: str = "work", error: str = "it broke") -> int:
    message = await hive.say("operator", "iris", body)
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "failed", error)
    return message


async def make_held(hive: Services, body: str = "one too many") -> int:
    for _ in range(LIMITS.pair_rate_per_hour):
        await hive.say("iris", "damocles", "fine")
    return await hive.say("iris", "damocles", body)


async def state(hive: Services, message: int) -> Any:
    return await hive.value("SELECT state FROM deliveries WHERE message_id = ?", message)


# -- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "recipients"),
    [
        (["send", "iris", "hi"], ["iris"]),
        (["send", "iris,damocles", "hi"], ["damocles", "iris"]),
        (["send", "--to", "iris", "--to", "damocles", "hi"], ["damocles", "iris"]),
        (["send", "iris", "hi", "--in-reply-to", "1"], ["iris"]),
        (["send", "*", "hi"], ["damocles", "hm1nd", "iris"]),
        (["send", "iris,iris", "hi"], ["iris"]),
    ],
)
async def test_a_message_goes_to_one_to_several_or_to_everyone(
    hive: Services, command: Command, words: list[str], recipients: list[str]
) -> None:
    await hive.say("iris", "operator", "first")
    assert await command(*words) == "sent as message 2"
    rows = await hive.store.rows("SELECT recipient FROM deliveries WHERE message_id = 2 ORDER BY recipient")
    assert [row[0] for row in rows] == recipients


async def test_the_body_comes_from_standard_input_with_either_way_to_name_recipients(
    hive: Services, command: Command
) -> None:
    assert await command("send", "iris,damocles", stdin=b"piped") == "sent as message 1"
    assert await command("send", "--to", "iris", "--json", stdin=b"piped") == '{"message": 2}'
    rows = await hive.store.rows("SELECT body FROM messages")
    assert [row[0] for row in rows] == ["piped", "piped"]


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["send"], 2, "cannot send to nobody"),
        (["send", "--to", "iris", "damocles", "hi"], 2, "not both"),
        (["send", "operator", "hi"], 2, "the name is reserved for you"),
        (["send", "iris,operator", "hi"], 2, "the name is reserved for you"),
        (["send", "iris,*", "hi"], 2, "cannot use '*' as an agent's name"),
        (["send", "iris,", "hi"], 2, "cannot use ''"),
        (["send", "iris,nobody,noone", "hi"], 3, "cannot send to nobody, noone: no agent has that name"),
        (["requeue", "7"], 3, "cannot requeue message 7: it is not dead"),
        (["release", "7"], 3, "cannot release message 7: it is not held"),
        (["drop", "7"], 3, "cannot drop message 7: it is not dead or held"),
        (["drop", "0"], 2, "positive whole number"),
        (["read", "7"], 3, "cannot read message 7: there is no such message"),
        (["cancel", "iris"], 3, "cannot cancel: no turn of iris runs"),
        (["cancel", "nobody"], 3, "no agent has that name"),
        (["dead", "--limit", "0"], 2, "give 1 to 1000"),
    ],
)
async def test_what_cannot_be_done_is_said_in_one_line(
    hive: Services, command: Command, words: list[str], code: int, sentence: str
) -> None:
    with pytest.raises(Failed) as failed:
        await command(*words)
    assert (failed.value.code, failed.value.said.count("\n")) == (code, 1)
    assert sentence in failed.value.said
    assert await hive.value("SELECT count(*) FROM messages") == 0


# -- large bodies -----------------------------------------------------------------------------------------------------


async def test_a_large_body_is_read_whole(hive: Services, command: Command) -> None:
    body = "línea one\n" * 20_000 + "the end \x1b[31m"
    await command("send", "iris", stdin=body.encode())
    read = json.loads(await command("read", "1", "--json"))
    assert (read["message"], read["bytes"]) == (1, len(body.encode()))
    assert read["body"] == body
    shown = await command("read", "1")
    assert shown == body.replace("\x1b", "⟨U+001B⟩")


# -- dead, held -------------------------------------------------------------------------------------------------------


async def test_dead_messages_are_listed_with_why_and_can_have_all_their_tries_again(
    hive: Services, command: Command
) -> None:
    assert await command("dead") == "nothing is dead"
    message = await make_dead(hive, "do this\nand that", "no such\nfile \x1b[2J")
    listed = await command("dead")
    assert listed.startswith(f"{message} operator → iris dead 0 s ago after 1 failed turn: no such file ⟨U+001B⟩[2J\n")
    assert listed.endswith("    do this")
    (row,) = json.loads(await command("dead", "--json"))["messages"]
    assert (row["id"], row["recipient"], row["note"]) == (message, "iris", "no such\nfile \x1b[2J")
    assert await command("requeue", str(message)) == f"message {message} goes to iris again, with all its tries"
    assert await command("dead") == "nothing is dead"
    assert (await hive.broker.lease(IRIS)).message["attempt"] == 2


async def test_held_messages_are_listed_with_why_and_can_be_released(hive: Services, command: Command) -> None:
    assert await command("held") == "nothing is held"
    message = await make_held(hive)
    assert WHY_HELD["rate"] in await command("held")
    released = json.loads(await command("release", str(message), "--json"))
    assert released == {"message": message, "recipients": ["damocles"]}
    assert await state(hive, message) == "queued"
    assert await command("held") == "nothing is held"


@pytest.mark.parametrize("make", [make_dead, make_held])
async def test_what_is_dead_or_held_can_be_dropped_once(
    hive: Services, command: Command, make: Callable[[Services], Awaitable[int]]
) -> None:
    message = await make(hive)
    said = await command("drop", str(message))
    assert said.startswith(f"message {message} is dropped: ")
    assert await state(hive, message) == "dropped"
    with pytest.raises(Failed, match="not dead or held"):
        await command("drop", str(message))


async def test_a_running_turn_can_be_cancelled_with_its_messages(hive: Services, command: Command) -> None:
    message = await hive.say("operator", "iris", "work")
    turn = (await hive.broker.lease(IRIS)).turn
    assert await command("cancel", "iris") == f"turn {turn.id} of iris is cancelled, and its messages with it"
    assert await state(hive, message) == "acked"
    assert (await hive.broker.ack(IRIS, turn, "done")).counted is False


async def test_hive_alone_and_the_list_tell_what_does_not_go_on_by_itself(hive: Services, command: Command) -> None:
    assert "nothing waits for you" in await command()
    await make_dead(hive)
    await make_held(hive)
    await hive.say("hm1nd", "damocles", "fills it up")
    for _ in range(2):
        with pytest.raises(Refusal, match="inbox_depth"):
            await hive.say("operator", "damocles", "one more")
    alone = await command()
    assert "\n1 held: `hive held`\n1 dead: `hive dead`\ninbox full: damocles did not get 2 messages" in alone
    assert "nothing waits" not in alone
    listed = await command("list")
    line = {line.split()[0]: line for line in listed.splitlines()}
    assert "0 · 1 dead" in line["iris"]
    assert "3 · 1 held · inbox full, 2 refused" in line["damocles"]
    (agent,) = [one for one in json.loads(await command("list", "--json"))["agents"] if one["name"] == "damocles"]
    assert (agent["held"], agent["dead"], agent["refused"], agent["inbox_full"]) == (1, 0, 2, True)
    turn = (await hive.broker.lease(DAMOCLES)).turn
    await hive.broker.ack(DAMOCLES, turn, "done")
    assert "2 · 1 held · 2 refused" in await command("list")


async def test_hive_alone_tells_which_agents_are_stopped_why_and_what_to_do(hive: Services, command: Command) -> None:
    hive.agents.observe_silence("iris", 90)
    hive.agents.observe("damocles", "thinking")
    assert (await command()).splitlines()[1:] == ["nothing waits for you"]
    hive.agents.observe("iris", "tool", "Bash")
    hive.agents.observe_silence("iris", 90)
    hive.agents.observe("damocles", "stuck", "silent")
    hive.agents.observe("hm1nd", "crashed", "ended with code 3\x1b[2J")
    assert (await command()).splitlines()[1:] == [
        "! hm1nd crashed: ended with code 3⟨U+001B⟩[2J; it is started again by itself",
        "! damocles stuck: its turn is silent; `hive cancel damocles` ends it at once",
        "! iris stuck: its harness said nothing for 90 s and lost its turn; "
        "if it goes on so, it is ended and started again",
    ]
    await command("pause", "iris")
    await hive.agents.want(AgentName("hm1nd"), "down", OPERATOR)
    lines = (await command()).splitlines()[1:]
    assert lines[1] == "! iris paused: iris is paused by the operator; `hive start iris` lets it go on"
    assert len(lines) == 2, "one that shall not run is not told of"


async def test_hive_alone_tells_once_what_agents_rest_from_and_nothing_when_that_is_over(
    hive: Services, command: Command
) -> None:
    why = "the model provider at http://127.0.0.1:1 cannot be reached"
    for agent in (AgentName("iris"), DAMOCLES):
        await hive.say("hm1nd", agent, "work")
        await hive.broker.ack(agent, (await hive.broker.lease(agent)).turn, "waiting", why)
        hive.agents.observe_rest(agent, "waiting", why)
    assert (await command()).splitlines()[1:] == [f"! damocles, iris waiting: {why}; it tries again by itself"]
    await hive.agents.want(AgentName("iris"), "up", OPERATOR)
    await hive.agents.want(DAMOCLES, "up", OPERATOR)
    assert (await command()).splitlines()[1:] == ["nothing waits for you"]


async def test_hive_alone_tells_of_a_stopped_swarm_once(hive: Services, command: Command) -> None:
    await command("estop")
    (line,) = (await command()).splitlines()[1:]
    assert line == "! the whole swarm is stopped since 0 s: `hive thaw` lets it go on"


async def test_the_list_tells_until_when_an_agent_rests_and_nothing_of_a_rest_that_is_over(
    hive: Services, command: Command
) -> None:
    await hive.say("operator", "iris", "work")
    assert "rests until" not in await command("list")
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "waiting", "no login")
    until = await hive.value("SELECT rests_until_ms FROM agents WHERE name = 'iris'")
    (line,) = [line for line in (await command("list")).splitlines() if "rests until" in line]
    assert line.startswith("iris ")
    assert f"rests until {show.clock(until)}" in line
    await hive.sql("UPDATE agents SET rests_until_ms = 1")
    assert "rests until" not in await command("list")


# -- the agent's side -------------------------------------------------------------------------------------------------


async def test_an_agent_sends_to_several_and_hears_what_is_held_from_whom(hive: Services, tmp_path: Path) -> None:
    async with program_of(hive, "iris", tmp_path) as iris:
        for _ in range(2):
            sent = await iris.result("send", to="damocles", body="fine")
            assert "held" not in sent["content"][0]["text"]
        sent = await iris.result("send", to=["damocles", "hm1nd"], body="one too many")
    assert sent["structuredContent"] == {"message": 3, "held": {"damocles": "rate"}}
    sentence = say_held(3, {"damocles": "rate"})
    assert sent["content"][0]["text"] == f"sent as message 3; {sentence}"
    assert sentence.startswith(f"message 3 is held from damocles, because {WHY_HELD['rate']}: the operator releases or")


async def test_an_agent_writes_to_everyone(hive: Services, tmp_path: Path) -> None:
    async with program_of(hive, "iris", tmp_path) as iris:
        await iris.call("send", to="*", body="hear")
    rows = await hive.store.rows("SELECT recipient FROM deliveries ORDER BY recipient")
    assert [row[0] for row in rows] == ["damocles", "hm1nd"]


async def test_an_agent_reads_on_in_a_large_message_of_its_own_alone(hive: Services, tmp_path: Path) -> None:
    body = "é" * 80_000
    await hive.say("damocles", "iris", body)
    async with program_of(hive, "iris", tmp_path) as iris, program_of(hive, "hm1nd", tmp_path) as other:
        assert "neither sent nor received" in await iris.refusal("read_body", id=1)
        lease = await hive.broker.lease(IRIS)
        text, offset = lease.message["body"], len(lease.message["body"].encode())
        while offset is not None:
            some = await iris.call("read_body", id=1, offset=offset)
            text, offset = text + some["body"], some["next_offset"]
        assert text == body
        assert "neither sent nor received" in await other.refusal("read_body", id=1)


def test_a_message_held_from_many_for_one_reason_names_the_reason_once() -> None:
    said = say_held(4, {"b": "rate", "a": "rate", "c": "hops"})
    assert said.count(WHY_HELD["rate"]) == said.count(WHY_HELD["hops"]) == 1
    assert "from a, b, because" in said
