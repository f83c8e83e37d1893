"""The operator's hand on an agent's session: from the service, from host.sock, from the page's buttons and commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hive_core.commands import COMMANDS, read_command
from hive_core.git.repos import harness_settings
from hive_core.protocol.admin import PROTOCOL_VERSION
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.agents import set_deployed
from hive_core.services.steering import Steering
from hive_core.settings import parse_agent_toml
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import browse, hive_of, signed_in
from tests.hives import SETTINGS, Services, connect, open_services, run_hive, serve

IRIS = AgentName("iris")
JSON = {"Accept": "application/json", "Origin": "http://hive.localhost:7000", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
async def steering(hive: Services) -> Steering:
    await hive.sql("UPDATE agents SET session = 'old', context_tokens = 7 WHERE name = 'iris'")
    return Steering(hive.store)


async def test_a_session_is_compacted_before_the_next_message_and_asking_twice_is_once(
    hive: Services, steering: Steering
) -> None:
    await hive.say("hm1nd", "iris", "hello")
    for _ in range(2):
        await steering.compact(IRIS, "operator")
    lease = await hive.broker.lease(IRIS)
    assert (lease.errand, lease.message, lease.session) == ("compact", None, "old")
    assert (await hive.turns.recent("iris"))[0]["errand_by"] == "operator"
    await hive.broker.ack(IRIS, lease.turn, "done")
    assert (await hive.broker.lease(IRIS)).message["body"] == "hello"
    assert (await hive.kinds()).count("errand_set") == 1


async def test_an_agent_without_a_session_has_nothing_to_compact(hive: Services) -> None:
    with pytest.raises(Refusal, match="it has no session yet"):
        await Steering(hive.store).compact(IRIS, "operator")


async def test_a_new_session_begins_with_the_next_turn(hive: Services, steering: Steering) -> None:
    assert await steering.new_session(IRIS, "operator") == {"agent": "iris", "turn": None}
    await hive.say("hm1nd", "iris", "hello")
    lease = await hive.broker.lease(IRIS)
    assert lease.session is None
    await hive.broker.ack(IRIS, lease.turn, "done", session="new")
    assert (await hive.agents.get("iris")).session == "new"


async def test_the_ack_of_a_turn_that_ran_does_not_bring_the_old_session_back(
    hive: Services, steering: Steering
) -> None:
    for n in range(2):
        await hive.say("hm1nd", "iris", str(n))
    lease = await hive.broker.lease(IRIS)
    assert (await steering.new_session(IRIS, "operator"))["turn"] == lease.turn.id
    acked = await hive.broker.ack(IRIS, lease.turn, "done", session="old", next_fence="f-2")
    assert acked.lease is not None
    assert acked.lease.session is None
    agent = await hive.agents.get("iris")
    assert (agent.session, agent.context_tokens) == (None, None)


async def test_a_chosen_model_and_effort_are_in_force_from_the_next_turns_edge(
    hive: Services, steering: Steering
) -> None:
    for n in range(3):
        await hive.say("hm1nd", "iris", str(n))
    first = await hive.broker.lease(IRIS, "f-1")
    await steering.choose(IRIS, "model", "opus", "operator")
    await steering.choose(IRIS, "effort", "high", "operator")
    assert first.settings == SETTINGS
    second = (await hive.broker.ack(IRIS, first.turn, "done", next_fence="f-2")).lease
    assert second is not None
    assert second.settings == {**SETTINGS, "model": "opus", "effort": "high"}
    for what in ("model", "effort"):
        assert (await steering.choose(IRIS, what, "default", "operator"))["chosen"] is None
    third = (await hive.broker.ack(IRIS, second.turn, "done", next_fence="f-3")).lease
    assert third is not None
    assert third.settings == SETTINGS


@pytest.mark.parametrize(
    ("what", "raw"),
    [("model", ""), ("model", "--help"), ("model", None), ("model", 7), ("effort", "huge"), ("effort", None)],
)
async def test_what_is_no_model_and_no_effort_is_refused(steering: Steering, what: str, raw: object) -> None:
    with pytest.raises(Refusal, match=f"as the {what}"):
        await steering.choose(IRIS, what, raw, "operator")


async def test_a_model_that_agent_toml_does_not_make_available_is_refused(hive: Services, steering: Steering) -> None:
    settings = harness_settings(parse_agent_toml(b'available_models = ["haiku", "sonnet"]'), "You are a test.")
    await hive.store.write(lambda tx: set_deployed(tx, IRIS, "1" * 40, settings))
    with pytest.raises(Refusal, match=r"its agent.toml makes haiku, sonnet available \(available_models\); choose one"):
        await steering.choose(IRIS, "model", "opus", "operator")
    assert (await steering.choose(IRIS, "model", "haiku", "operator"))["chosen"] == "haiku"
    assert (await steering.choose(IRIS, "model", "default", "operator"))["chosen"] is None
    assert (await steering.choose(IRIS, "effort", "high", "operator"))["chosen"] == "high"


async def test_nobody_is_steered_who_does_not_exist(steering: Steering) -> None:
    nobody = AgentName("nobody")
    for steer in (steering.compact(nobody, "operator"), steering.new_session(nobody, "operator")):
        with pytest.raises(Refusal, match="cannot find nobody"):
            await steer
    with pytest.raises(Refusal, match="cannot find nobody"):
        await steering.choose(nobody, "model", "opus", "operator")


async def test_what_was_chosen_outlives_the_daemon(tmp_path: Path) -> None:
    async with open_services(tmp_path) as before:
        await before.add_agents("hm1nd", "iris")
        await before.sql("UPDATE agents SET session = 'old'")
        steering = Steering(before.store)
        await steering.choose(IRIS, "model", "opus", "operator")
        await steering.compact(IRIS, "operator")
    async with open_services(tmp_path) as after:
        lease = await after.broker.lease(IRIS)
        assert lease.settings is not None
        assert (lease.settings["model"], lease.errand) == ("opus", "compact")


# -- from the command line --------------------------------------------------------------------------------------------


async def test_each_verb_says_what_it_did_and_the_list_shows_it(
    hive: Services, steering: Steering, tmp_path: Path
) -> None:
    async with serve(tmp_path / "host.sock", AdminDesk(hive_of(hive)).serve) as door:
        for words, said in [
            (("model", "iris", "opus"), "the model of iris is opus, from its next turn on"),
            (("effort", "iris", "max"), "the effort of iris is max, from its next turn on"),
            (("effort", "iris", "default"), "the effort of iris is what its agent.toml says, from its next turn on"),
            (("compact", "iris"), "the next turn of iris compacts its session"),
        ]:
            done = await run_hive(tmp_path, *words)
            assert (done.returncode, done.stdout.decode().strip()) == (0, said)
        assert "opus (chosen)" in (listed := (await run_hive(tmp_path, "list")).stdout.decode())
        assert "compacts next" in listed
        done = await run_hive(tmp_path, "new-session", "iris")
        assert done.stdout.decode().strip() == "iris begins a new session with its next turn"
        refused = await run_hive(tmp_path, "effort", "iris", "huge")
        assert refused.returncode != 0
        assert b"give low, medium" in refused.stderr
        async with connect(door) as peer:
            answer = await peer.ask({"v": PROTOCOL_VERSION, "verb": "list"})
    (iris,) = [agent for agent in answer["result"]["agents"] if agent["name"] == "iris"]
    assert (iris["model"], iris["chosen_model"], iris["chosen_effort"]) == ("opus", "opus", None)


# -- from the page ----------------------------------------------------------------------------------------------------


async def post(hive: Services, path: str, **fields: str) -> dict[str, Any]:
    whole = hive_of(hive)
    async with browse(whole, headers={**JSON, **await signed_in(whole)}) as browser:
        answer: dict[str, Any] = (await browser.post(path, data=fields)).json()
        return answer


@pytest.mark.parametrize("way", ["button", "composer"])
@pytest.mark.parametrize(
    ("command", "value", "said"),
    [
        ("compact", "", "the next turn of iris compacts its session"),
        ("new-session", "", "iris begins a new session with its next turn"),
        ("model", "opus", "the model of iris is opus, from its next turn on"),
        ("effort", "default", "the effort of iris is what its agent.toml says, from its next turn on"),
        ("pause", "", "iris is paused: it takes no turn and reaches nothing"),
        ("resume", "", "iris goes on"),
    ],
)
async def test_a_button_and_a_command_in_the_composer_do_the_same(
    hive: Services, steering: Steering, way: str, command: str, value: str, said: str
) -> None:
    if way == "button":
        answer = await post(hive, "/agents/iris/command", command=command, value=value)
    else:
        answer = await post(hive, "/messages", to="iris", commands="1", body=f"/{command} {value}")
    assert answer["said"] == said
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_cancel_ends_the_turn_that_runs(hive: Services, steering: Steering) -> None:
    await hive.say("hm1nd", "iris", "hello")
    turn = (await hive.broker.lease(IRIS)).turn.id
    answer = await post(hive, "/messages", to="iris", commands="1", body="/cancel")
    assert answer["said"] == f"turn {turn} of iris is cancelled, and its messages with it"
    assert await hive.states() == {1: "acked"}


async def test_help_names_every_command(hive: Services, steering: Steering) -> None:
    said = (await post(hive, "/messages", to="iris", commands="1", body="/help"))["said"]
    assert all(f"/{word}" in said for word in COMMANDS)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("/fly", "the commands are /help"),
        ("/model", "cannot do /model: it takes NAME"),
        ("/compact now", "cannot do /compact: it takes nothing"),
        ("/", "the commands are"),
    ],
)
async def test_a_command_that_is_none_is_refused_and_sends_nothing(
    hive: Services, steering: Steering, body: str, why: str
) -> None:
    answer = await post(hive, "/messages", to="iris", commands="1", body=body)
    assert why in answer["error"]["message"]
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_what_only_looks_like_a_command_is_a_message(hive: Services, steering: Steering) -> None:
    for fields in ({"commands": "1", "body": "//compact"}, {"body": "/compact"}, {"commands": "1", "body": " /x"}):
        assert "is on its way" in (await post(hive, "/messages", to="iris", **fields))["said"]
    assert read_command("model") is None
    rows = await hive.store.rows("SELECT body FROM messages ORDER BY id")
    assert [row["body"] for row in rows] == ["/compact", "/compact", " /x"], "of two slashes one is the message's own"


async def test_the_page_shows_what_was_chosen_and_how_full_the_session_is(hive: Services, steering: Steering) -> None:
    await steering.choose(IRIS, "model", "opus", "operator")
    await steering.compact(IRIS, "operator")
    await hive.sql("UPDATE agents SET context_tokens = 150, context_window = 200 WHERE name = 'iris'")
    whole = hive_of(hive)
    async with browse(whole, headers=await signed_in(whole)) as browser:
        page = (await browser.get("/agents/iris")).text
    for shown in ("chosen by the operator", "context 75 %", "compacts next", "<option selected>opus</option>"):
        assert shown in page
