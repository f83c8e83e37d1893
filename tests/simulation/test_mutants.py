"""The simulation finds what is broken: each broker here is wrong in one way, and a promise says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
from outcome import Error

from hive_core.limits import Limits
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services import broker, leases, post, rests, retention
from hive_core.services.broker import Acked, Broker
from hive_core.services.leases import Turn
from hive_core.services.reminders import Reminders
from hive_core.services.schedules import Schedules
from hive_core.store.bus import RESTING
from hive_core.store.door import Store
from hive_core.store.writer import Transaction
from tests.simulation import host
from tests.simulation.swarm import simulate
from tests.simulation.weather import CALM, HOUR_S, Weather
from tests.simulation.witness import PromiseBroken

STORM = Weather(
    agents=12,
    days=0.3,
    mail_a_day=80.0,
    crashes_a_day=6.0,
    silences_a_day=20.0,
    restarts_in_all=40.0,
    floods_in_all=6.0,
    audits_in_all=48.0,
)
# What is settled is forgotten within the run, and what nobody decides about waits for longer than that.
FORGETFUL = replace(STORM, rounds_in_all=6.0, limits=STORM.limits.model_copy(update={"kept_s": HOUR_S}))
SEED = 1


class LosesAWake(Broker):
    """A message is stored, and nobody wakes its recipient."""

    def _post(self, tx: Transaction, letters: list[Any]) -> Any:
        answers = super()._post(tx, letters)
        tx.topics = {topic for topic in tx.topics if not topic.startswith("mail:")}
        return answers


class ForgetsTheClock(Broker):
    """A message rests, and nobody knows until when."""

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
        super().end_turn(tx, agent, turn_id, ending)
        tx.topics.discard(RESTING)


class LeasesTwice(Broker):
    """What a turn took by recv is still in the queue when it was acked."""

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
        super().end_turn(tx, agent, turn_id, ending)
        sql = """
            UPDATE deliveries SET state = 'queued', settled_at_ms = NULL WHERE recipient = ? AND state = 'acked'
            AND turn_id = ? AND message_id != (SELECT message_id FROM turns WHERE id = turn_id)
        """
        tx.execute(sql, (agent, turn_id))


class ForgetsAFailure(Broker):
    """A message that was lost with its harness has its try again."""

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
        super().end_turn(tx, agent, turn_id, ending)
        if ending.outcome == "lost":
            tx.execute("UPDATE deliveries SET failures = max(failures - 1, 0) WHERE turn_id = ?", (turn_id,))


class AsksForNoFence(Broker):
    """The number of a turn is enough to end it."""

    def _ack(self, tx: Transaction, agent: AgentName, turn: Turn, *args: Any) -> Acked:
        row = tx.execute("SELECT fence FROM turns WHERE id = ?", (turn.id,)).fetchone()
        return super()._ack(tx, agent, Turn(turn.id, row["fence"]), *args)


class CountsALateAck(Broker):
    """The ack of a turn that was taken away is answered as if it had counted."""

    def _ack(self, tx: Transaction, *args: Any) -> Acked:
        return replace(super()._ack(tx, *args), counted=True)


class AnswersTooSoon(Broker):
    """A send is answered before it is stored."""

    async def send(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with trio.move_on_after(0.03):
            return await super().send(*args, **kwargs)
        return {"message": 1_000_000}


class DropsEveryTenth(Broker):
    """Some mail is put away as it comes in, and nothing tells of it."""

    def _post(self, tx: Transaction, letters: list[Any]) -> Any:
        answers = super()._post(tx, letters)
        tx.execute(
            "UPDATE deliveries SET state = 'dropped', settled_at_ms = ? WHERE state = 'queued' AND attempts = 0"
            " AND message_id % 10 = 0",
            (tx.now_ms,),
        )
        return answers


class DropsWhatFailed(Broker):
    """A message has one try, and then it is put away."""

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
        super().end_turn(tx, agent, turn_id, ending)
        sql = "UPDATE deliveries SET state = 'dropped', settled_at_ms = ? WHERE turn_id = ? AND state = 'queued'"
        tx.execute(sql, (tx.now_ms, turn_id))


class TakesNoRest(Broker):
    """What failed is due again at once."""

    def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
        super().end_turn(tx, agent, turn_id, ending)
        tx.execute("UPDATE deliveries SET available_at_ms = 0 WHERE turn_id = ? AND state = 'queued'", (turn_id,))


class TellsNobodyOfTheDead(Broker):
    def _tell_sender(self, *_: Any) -> None:
        pass


class BrakesNobody(Broker):
    def __init__(self, store: Store, limits: Limits, *args: Any, **more: Any) -> None:
        lax = limits.model_copy(update={"hops": 1_000, "pair_rate_per_hour": 10_000})
        super().__init__(store, lax, *args, **more)


FOUND = {
    LosesAWake: "is due and|was due",
    ForgetsTheClock: "is due and|was due",
    LeasesTwice: "nothing_is_handed_out_after_it_was_acked|was handed message|every_answered_ack_holds",
    ForgetsAFailure: "failures_are_counted",
    AsksForNoFence: "with another fence counted",
    CountsALateAck: "every_answered_ack_holds|was handed message",
    AnswersTooSoon: "is not there|was answered",
    DropsEveryTenth: "nothing_is_dropped",
    DropsWhatFailed: "nothing_is_dropped",
    TakesNoRest: "a_rest_is_kept",
    TellsNobodyOfTheDead: "a_dead_letter_tells_its_sender",
    BrakesNobody: "a_runaway_chain_or_pair_is_held",
}


@pytest.mark.parametrize("broken", FOUND, ids=lambda broken: broken.__name__)
def test_a_broker_that_is_broken_is_found(broken: type[Broker]) -> None:
    calm = broken in (LosesAWake, ForgetsTheClock)
    with pytest.raises(PromiseBroken, match=FOUND[broken]):
        simulate(SEED, replace(STORM, **CALM) if calm else STORM, broken)


def test_a_send_that_is_refused_and_stored_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class StoresAllTheSame(Broker):
        def _post(self, tx: Transaction, letters: list[Any]) -> Any:
            answers = super()._post(tx, letters)
            for letter, answer in zip(letters, answers, strict=True):
                if isinstance(answer, Error):
                    post.put_message(tx, letter.sender, OPERATOR, letter.body)
            return answers

    with pytest.raises(PromiseBroken, match="nothing_refused_is_there"):
        simulate(SEED, STORM, StoresAllTheSame)


def test_a_queue_that_is_read_from_its_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    newest_first = leases._SEAT.replace("ORDER BY d.message_id", "ORDER BY d.message_id DESC")
    assert newest_first != leases._SEAT
    monkeypatch.setattr(leases, "_SEAT", newest_first)
    with pytest.raises(PromiseBroken, match="first_deliveries_keep_the_order"):
        simulate(SEED, STORM)


def test_a_message_that_rests_before_the_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has a message that is backing off gets no other."""
    first_due = leases._first_due

    def nothing_or_due(tx: Transaction, agent: str, *rest: Any) -> Any:
        sql = (
            "SELECT 1 FROM deliveries WHERE recipient = ? AND state = 'queued' AND attempts > 0 AND available_at_ms > ?"
        )
        return None if tx.execute(sql, (agent, tx.now_ms)).fetchone() else first_due(tx, agent, *rest)

    monkeypatch.setattr(leases, "_first_due", nothing_or_due)
    with pytest.raises(PromiseBroken, match=r"is due and|was due"):
        simulate(SEED, replace(STORM, **CALM))


