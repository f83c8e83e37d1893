"""The simulation finds what is broken in errands, in the way to the model and in what it costs, and who hangs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import trio

from hive_core.protocol.words import AgentName
from hive_core.services import ledger, turn_ends
from hive_core.services.access import Access
from hive_core.services.breaker import Breaker
from hive_core.services.broker import Broker
from hive_core.services.budgets import Budget
from hive_core.services.freeze import Freeze
from hive_core.services.leases import Lease
from hive_core.services.ledger import Ledger
from hive_core.services.turn_costs import TurnCosts
from hive_core.store.writer import Transaction
from tests.simulation.swarm import simulate
from tests.simulation.test_mutants import SEED, STORM
from tests.simulation.weather import CALM
from tests.simulation.witness import PromiseBroken

TROUBLED = replace(
    STORM,
    hangs_a_day=3.0,
    compacts_in_all=100.0,
    limits_in_all=24.0,
    overloads_in_all=10.0,
    refusals_in_all=4.0,
    budgets_in_all=30.0,
    stops_in_all=20.0,
)


def assert_found(promise: str, broker: type[Broker] = Broker, calm: bool = False) -> None:
    with pytest.raises(PromiseBroken, match=promise):
        simulate(SEED, replace(TROUBLED, **CALM) if calm else TROUBLED, broker)


# -- errands ----------------------------------------------------------------------------------------------------------


def test_an_errand_that_keeps_mail_back_is_found() -> None:
    class PutsErrandsFirst(Broker):
        def _begin_turn(self, tx: Transaction, agent: AgentName, fence: str) -> Lease | None:
            sql = (
                "UPDATE agents SET rests_until_ms = NULL WHERE name = ? AND errand IS NOT NULL AND rests_until_ms <= ?"
            )
            tx.execute(sql, (agent, tx.now_ms))
            return super()._begin_turn(tx, agent, fence)

    assert_found("got the errand that had to wait before", PutsErrandsFirst)


def test_housekeeping_that_never_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_ends, "ERRAND_EVERY", 0)
    assert_found("housekeeping_ends")


def test_an_errand_that_is_forgotten_is_found() -> None:
    class ForgetsErrands(Broker):
        def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
            super().end_turn(tx, agent, turn_id, ending)
            tx.execute("UPDATE agents SET errand = NULL WHERE name = ?", (agent,))

    assert_found("every_errand_is_done_or_waits", ForgetsErrands)


def test_an_errand_that_costs_a_message_a_try_is_found() -> None:
    class BlamesTheMail(Broker):
        def end_turn(self, tx: Transaction, agent: str, turn_id: int, ending: Any) -> None:
            super().end_turn(tx, agent, turn_id, ending)
            sql = """
                UPDATE deliveries SET failures = failures + 1 WHERE recipient = ? AND state = 'queued'
                AND EXISTS (SELECT 1 FROM turns WHERE id = ? AND errand IS NOT NULL AND state IN ('failed', 'lost'))
            """
            tx.execute(sql, (agent, turn_id))

    assert_found("failures_are_counted", BlamesTheMail)


# -- the way to the model ---------------------------------------------------------------------------------------------


def test_a_turn_that_begins_while_the_way_is_closed_is_found() -> None:
    class AsksNobody(Broker):
        def _begin_turn(self, tx: Transaction, agent: AgentName, fence: str) -> Lease | None:
            no_turn, self._no_turn = self._no_turn, lambda _: None
            try:
                return super()._begin_turn(tx, agent, fence)
            finally:
                self._no_turn = no_turn

    assert_found("began while the (credential|stop|budget)", AsksNobody)


@pytest.mark.parametrize(("service", "what"), [(Freeze, "stop"), (Breaker, "credential")])
def test_a_restart_that_opens_the_way_is_found(
    service: type[Freeze | Breaker], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(self: Any) -> None:
        if service is Breaker:
            await self.tick()

    monkeypatch.setattr(service, "load", load)
    assert_found(f"(began|passed) while the {what}")


def test_a_way_that_opens_and_nobody_is_told_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def serve(*_: Any) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(Access, "serve", serve)
    assert_found("is due and|was due", calm=True)


# -- what calls cost --------------------------------------------------------------------------------------------------


def test_a_call_that_is_charged_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write_charges = ledger.write_charges

    def write_twice(tx: Transaction, charges: Sequence[Any]) -> None:
        write_charges(tx, [*charges, charges[0]] if charges else [])

    monkeypatch.setattr(ledger, "write_charges", write_twice)
    assert_found("is for no call, or for one a second time")


def test_a_call_that_is_never_charged_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write_charges = ledger.write_charges
    monkeypatch.setattr(ledger, "write_charges", lambda tx, charges: write_charges(tx, charges[1:]))
    assert_found("is not charged")


def test_sums_that_leave_something_out_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "_count", lambda *_: None)
    assert_found("the budgets hold")


def test_a_budget_that_stops_nobody_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "closed_at", lambda *_: None)
    monkeypatch.setattr(Budget, "closed_for", lambda *_: None)
    assert_found("while the budget")


def test_a_reservation_that_is_kept_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TurnCosts, "ended", lambda *_: False)
    assert_found("its reservation is kept")


# -- who hangs --------------------------------------------------------------------------------------------------------


def test_a_harness_that_hangs_and_nobody_hears_of_it_is_found() -> None:
    class TellsNobody(Broker):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **{**more, "silent": lambda *_: None})

    assert_found("its container is not ended", TellsNobody)


def test_the_services_of_this_tree_are_not() -> None:
    simulate(SEED, TROUBLED)
    simulate(SEED, replace(TROUBLED, **CALM))
