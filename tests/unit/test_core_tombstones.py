"""What becomes of an agent's rows, mail and name when it is destroyed, revived and purged."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from hive_core.cli import show
from hive_core.hive import Hive
from hive_core.limits import Limits
from hive_core.procedures.destruction import Destruction
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.agents import set_deployed
from hive_core.services.approvals import Request, Shown, put_request
from hive_core.services.budgets import THE_HIVE, Budgets, parse_change
from hive_core.services.question_words import Ask
from hive_core.services.reminders import When
from hive_core.services.schedules import parse_plan
from hive_core.services.tombstones import TOMBSTONES, Tombstone, Tombstones, parse_tombstone
from hive_core.services.uid_ranges import UidRanges
from hive_core.sockets.admin import AdminDesk
from hive_core.store.bus import EVENTS
from tests.dashboards import hive_of
from tests.hives import SETTINGS, Services, open_services
from tests.processes import PATIENCE_S

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")


@asynccontextmanager
async def destroying(hive: Services) -> AsyncIterator[Hive]:
    """What is under way is carried out for as long as the block runs."""
    for name in () if (hive.state_dir / "agents").exists() else ("iris", "hm1nd", "damocles"):
        (hive.state_dir / "agents" / name / "state").mkdir(parents=True, exist_ok=True)
        (hive.state_dir / "agents" / name / "state" / "notes").write_text(name)
    whole = hive_of(hive)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(whole.destruction.serve)
        yield whole
        nursery.cancel_scope.cancel()


async def destroy(hive: Hive, name: str = "iris") -> None:
    found = await hive.destruction.destroy(AgentName(name), at_once=False)
    assert found is not None
    assert found.state == "kept"


async def mail(hive: Services, name: str) -> list[str]:
    sql = "SELECT body FROM messages m JOIN deliveries d ON d.message_id = m.id WHERE d.recipient = ? ORDER BY m.id"
    return [row[0] for row in await hive.store.rows(sql, (name,))]


async def test_all_mail_to_it_is_dead_and_each_sender_is_told_once(hive: Services) -> None:
    numbers = [await hive.say("damocles", "iris", f"{number}") for number in range(12)]
    held = await hive.say("hm1nd", "iris", "held")
    await hive.sql("UPDATE deliveries SET state = 'held', held = 'rate' WHERE message_id = ?", held)
    lease = await hive.broker.lease(IRIS)
    async with destroying(hive) as house:
        await destroy(house)
    assert lease.message["id"] == numbers[0]
    assert set((await hive.states()).values()) == {"dead"}
    some = ", ".join(str(number) for number in numbers[:10])
    assert await mail(hive, "damocles") == [
        f"message_dead: your messages {some} and 2 more to iris will not be read: iris was destroyed\nagent: iris"
    ]
    assert await mail(hive, "hm1nd") == [
        f"message_dead: your message {held} to iris will not be read: iris was destroyed\nagent: iris"
    ]
    dead = (await AdminDesk(hive_of(hive))._verbs["dead"][0]({}))["messages"]
    assert all("ago: iris was destroyed\n" in show.aside("dead", row) for row in dead), "no turn failed"
    assert await hive.value("SELECT state FROM turns WHERE agent = 'iris'") == "waiting"
    with pytest.raises(Refusal, match=f"cannot requeue message {held} for iris: it was destroyed; `hive revive iris`"):
        await hive.broker.messages.requeue(held, OPERATOR)
    with pytest.raises(Refusal, match="cannot send to iris: it was destroyed"):
        await hive.say("damocles", "iris", "again")
    async with destroying(hive) as house:
        await house.destruction.revive("iris")
    assert await hive.broker.messages.requeue(held, OPERATOR) == ["iris"]
    assert await hive.say("damocles", "iris", "again")


async def test_questions_reminders_schedules_background_works_and_approvals_of_it_end(hive: Services) -> None:
    asked = (await hive.questions.ask(DAMOCLES, Ask(IRIS, "are you well?")))["question"]
    own = (await hive.questions.ask(IRIS, Ask(OPERATOR, "am I?")))["question"]
    reminder = (await hive.reminders.remind(IRIS, When(None, 3600), "later"))["reminder"]
    schedule = (await hive.schedules.add(parse_plan("iris", "by the clock", None, None, 3600)))["schedule"]
    await hive.sql(
        "INSERT INTO background_works (agent, work, command, note, output, state, begun_at_ms)"
        " VALUES ('iris', 'a', 'sleep', '', '/state/a', 'running', 1)"
    )
    shown = Shown({"sha": "1" * 40, "base": "0" * 40, "diff": ""})
    request = Request("apply_commit", IRIS, MANAGER, "better", shown)
    card = await hive.store.write(lambda tx: put_request(tx, request, 60.0))
    async with destroying(hive) as house:
        await destroy(house)
    assert await hive.value("SELECT state FROM questions WHERE id = ?", asked) == "dropped"
    assert await hive.value("SELECT state FROM questions WHERE id = ?", own) == "cancelled"
    assert await hive.value("SELECT state FROM reminders WHERE id = ?", reminder) == "cancelled"
    assert await hive.value("SELECT state || ': ' || note FROM schedules WHERE id = ?", schedule) == (
        "paused: iris was destroyed"
    )
    assert await hive.value("SELECT state FROM background_works") == "cut_off"
    assert (await hive.approvals.get(card)).state == "denied"
    told = [
        body for body in await mail(hive, "damocles") if body.startswith("question_dropped: iris, to which you put")
    ]
    assert len(told) == 1
    assert [body for body in await mail(hive, "hm1nd") if not body.startswith("question_asked")] == [
        f"approval_resolved: approval {card} for iris: denied\napproval: {card}\nwhat: apply_commit\nagent: iris\n"
        'state: denied\nreason: "iris was destroyed"'
    ]
    await hive.let_time_pass(7200)  # nothing of it fires


async def test_its_history_stays_and_nothing_refers_to_what_is_not_there(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "done")
    async with destroying(hive) as house:
        await destroy(house)
        assert len(await hive.turns.recent("iris")) == 1
        assert len(await hive.broker.messages.newest("iris")) == 1
        assert len((await AdminDesk(house)._verbs["turns"][0]({"agent": "iris"}))["turns"]) == 1
        assert [agent.name for agent in await hive.agents.all()] == ["hm1nd", "damocles"]
        await house.destruction.purge("iris")
        assert len(await hive.turns.recent("iris")) == 1
    assert await hive.store.rows("PRAGMA foreign_key_check") == []
    kinds = [kind for kind in await hive.kinds() if kind.startswith("agent_")]
    assert kinds[-4:] == ["agent_destroying", "agent_destroyed", "agent_purging", "agent_purged"]


async def test_its_name_and_port_are_free_and_a_revived_one_takes_another_port(hive: Services) -> None:
    port = (await hive.agents.get("iris")).page_port
    await hive.sql("UPDATE agents SET session = 's-1', chosen_model = 'opus' WHERE name = 'iris'")
    async with destroying(hive) as house:
        await destroy(house)
        await hive.sql("UPDATE agents SET page_port = ? WHERE name = 'damocles'", port)
        await house.destruction.revive("iris")
        iris = await hive.agents.get("iris")
        assert (iris.session, iris.chosen_model, iris.wanted, iris.settings) == (
            "s-1",
            "opus",
            "up",
            SETTINGS,
        )
        assert iris.page_port != port
        assert (hive.state_dir / "agents" / "iris" / "state" / "notes").read_text() == "iris"


async def test_its_budgets_rest_with_it_a_new_agent_of_its_name_has_none_and_a_revived_one_has_them_again(
    hive: Services,
) -> None:
    async with destroying(hive) as house:
        for scope in ("iris", "damocles", "hive"):
            given = {"scope": scope, "day": "2", "warn_percent": 70}
            await house.ledger.set_budget(parse_change(given, 80), OPERATOR)
        kept = house.ledger.budgets.of(IRIS)
        await destroy(house)
        assert [budget.scope for budget in house.ledger.budgets.all()] == [THE_HIVE, DAMOCLES]
        await hive.add_agents("iris")
        assert [budget.scope for budget in house.ledger.budgets.of(IRIS)] == [THE_HIVE]
        await hive.sql("DELETE FROM agents WHERE name = 'iris'")
        await house.destruction.revive("iris")
        assert house.ledger.budgets.of(IRIS) == kept
        again = Budgets(hive.store)
        await again.load()
        assert again.of(IRIS) == kept


async def test_two_of_one_name_are_told_apart_and_one_is_not_revived_over_a_living_one(hive: Services) -> None:
    async with destroying(hive) as house:
        await destroy(house)
        await hive.add_agents("iris")
        with pytest.raises(Refusal, match="cannot revive iris: an agent of that name exists"):
            await house.destruction.revive("iris")
        (hive.state_dir / "agents" / "iris").mkdir()
        await destroy(house)
        newest, oldest = await house.tombstones.all()
        assert newest.label != oldest.label
        with pytest.raises(Refusal, match=f"there are {newest.label}, {oldest.label}; name one of them"):
            await house.destruction.purge("iris")
        await house.destruction.purge(oldest.label)
        assert [one.label for one in await house.tombstones.all()] == [newest.label]
        await house.destruction.purge(f"iris@{newest.label[5:9]}")  # a beginning of the date is enough
        assert await house.tombstones.all() == []


async def test_who_is_being_destroyed_is_not_started_again_meanwhile(hive: Services) -> None:
    house = hive_of(hive)
    await house.tombstones.destroy(IRIS, OPERATOR, at_once=False)
    for wanted in ("up", "paused"):
        with pytest.raises(Refusal, match="cannot start iris: it is being destroyed; wait until that is done"):
            await hive.agents.want(IRIS, wanted, OPERATOR)
    for deed in (house.destruction.purge, house.destruction.revive):
        with pytest.raises(Refusal, match="it is being destroyed; look at `hive tombstones`"):
            await deed("iris")
    assert (await hive.agents.get("iris")).wanted == "down"
    await hive.agents.want(IRIS, "down", OPERATOR)
    async with destroying(hive) as again:
        await destroy(again)


async def test_whatever_is_asked_of_a_destroyed_agent_is_answered_with_how_it_comes_back(hive: Services) -> None:
    plan = {"agent": "iris", "body": "x", "every_s": 60}
    async with destroying(hive) as house:
        await destroy(house)
        desk = AdminDesk(house)
        asked = [
            *(("snapshots", {}), ("snapshot", {}), ("start", {}), ("update", {}), ("restore_state", {}), ("logs", {})),
            *(("pause", {}), ("kill", {}), ("cancel", {}), ("destroy", {}), ("compact", {}), ("schedule", plan)),
        ]
        for verb, more in asked:
            with pytest.raises(Refusal) as refused:
                await desk._verbs[verb][0]({"agent": "iris", **more})
            assert "iris: it is destroyed; `hive tombstones` shows" in refused.value.message, verb
            assert "`hive revive iris` brings it back" in refused.value.message
            assert refused.value.code == "not_found"


async def test_the_manager_and_who_is_not_there_are_refused(hive: Services) -> None:
    async with destroying(hive) as house:
        with pytest.raises(Refusal, match="cannot destroy hm1nd: a hive has one manager"):
            await house.destruction.destroy(MANAGER, at_once=True)
        with pytest.raises(Refusal, match="cannot destroy nobody: no agent has that name"):
            await house.destruction.destroy(AgentName("nobody"), at_once=True)
        with pytest.raises(Refusal, match="cannot find a tombstone iris: `hive tombstones` shows"):
            await house.destruction.revive("iris")
    assert not (hive.state_dir / "tombstones").exists()


@pytest.mark.parametrize("raw", ["..", "a/b", "iris@..", "iris@2026/..", "iris@", "@2026", "", None, 7, "iris@2026\n"])
def test_only_a_name_and_a_date_mean_a_tombstone(raw: object) -> None:
    with pytest.raises(Refusal) as refused:
        parse_tombstone(raw)
    assert refused.value.code == "usage"


async def test_what_stands_in_the_way_of_a_revival_is_named_and_when_it_is_away_the_next_try_comes_through(
    hive: Services,
) -> None:
    async with destroying(hive) as house:
        await destroy(house)
        in_the_way = hive.state_dir / "agents" / "iris"
        in_the_way.write_text("a file")
        with pytest.raises(Refusal, match=r"agents/iris something is there already; move that away"):
            await house.destruction.revive("iris")
        (tombstone,) = await house.tombstones.all()
        assert (tombstone.state, "iris" in [one.name for one in await hive.agents.all()]) == ("kept", False)
        in_the_way.unlink()
        await house.destruction.revive("iris")
        assert (await hive.agents.get("iris")).wanted == "up"
        assert await house.tombstones.all() == []


async def test_uids_are_given_back_with_the_last_that_has_the_name(hive: Services) -> None:
    ranges = UidRanges(hive.store, "a hive")
    first = await ranges.first_uid(IRIS)
    async with destroying(hive) as house:
        await destroy(house)
        assert await ranges.first_uid(IRIS) == first
        await house.destruction.purge("iris")
    assert await hive.value("SELECT count(*) FROM uid_ranges") == 0


async def test_a_hive_that_was_ended_in_the_middle_goes_on_when_it_is_opened_again(tmp_path: Path) -> None:
    async with open_services(tmp_path) as before:
        await before.add_agents("hm1nd", "iris")
        await hive_of(before).tombstones.destroy(IRIS, OPERATOR, at_once=False)
    async with open_services(tmp_path) as after, destroying(after) as house:
        with trio.fail_after(PATIENCE_S), after.store.bus.listen("events") as listener:
            while [one.state for one in await house.tombstones.all()] != ["kept"]:
                await listener.wait()
        assert isinstance(house.destruction, Destruction)
        assert json.loads(await after.value("SELECT agent FROM tombstones"))["name"] == "iris"


async def test_what_was_done_while_the_list_of_what_is_under_way_was_read_is_not_done_again(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way = [await hive_of(hive).tombstones.destroy(IRIS, OPERATOR, at_once=False)]

    async def read_before(_: Tombstones) -> list[Tombstone]:
        return under_way

    async with destroying(hive) as house:
        await destroy(house)
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(Tombstones, "under_way", read_before)
        with hive.store.bus.listen(EVENTS) as listener:
            hive.store.bus.publish([TOMBSTONES])
            await listener.wait()
    assert await hive.value("SELECT count(*) FROM events WHERE kind = 'agent_destroyed'") == 1


async def test_a_new_agent_of_an_old_name_begins_with_the_lines_that_are_there(hive: Services) -> None:
    await hive.say("operator", "iris", "work")
    turn = (await hive.broker.lease(IRIS)).turn
    await hive.turns.add_lines(IRIS, turn.id, 0, ["12345"])
    await hive.broker.ack(IRIS, turn, "done")
    async with destroying(hive) as house:
        await destroy(house)
    await hive.store.write(lambda tx: hive.agents.create(tx, IRIS, OPERATOR))
    await hive.store.write(lambda tx: set_deployed(tx, IRIS, "0" * 40, SETTINGS))
    assert await hive.value("SELECT line_bytes FROM agents WHERE name = 'iris'") == 5
    assert Limits().inbox_depth