def test_an_agent_that_takes_no_rest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider is away, and the program is started for one waiting message after the other."""
    monkeypatch.setattr(leases, "_SEAT", leases._SEAT.replace("rests_until_ms", "NULL AS rests_until_ms"))
    with pytest.raises(PromiseBroken, match="an_agent_rests_after_a_turn_that_had_to_wait"):
        simulate(SEED, STORM)


def test_an_agent_that_is_woken_by_the_rests_of_its_messages_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class KnowsMessagesAlone(rests.Rests):
        def next_after(self, tx: Transaction) -> int | None:
            sql = "SELECT min(available_at_ms) FROM deliveries WHERE state = 'queued' AND available_at_ms > ?"
            at: int | None = tx.execute(sql, (tx.now_ms,)).fetchone()[0]
            return at

    monkeypatch.setattr(host, "Rests", KnowsMessagesAlone)
    with pytest.raises(PromiseBroken, match=r"is due and|was due"):
        simulate(SEED, replace(STORM, **CALM))


def test_an_agent_that_rests_for_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class RestsForAnHour(Broker):
        def _ack(self, tx: Transaction, *args: Any) -> Acked:
            acked = super()._ack(tx, *args)
            sql = "UPDATE agents SET rests_until_ms = rests_until_ms + 3600000 WHERE rests_until_ms > ?"
            tx.execute(sql, (tx.now_ms,))
            return acked

    with pytest.raises(PromiseBroken, match=r"an_agent_rests_after_a_turn_that_had_to_wait: \S+ rests for"):
        simulate(SEED, STORM, RestsForAnHour)


def test_a_schedule_that_fires_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stutters(Schedules):
        def _send(self, *args: Any) -> None:
            super()._send(*args)
            super()._send(*args)

    monkeypatch.setattr(host, "Schedules", Stutters)
    with pytest.raises(PromiseBroken, match="each_firing_is_one_message"):
        simulate(SEED, STORM)


def test_a_reminder_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reminders, "fire", lambda *_: None)
    with pytest.raises(PromiseBroken, match=r"reminder \d+ has not fired"):
        simulate(SEED, STORM)


def test_a_reminder_that_comes_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fire = Reminders.fire

    def fire_early(self: Reminders, tx: Transaction) -> None:
        sql = "SELECT due_at_ms, id FROM reminders WHERE state = 'open' AND due_at_ms BETWEEN ? AND ?"
        soon = [tuple(row) for row in tx.execute(sql, (tx.now_ms + 1, tx.now_ms + 60_000)).fetchall()]
        tx.executemany("UPDATE reminders SET due_at_ms = ? WHERE id = ?", [(tx.now_ms, number) for _, number in soon])
        fire(self, tx)
        tx.executemany("UPDATE reminders SET due_at_ms = ? WHERE id = ?", soon)

    monkeypatch.setattr(Reminders, "fire", fire_early)
    with pytest.raises(PromiseBroken, match="no_reminder_fires_early"):
        simulate(SEED, STORM)


def test_a_redelivery_that_passes_for_the_first_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for_agent = leases._for_agent
    monkeypatch.setattr(leases, "_for_agent", lambda row, attempt: for_agent(row, 1))
    with pytest.raises(PromiseBroken, match="was told attempt 1"):
        simulate(SEED, STORM)


@pytest.mark.parametrize("eaten", ["dead", "held"])
def test_a_retention_that_eats_what_is_not_settled_is_found(eaten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = "d.state NOT IN ('acked', 'dropped'"
    assert kept in retention._OLD
    monkeypatch.setattr(retention, "_OLD", retention._OLD.replace(kept, f"{kept}, '{eaten}'"))
    with pytest.raises(PromiseBroken, match="nothing_unsettled_is_forgotten"):
        simulate(SEED, FORGETFUL)


def test_a_turn_that_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes turns away, and a harness that says hello finds nothing."""

    class LosesNothing(Broker):
        async def serve_leases(self) -> None:
            await trio.sleep_forever()

        async def close_lost_turns(self, *_: Any) -> broker.Found:
            return broker.Found(None, [])

    with pytest.raises(PromiseBroken, match="runs on though"):
        simulate(SEED, STORM, LosesNothing)


def test_the_broker_of_this_tree_is_not() -> None:
    simulate(SEED, STORM)
    simulate(SEED, replace(STORM, **CALM))
    simulate(SEED, FORGETFUL)
