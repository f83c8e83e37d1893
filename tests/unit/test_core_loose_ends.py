"""Loose ends, withdrawal and status; and the doors of questions, reminders and schedules: tools, verbs and pages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, parse_body
from hive_core.services import withdrawal
from hive_core.services.post import Letter, post
from hive_core.services.profiles import set_status
from hive_core.services.question_words import Answer, Ask
from hive_core.services.reminders import When
from hive_core.services.schedules import parse_plan
from hive_core.services.withdrawal import withdraw_thread
from hive_core.sockets.admin import AdminDesk
from hive_core.sockets.agent import AgentDesk
from hive_core.sockets.manager_tools import ManagerTools
from hive_core.sockets.tool import declared
from hive_core.store.writer import Transaction
from tests.dashboards import OURS, browse, hive_of, served
from tests.hives import Services, open_services, run_hive, serve
from tests.processes import PATIENCE_S
from tests.tools import program_of

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
SCRIPT = {**OURS, "Accept": "application/json"}
Call = Callable[..., Awaitable[Any]]
Command = Callable[..., Awaitable[tuple[int, str]]]


# -- what waits -------------------------------------------------------------------------------------------------------


async def test_with_nothing_open_nothing_waits(hive: Services) -> None:
    assert await hive.loose_ends.of(IRIS) == {
        "waits_on_you": {"questions": [], "unread": 0, "dead": []},
        "you_wait_for": {"questions": [], "approvals": [], "reminders": [], "background": [], "held": []},
    }


async def test_each_sees_what_waits_on_it_and_what_it_waits_for(hive: Services) -> None:
    await hive.questions.ask(IRIS, Ask(DAMOCLES, "red or blue?", ("red", "blue")))
    await hive.questions.ask(IRIS, Ask(OPERATOR, "May I?"))
    await hive.reminders.remind(IRIS, When(after_s=600), "look again")
    await hive.schedules.add(parse_plan("iris", "daily", "0 7 * * *"))
    await hive.gate.spawn.request(MANAGER, AgentName("argus"), "You watch.", "two eyes")
    iris, damocles = await hive.loose_ends.of(IRIS), await hive.loose_ends.of(DAMOCLES)
    assert [one["question"] for one in iris["you_wait_for"]["questions"]] == [1, 2]
    assert [one["body"] for one in iris["you_wait_for"]["reminders"]] == ["look again"]
    assert [one["options"] for one in damocles["waits_on_you"]["questions"]] == [["red", "blue"]]
    assert damocles["waits_on_you"]["unread"] == 1
    assert [one["kind"] for one in (await hive.loose_ends.of(MANAGER))["you_wait_for"]["approvals"]] == ["spawn"]
    assert iris["you_wait_for"]["approvals"] == []
    mine = await hive.loose_ends.of(OPERATOR)
    assert [one["question"] for one in mine["waits_on_you"]["questions"]] == [2]
    assert [one["approval"] for one in mine["waits_on_you"]["approvals"]] == [1]
    assert [one["schedule"] for one in mine["you_wait_for"]["schedules"]] == [1]
    await hive.questions.answer(DAMOCLES, 1, Answer(("red",)))
    await hive.reminders.cancel(IRIS, 1)
    iris = await hive.loose_ends.of(IRIS)
    assert [one["question"] for one in iris["you_wait_for"]["questions"]] == [2]
    assert iris["you_wait_for"]["reminders"] == []
    assert iris["waits_on_you"]["unread"] == 1


async def test_held_and_dead_are_shown_to_their_sender_and_to_the_operator(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(tries=1, pair_rate_per_hour=1)) as hive:
        await hive.add_agents("iris", "damocles")
        dead = await hive.say("iris", "damocles", "one")
        held = await hive.say("iris", "damocles", "two")
        await hive.broker.ack(DAMOCLES, (await hive.broker.lease(DAMOCLES)).turn, "failed", "it broke")
        for who in (IRIS, OPERATOR):
            ends = await hive.loose_ends.of(who)
            # Only the operator releases: whoever sent it waits.
            place, other = ("waits_on_you", "you_wait_for") if who == OPERATOR else ("you_wait_for", "waits_on_you")
            assert [(one["message"], one["recipient"], one["why"]) for one in ends[place]["held"]] == [
                (held, DAMOCLES, "rate")
            ]
            assert "held" not in ends[other]
            assert [(one["message"], one["why"]) for one in ends["waits_on_you"]["dead"]] == [(dead, "it broke")]
        ends = await hive.loose_ends.of(DAMOCLES)
        assert (ends["you_wait_for"]["held"], ends["waits_on_you"]["dead"]) == ([], [])


async def test_on_a_full_disk_nothing_new_is_planned(hive: Services) -> None:
    plan = parse_plan("iris", "daily", "0 7 * * *")
    first = await hive.reminders.remind(IRIS, When(after_s=60), "look", "k")
    hive.set_full(True)
    for deed, call in (
        ("remind", lambda: hive.reminders.remind(IRIS, When(after_s=60), "look")),
        ("schedule", lambda: hive.schedules.add(plan)),
    ):
        with pytest.raises(Refusal, match=f"cannot {deed}: no space is left on the disk") as refused:
            await call()
        assert refused.value.code == "unavailable"
    assert await hive.reminders.remind(IRIS, When(after_s=60), "look", "k") == first
    assert await hive.reminders.cancel(IRIS, 1) == {"reminder": 1}


# -- taking back ------------------------------------------------------------------------------------------------------


async def test_cancelling_a_thread_drops_what_i_sent_and_nobody_has_had(hive: Services) -> None:
    first = await hive.say("iris", "damocles", "one")
    await hive.broker.ack(DAMOCLES, (await hive.broker.lease(DAMOCLES)).turn, "done")
    theirs = await hive.say("damocles", "iris", "two", in_reply_to=first)
    mine = await hive.say("iris", "damocles", "three", in_reply_to=theirs)
    other = await hive.say("iris", "damocles", "elsewhere")
    both = (await hive.broker.send(IRIS, (DAMOCLES, MANAGER), parse_body("four"), mine))["message"]
    for _ in range(2):
        answer = await withdraw_thread(hive.store, IRIS, mine)
        assert answer in (
            {"thread": first, "dropped": 3, "too_late": 1},
            {"thread": first, "dropped": 0, "too_late": 1},
        )
    assert await hive.states("damocles") == {first: "acked", mine: "dropped", other: "queued", both: "dropped"}
    assert (await hive.states("iris"), await hive.states("hm1nd")) == ({theirs: "queued"}, {both: "dropped"})
    assert (await hive.kinds()).count("message_dropped") == 3


async def test_a_message_that_a_turn_has_or_had_is_not_taken_back(hive: Services) -> None:
    message = await hive.say("iris", "damocles", "one")
    turn = (await hive.broker.lease(DAMOCLES)).turn
    assert (await withdraw_thread(hive.store, IRIS, message))["dropped"] == 0
    await hive.broker.ack(DAMOCLES, turn, "failed", "it broke")
    assert await withdraw_thread(hive.store, IRIS, message) == {"thread": message, "dropped": 0, "too_late": 1}
    assert await hive.states("damocles") == {message: "queued"}


async def test_nobody_takes_back_what_others_wrote(hive: Services) -> None:
    message = await hive.say("iris", "damocles", "one")
    for who, number in ((DAMOCLES, message), (IRIS, 99)):
        with pytest.raises(Refusal, match=f"cannot cancel thread {number}: you wrote nothing in it"):
            await withdraw_thread(hive.store, who, number)


async def test_a_long_thread_is_taken_back_in_small_transactions_and_the_answer_counts_all(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await hive.say("iris", "damocles", "one")
    await hive.broker.ack(DAMOCLES, (await hive.broker.lease(DAMOCLES)).turn, "done")
    for number in range(23):
        letter = Letter(IRIS, (DAMOCLES, MANAGER), parse_body(f"{number}"), first)
        await hive.store.write(lambda tx, it=letter: post(tx, [it], Limits(pair_rate_per_hour=1000)))
        await hive.say("damocles", "iris", "theirs", in_reply_to=first)
    monkeypatch.setattr(withdrawal, "STEP", 10)
    told: list[int] = []
    write = hive.store.write

    def looked_at(function: Callable[[Transaction], Any]) -> Awaitable[Any]:
        def watched(tx: Transaction) -> Any:
            answer = function(tx)
            told.append(len(tx.events))
            return answer

        return write(watched)

    monkeypatch.setattr(hive.store, "write", looked_at)
    assert await withdraw_thread(hive.store, IRIS, first) == {"thread": first, "dropped": 46, "too_late": 1}
    assert sum(told) == 46
    assert max(told) <= 10
    assert await withdraw_thread(hive.store, IRIS, first) == {"thread": first, "dropped": 0, "too_late": 1}
    states = {state for agent in (DAMOCLES, MANAGER) for state in (await hive.states(agent)).values()}
    assert states == {"acked", "dropped"}


@pytest.mark.parametrize("read", [False, True])
async def test_cancelling_the_thread_of_a_question_cancels_the_question(hive: Services, read: bool) -> None:
    asked = await hive.questions.ask(IRIS, Ask(DAMOCLES, "well?"))
    if read:
        await hive.broker.ack(DAMOCLES, (await hive.broker.lease(DAMOCLES)).turn, "done")
    for _ in range(2):
        await withdraw_thread(hive.store, IRIS, asked["message"])
    assert (await hive.questions.get(1)).state == "cancelled"
    assert (await hive.kinds()).count("question_cancelled") == 1
    assert (await hive.loose_ends.of(IRIS))["you_wait_for"]["questions"] == []
    with pytest.raises(Refusal, match="iris cancelled it at"):
        await hive.questions.answer(DAMOCLES, 1, Answer(text="yes"))


async def test_an_answer_that_is_taken_back_opens_its_question_again(hive: Services) -> None:
    asked = await hive.questions.ask(IRIS, Ask(DAMOCLES, "red or blue?", ("red", "blue")))
    answered = await hive.questions.answer(DAMOCLES, 1, Answer(("red",)))
    with hive.store.bus.listen("questions") as listener, trio.fail_after(PATIENCE_S):
        assert (await withdraw_thread(hive.store, DAMOCLES, asked["message"]))["dropped"] == 1
        await listener.wait()
    question = await hive.questions.get(1)
    assert (question.state, question.choices, question.answer_id, question.settled_at_ms) == ("open", (), None, None)
    assert [one["question"] for one in (await hive.loose_ends.of(DAMOCLES))["waits_on_you"]["questions"]] == [1]
    again = await hive.questions.answer(DAMOCLES, 1, Answer(("blue",)))
    assert (await hive.states(IRIS)) == {answered["message"]: "dropped", again["message"]: "queued"}
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "done")
    assert (await withdraw_thread(hive.store, DAMOCLES, asked["message"]))["dropped"] == 0
    assert (await hive.questions.get(1)).choices == ("blue",)


# -- the tools of an agent --------------------------------------------------------------------------------------------


@pytest.fixture
async def tools(hive: Services, tmp_path: Path) -> Callable[[str], Call]:
    """Call tools as an agent, through its real socket: `await tools("iris")("ask", to=…)`."""

    async def call(name: str, tool: str, use: str | None = None, /, **arguments: Any) -> Any:
        async with program_of(hive, name, tmp_path) as client:
            if tool == "tools/list":
                return await client.tools()
            result = await client.result(tool, use, **arguments)
        if result.get("isError"):
            raise Refusal("refused", result["content"][0]["text"])
        return result["structuredContent"]

    return lambda name: partial(call, name)


async def test_an_agent_asks_and_another_answers_each_once_for_a_key(
    hive: Services, tools: Callable[[str], Call]
) -> None:
    asked = {"to": "damocles", "question": "red or blue?", "options": ["red", "blue"], "multi": True, "ttl_s": 60}
    for key, more in (("toolu_1", {}), ("toolu_1", {}), (None, {"key": "mine"}), (None, {"key": "mine"})):
        await tools("iris")("ask", key, **asked, **more)
    assert await hive.value("SELECT count(*) FROM questions") == 2
    first = await tools("damocles")("answer", None, question=1, choices=["red", "blue"], key="k")
    assert await tools("damocles")("answer", None, question=1, choices=["red", "blue"], key="k") == first
    with pytest.raises(Refusal, match="damocles answered it at"):
        await tools("damocles")("answer", None, question=1, choices=["red"])
    with pytest.raises(Refusal, match="it was not put to you"):
        await tools("iris")("answer", None, question=2, choices=["red"])


async def test_an_agent_reminds_itself_and_takes_back_what_is_its_own(
    hive: Services, tools: Callable[[str], Call]
) -> None:
    iris, damocles = tools("iris"), tools("damocles")
    for _ in range(2):
        assert (await iris("remind", "toolu_1", body="look", after_s=60))["reminder"] == 1
    await iris("ask", to="damocles", question="well?")
    message = await hive.say("iris", "damocles", "one")
    ends = await iris("loose_ends")
    assert (len(ends["you_wait_for"]["questions"]), len(ends["you_wait_for"]["reminders"])) == (1, 1)
    for kind, number in (("reminder", 1), ("question", 1), ("thread", message)):
        with pytest.raises(Refusal, match=f"cannot cancel {kind} {number}"):
            await damocles("cancel", kind=kind, id=number)
    assert await iris("cancel", kind="reminder", id=1) == {"reminder": 1}
    assert await iris("cancel", kind="question", id=1) == {"question": 1, "reached": False}
    assert await iris("cancel", kind="thread", id=message) == {"thread": message, "dropped": 1, "too_late": 0}
    with pytest.raises(Refusal, match="cannot call cancel: kind"):
        await iris("cancel", kind="agent", id=1)
    with pytest.raises(Refusal, match="give one of `at` and `after_s`"):
        await iris("remind", body="look")


async def test_every_writing_tool_counts_once_for_a_key_of_the_clients_own(
    hive: Services, tools: Callable[[str], Call]
) -> None:
    hm1nd = tools("hm1nd")
    for tool, words in (
        ("send", {"to": "iris", "body": "once"}),
        ("request_spawn", {"name": "argus", "persona": "You watch.", "reason": "eyes"}),
    ):
        first = await hm1nd(tool, key=f"my {tool}", **words)
        assert await hm1nd(tool, key=f"my {tool}", **words) == first
    assert await hive.value("SELECT count(*) FROM messages WHERE body = 'once'") == 1
    assert await hive.value("SELECT count(*) FROM approvals") == 1
    keyed = {
        one.name for desk in (AgentDesk, ManagerTools) for one in declared(desk) if "key" in one.takes.model_fields
    }
    asking = {one.name for one in declared(ManagerTools) if one.name.startswith("request_")}
    assert keyed == {"send", "recv", "ask", "answer", "remind"} | asking
    await hive.broker.lease(AgentName("iris"))
    await hive.say("hm1nd", "iris", "more")
    mail = await tools("iris")("recv", key="r")
    assert [one["body"] for one in mail["messages"]] == ["more"]
    assert await tools("iris")("recv", key="r") == mail


async def test_what_an_agent_says_that_it_is_about_is_seen_by_all(hive: Services, tools: Callable[[str], Call]) -> None:
    for _ in range(2):
        assert await tools("iris")("set_status", text=" reading <b>logs</b> ") == {"status": "reading <b>logs</b>"}
    listed = (await tools("damocles")("list_agents"))["agents"]
    assert {one["name"]: one.get("status") for one in listed}["iris"] == "reading <b>logs</b>"
    assert (await hive.kinds()).count("agent_status") == 1
    for text, why in (("x" * 201, "201 characters and the limit is 200"), ("a\0b", "NUL")):
        with pytest.raises(Refusal, match=why):
            await tools("iris")("set_status", text=text)
    await tools("iris")("set_status", text="")
    assert (await hive.agents.get("iris")).status is None


async def test_the_tools_say_in_one_line_what_they_do_and_which_only_read(tools: Callable[[str], Call]) -> None:
    mine = {"ask", "answer", "remind", "cancel", "loose_ends", "set_status"}
    found = {one["name"]: one for one in await tools("iris")("tools/list") if one["name"] in mine}
    assert set(found) == mine
    for name, tool in found.items():
        assert len(tool["description"]) <= 80
        assert tool["annotations"]["readOnlyHint"] is (name == "loose_ends")
        assert tool["annotations"]["idempotentHint"] is True


# -- the operator's command line --------------------------------------------------------------------------------------


@pytest.fixture
async def command(hive: Services, tmp_path: Path) -> AsyncIterator[Command]:
    """`hive WORD …` as a process: its exit code, and what it printed or complained of."""

    async def run(*words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        done = await run_hive(tmp_path, *words, env=env)
        return done.returncode, (done.stderr if done.returncode else done.stdout).decode().rstrip("\n")

    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve):
        yield run


async def test_the_operator_sees_a_question_and_answers_it(hive: Services, command: Command) -> None:
    await hive.questions.ask(IRIS, Ask(OPERATOR, "red\nor \u202eblue?", ("red", "blue"), free_text=True))
    await hive.questions.ask(IRIS, Ask(OPERATOR, "which?", ("a", "b"), multi=True))
    code, said = await command("questions")
    assert code == 0
    for part in (
        "? 1 iris asks",
        "    red\n    or ⟨U+202E⟩blue?",
        "    1. red\n    2. blue",
        "hive answer 1 --choice N, or TEXT",
    ):
        assert part in said
    assert "? 1 iris asks" in (await command())[1]
    assert await command("answer", "1") == (
        2,
        "hive: cannot answer question 1 with nothing: give one of its options, or text of your own",
    )
    assert await command("answer", "1", "green, please") == (0, "question 1 is answered, with message 5")
    code, said = await command("answer", "1", "--choice", "red")
    assert (code, "operator answered it at" in said) == (4, True)
    assert (await command("answer", "2", "--choice", "b", "--choice", "1"))[0] == 0
    assert (await hive.questions.get(2)).choices == ("b", "a")
    assert await command("questions") == (0, "no question waits for you")


async def test_a_question_that_is_held_is_listed_with_a_mark_and_its_way_out(hive: Services, command: Command) -> None:
    await hive.questions.ask(IRIS, Ask(OPERATOR, "May I?"))
    await hive.store.write(lambda tx: tx.execute("UPDATE deliveries SET state = 'held', held = 'rate'"))
    code, said = await command("questions")
    assert (code, said.splitlines()[0].startswith("held ? 1 iris asks")) == (0, True), said
    assert said.endswith("    hive release 1")
    assert json.loads((await command("questions", "--json"))[1])["questions"][0]["held"] is True
    code, said = await command("answer", "1", "yes")
    assert (code, "`hive release 1`" in said) == (4, True), said
    assert (await command("release", "1"))[0] == 0
    assert (await command("questions"))[1].startswith("? 1 iris asks")
    assert (await command("answer", "1", "yes"))[0] == 0


async def test_options_may_stand_between_the_words_of_a_message(hive: Services, command: Command) -> None:
    await hive.say("iris", "operator", "well?")
    assert await command("send", "iris", "--in-reply-to", "1", "reply") == (0, "sent as message 2")
    assert await command("send", "iris", "--", "-a dash") == (0, "sent as message 3")
    assert await command("send", "--to", "iris", "all in one") == (0, "sent as message 4")
    assert await hive.value("SELECT in_reply_to FROM messages WHERE id = 2") == 1
    assert await hive.value("SELECT body FROM messages WHERE id = 3") == "-a dash"


async def test_a_time_without_a_zone_is_one_of_the_operators_clock(hive: Services, command: Command) -> None:
    await hive.say("iris", "operator", "now")
    sent = datetime.fromtimestamp(await hive.value("SELECT sent_at_ms FROM messages") / 1000, UTC)
    before, after = (f"{sent + timedelta(hours=hours):%Y-%m-%dT%H:%M}" for hours in (4, 6))
    east = {"TZ": "EAST-5"}  # five hours ahead of UTC
    assert "now" in (await command("search", "now", "--after", before, env=east))[1]
    assert await command("search", "now", "--after", after, env=east) == (0, "nothing was found")
    assert await command("search", "now", "--before", before, env=east) == (0, "nothing was found")
    assert "now" in (await command("search", "now", "--after", f"{sent:%Y-%m-%dT%H:%M}Z", env=east))[1]
    assert (await command("search", "now", "--after", "yesterday", env=east))[0] == 2


async def test_the_operator_keeps_schedules(hive: Services, command: Command) -> None:
    words = ("schedule", "add", "iris", "--cron", "0 7 * * 1-5", "--tz", "Europe/Berlin", "look around")
    code, said = await command(*words)
    assert (code, said.startswith("schedule 1: first at ")) == (0, True)
    assert (await command("schedule", "add", "--every", "3600", "damocles", "hourly"))[0] == 0
    said = (await command("schedule", "list"))[1]
    assert "1 iris 0 7 * * 1-5 Europe/Berlin · next at" in said
    assert "2 damocles every 3600 s · next at" in said
    assert await command("schedule", "run", "1") == (0, "schedule 1 was sent as message 1")
    assert await command("schedule", "pause", "1") == (0, "schedule 1 is paused")
    assert "· paused" in (await command("schedule"))[1]
    assert (await command("schedule", "resume", "1"))[1].startswith("schedule 1 goes on, next at 20")
    assert await command("schedule", "rm", "2") == (0, "schedule 2 is gone")
    assert json.loads((await command("schedule", "list", "--json"))[1])["schedules"][0]["schedule"] == 1


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["add", "iris", "x"], 2, "give one of `cron` and `every`"),
        (["add", "iris", "x", "--cron", "0 25 * * *"], 2, "its hour is '25'"),
        (["add", "iris", "x", "--cron", "0 7 * * *", "--tz", "Mars"], 2, "cannot use 'Mars' as the time zone"),
        (["add", "iris", "x", "--every", "5"], 2, "give 60 to 31622400"),
        (["add", "iris", "--every", "60"], 2, "it takes AGENT BODY with --cron or --every"),
        (["list", "1"], 2, "it takes nothing"),
        (["rm", "one"], 2, "cannot use 'one' as the number of a schedule"),
        (["pause", "9" * 5_000], 2, "cannot use '9999"),
        (["rm"], 2, "it takes the number of a schedule"),
        (["run", "9"], 3, "cannot find schedule 9"),
        (["forget", "9"], 2, "invalid choice"),
    ],
)
async def test_a_schedule_that_makes_no_sense_is_one_sentence(
    command: Command, words: list[str], code: int, why: str
) -> None:
    ended, said = await command("schedule", *words)
    assert (ended, why in said, said.count("\n")) == (code, True, 0), said


async def test_the_operator_sees_the_loose_ends_of_himself_and_of_an_agent(hive: Services, command: Command) -> None:
    assert await command("loose-ends") == (0, "nothing waits on you")
    await hive.questions.ask(IRIS, Ask(OPERATOR, "May I?"))
    await hive.reminders.remind(IRIS, When(after_s=60), "look")
    await set_status(hive.store, Limits(), IRIS, "waiting for \x1b[31myou")
    assert await command("loose-ends") == (0, "waits on you:\n  question 1 of iris: May I?\n  1 unread")
    code, said = await command("loose-ends", "iris")
    assert (code, said.splitlines()[:3]) == (
        0,
        ["nothing waits on iris", "iris waits for:", "  question 1 to operator: May I?"],
    )
    assert "reminder 1 at" in said
    await hive.broker.send(IRIS, (DAMOCLES,), parse_body("one"))
    await hive.store.write(
        lambda tx: tx.execute("UPDATE deliveries SET state = 'held', held = 'rate' WHERE message_id = 3")
    )
    said = (await command("loose-ends", "iris"))[1]
    assert "message 3 iris → damocles is held" in said.partition("iris waits for:")[2]
    assert "message 3 iris → damocles is held" in (await command("loose-ends"))[1].partition("you wait for:")[0]
    assert (await command("loose-ends", "nobody"))[0] == 3
    await hive.store.write(lambda tx: tx.execute("UPDATE reminders SET state = 'due'"))
    assert ", due and waits for room (inbox_depth, held_depth): look" in (await command("loose-ends", "iris"))[1]
    assert "iris: waiting for ⟨U+001B⟩[31myou" in (await command("list"))[1]


# -- the dashboard ----------------------------------------------------------------------------------------------------


async def test_a_question_is_a_card_with_its_options_as_buttons(hive: Services) -> None:
    await hive.questions.ask(IRIS, Ask(OPERATOR, "red <b>or</b> blue?", ("<red>", "blue")))
    await hive.questions.ask(IRIS, Ask(DAMOCLES, "not for you"))
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
        card = page.partition('id="question-1"')[2].partition("</article>")[0]
        assert "red &lt;b&gt;or&lt;/b&gt; blue?" in card
        assert page.count('action="/questions/1/answer"') == 2
        assert "&lt;red&gt;</button>" in page
        assert 'id="question-2"' not in page
        assert "(1) hyperhive" in page
        answer = await client.post("/questions/1/answer", headers=SCRIPT, data={"choice-1": "on"})
        assert answer.json() == {"ok": True, "said": "question 1 of iris is answered"}
        assert (await hive.questions.get(1)).choices == ("<red>",)
        assert 'id="question-1"' not in (await client.get("/")).text
        again = await client.post("/questions/1/answer", headers=SCRIPT, data={"choice-2": "on"})
        assert (again.status_code, "operator answered it" in again.json()["error"]["message"]) == (409, True)


async def test_several_options_and_words_of_ones_own_go_by_one_form(hive: Services) -> None:
    options = tuple(f"option {number}" for number in range(1, 13))
    await hive.questions.ask(IRIS, Ask(OPERATOR, "which?", options, multi=True, free_text=True))
    await hive.questions.ask(IRIS, Ask(OPERATOR, "why?"))
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/")).text
        assert page.count('type="checkbox"') == 12
        chosen = {f"choice-{number}": "on" for number in range(1, 13)}
        answer = await client.post("/questions/1/answer", headers=OURS, data={**chosen, "text": " "})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        empty = await client.post("/questions/2/answer", headers=SCRIPT, data={"text": " "})
        assert (empty.status_code, empty.json()["error"]["code"]) == (400, "usage")
        await client.post("/questions/2/answer", headers=SCRIPT, data={"text": "because\r\nof this"})
    assert (await hive.questions.get(1)).choices == options
    assert (await hive.questions.get(2)).answer == "because\nof this"


async def test_a_card_appears_and_goes_while_somebody_looks(hive: Services) -> None:
    async with served(hive_of(hive)) as browser:
        after = await hive.store.last_seq()
        async with browser.stream(f"/live?after={hive.at(after)}") as stream:
            await hive.questions.ask(IRIS, Ask(OPERATOR, "May I?"))
            card = (await stream.until("question-1"))[-1].data
            assert (card["list"], "May I?" in card["html"]) == ("pending", True)
            await hive.questions.cancel(IRIS, 1)
            assert (await stream.until("question-1"))[-1].data["html"] == ""
            await set_status(hive.store, Limits(), IRIS, "reading <b>logs")
            assert "reading &lt;b&gt;logs" in (await stream.until("agent-iris"))[-1].data["html"]


async def test_a_held_question_becomes_a_card_when_it_is_released(tmp_path: Path) -> None:
    async with open_services(tmp_path, limits=Limits(pair_rate_per_hour=1)) as hive:
        await hive.add_agents("iris")
        await hive.say("iris", "operator", "one")
        asked = await hive.questions.ask(IRIS, Ask(OPERATOR, "two?"))
        async with served(hive_of(hive)) as browser:
            after = await hive.store.last_seq()
            await hive.broker.messages.release(asked["message"], OPERATOR)
            assert "two?" in (await browser.told(f"/live?after={hive.at(after)}", "question-1"))[-1].data["html"]
