"""The broker against a model in plain dicts: whatever happens in whatever order, both tell the same story."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import EVERYONE, OPERATOR, SYSTEM, AgentName, parse_body
from hive_core.services.broker import Acked
from hive_core.services.leases import Lease, Turn
from tests.hives import Services
from tests.living import LivingHive

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
NAMES = (IRIS, DAMOCLES)
# Long rests, so that only the rule of time ends them.
LIMITS = Limits(tries=2, pair_rate_per_hour=4, hops=10**6, backoff_s=600, provider_rest_s=600)
MOVES = {"requeue": (("dead",), "queued"), "release": (("held",), "queued"), "drop": (("dead", "held"), "dropped")}


class Model:
    """box[agent][message] = [state, failures, rests, attempts]; the numbers of messages are their order.

    rests[agent] is there since a turn of it had to wait, until one could run: whether it rests still.
    """

    def __init__(self) -> None:
        self.box: dict[str, dict[int, list[Any]]] = {IRIS: {}, DAMOCLES: {}}
        self.rests: dict[str, bool] = {}
        self.sender: dict[int, str] = {}
        self.recent: Counter[tuple[str, str]] = Counter()

    def send(self, sender: str, recipients: list[str]) -> dict[str, str]:
        self.sender[number := len(self.sender) + 1] = sender
        self.recent.update((sender, name) for name in recipients)
        held = {n: "rate" for n in recipients if sender in NAMES and self.recent[sender, n] > LIMITS.pair_rate_per_hour}
        for name in self.box.keys() & set(recipients):
            self.box[name][number] = ["held" if name in held else "queued", 0, False, 0]
        return held

    def due(self, agent: str) -> list[int]:
        return [n for n, (state, _, rests, _) in self.box[agent].items() if state == "queued" and not rests]

    def next(self, agent: str) -> int | None:
        """The message that a turn of the agent would begin with."""
        if self.rests.get(agent):
            return None
        waited = agent in self.rests
        return min(self.due(agent), key=lambda n: (self.box[agent][n][3] if waited else 0, n), default=None)

    def take(self, agent: str, number: int) -> None:
        entry = self.box[agent][number]
        entry[0], entry[3] = "leased", entry[3] + 1

    def end(self, agent: str, how: str) -> None:
        self.rests.pop(agent, None)
        if how == "waiting":
            self.rests[agent] = True
        for number, entry in list(self.box[agent].items()):
            if entry[0] == "leased":
                entry[1] += how in ("failed", "lost")
                dead = how in ("failed", "lost") and entry[1] >= LIMITS.tries
                entry[0] = "acked" if how in ("done", "cancelled") else "dead" if dead else "queued"
                entry[2] = entry[0] == "queued" and (how, entry[1]) != ("lost", 1)
                if dead and self.sender[number] != SYSTEM:
                    self.send(SYSTEM, [self.sender[number]])


AGENTS = st.sampled_from(NAMES)
OUTCOMES = st.sampled_from(["done", "failed", "waiting", "cancelled"])
NUMBERS = st.integers(1, 12)


class Story(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.hive, self.model = LivingHive(*NAMES, limits=LIMITS), Model()
        self.turns: dict[str, Lease | None] = {IRIS: None, DAMOCLES: None}
        self.ended: list[tuple[AgentName, Turn, str]] = []
        self.answers: dict[tuple[str, str], tuple[Any, list[AgentName]]] = {}
        self.fences = 0
        self.ahead_s = 0.0

    def teardown(self) -> None:
        self.hive.close()

    def new_fence(self) -> str:
        self.fences += 1
        return f"f-{self.fences}"

    def begun(self, agent: AgentName, fence: str, lease: Lease | None) -> None:
        """Check a turn that has begun, and note it in the model."""
        first = self.model.next(agent)
        assert (lease and lease.message["id"]) == first
        if lease is not None and first is not None:
            assert (lease.turn.fence, lease.waiting) == (fence, self.queued(agent) - 1)
            self.model.take(agent, first)
        self.turns[agent] = lease

    def queued(self, agent: AgentName) -> int:
        return [state for state, *_ in self.model.box[agent].values()].count("queued")

    def end(self, agent: AgentName, lease: Lease, how: str) -> None:
        self.model.end(agent, how)
        self.turns[agent] = None
        self.ended.append((agent, lease.turn, how))

    @rule(
        sender=st.sampled_from([OPERATOR, *NAMES]),
        to=st.sampled_from([[IRIS], [DAMOCLES], [IRIS, OPERATOR, DAMOCLES], [OPERATOR], [EVERYONE]]),
        key=st.none() | st.sampled_from(["k1", "k2"]),
    )
    def send(self, sender: AgentName, to: list[AgentName], key: str | None) -> None:
        def ask() -> dict[str, Any]:
            return self.hive.do(lambda hive: hive.broker.send(sender, to, parse_body("hello"), key=key))

        recipients = [n for n in NAMES if n != sender] if to == [EVERYONE] else to
        known, was_to = self.answers.get((sender, key or ""), (None, to))
        if set(was_to) != set(to):
            with pytest.raises(Refusal, match="cannot use this key"):
                ask()
            return
        answer = ask()
        if known is None:
            held = self.model.send(sender, [*recipients])
            known = {"message": len(self.model.sender), **({"held": held} if held else {})}
        assert answer == known
        if key is not None:
            self.answers[sender, key] = answer, to

    @rule(agent=AGENTS)
    def lease(self, agent: AgentName) -> None:
        fence, turn = self.new_fence(), self.turns[agent]
        if turn is not None:
            with pytest.raises(Refusal, match=f"turn {turn.turn.id} of {agent} still runs"):
                self.hive.do(lambda hive: hive.broker.lease(agent, fence))
            again = self.hive.do(lambda hive: hive.broker.lease(agent, turn.turn.fence))
            assert again == turn._replace(waiting=self.queued(agent))
        else:
            if self.model.rests.get(agent):
                self.time_passes()
            if not self.model.due(agent):
                self.send(OPERATOR, [agent], None)
            self.begun(agent, fence, self.hive.do(lambda hive: hive.broker.lease(agent, fence)))

    @rule(agent=AGENTS, most=st.integers(1, 3))
    def recv(self, agent: AgentName, most: int) -> None:
        if self.turns[agent] is None:
            with pytest.raises(Refusal, match="no turn runs"):
                self.hive.do(lambda hive: hive.broker.recv(agent, most, 0))
            return
        got = self.hive.do(lambda hive: hive.broker.recv(agent, most, 0))
        due = self.model.due(agent)[:most]
        for number in due:
            self.model.take(agent, number)
        assert ([m["id"] for m in got["messages"]], got["waiting"]) == (due, self.queued(agent))

    @rule(agent=AGENTS, how=OUTCOMES, goes_on=st.booleans(), twice=st.booleans())
    def ack(self, agent: AgentName, how: str, goes_on: bool, twice: bool) -> None:
        if self.turns[agent] is None:
            self.lease(agent)
        lease = self.turns[agent]
        assert lease is not None
        fence = self.new_fence() if goes_on else None

        async def ack(hive: Services) -> Acked:
            return await hive.broker.ack(agent, lease.turn, how, next_fence=fence)

        acked = self.hive.do(ack)
        assert acked.counted
        self.end(agent, lease, how)
        if fence is not None:
            self.begun(agent, fence, acked.lease)
        if twice and (acked.lease is not None or fence is None):
            assert self.hive.do(ack) == acked

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), how=OUTCOMES)
    def late_ack(self, data: st.DataObject, how: str) -> None:
        agent, turn, ended = data.draw(st.sampled_from(self.ended))
        assert self.hive.do(lambda hive: hive.broker.ack(agent, turn, how)) == Acked(how == ended)

    @rule(agent=AGENTS)
    def cancel(self, agent: AgentName) -> None:
        if (lease := self.turns[agent]) is None:
            with pytest.raises(Refusal, match="no turn of"):
                self.hive.do(lambda hive: hive.broker.cancel_turn(agent, OPERATOR))
        else:
            assert self.hive.do(lambda hive: hive.broker.cancel_turn(agent, OPERATOR)) == lease.turn.id
            self.end(agent, lease, "cancelled")

    @rule(agent=AGENTS, knows=st.booleans())
    def hello(self, agent: AgentName, knows: bool) -> None:
        lease = self.turns[agent]
        fences = [lease.turn.fence] if lease and knows else ["unknown"]
        found = self.hive.do(lambda hive: hive.broker.close_lost_turns(agent, fences))
        if lease is None:
            assert found == (None, [])
        elif knows:
            assert found == (lease.turn.id, [])
        else:
            assert found == (None, [lease.turn.id])
            self.end(agent, lease, "lost")

    @rule()
    def time_passes(self) -> None:
        self.hive.do(lambda hive: hive.let_time_pass())
        self.ahead_s += 24 * 3600
        self.model.recent.clear()
        self.model.rests = dict.fromkeys(self.model.rests, False)
        for box in self.model.box.values():
            for entry in box.values():
                entry[2] = False

    @rule()
    def restart(self) -> None:
        self.hive.restart()

        async def set_clock(hive: Services) -> None:
            hive.clock.ahead_s = self.ahead_s

        self.hive.do(set_clock)

    @rule(verb=st.sampled_from(sorted(MOVES)), number=NUMBERS)
    def move(self, verb: str, number: int) -> None:
        states, to = MOVES[verb]
        box = self.model.box
        names = [name for name in sorted(box) if number in box[name] and box[name][number][0] in states]
        if not names:
            with pytest.raises(Refusal, match=f"cannot {verb} message {number}"):
                self.hive.do(lambda hive: getattr(hive.broker.messages, verb)(number, OPERATOR))
            return
        assert sorted(self.hive.do(lambda hive: getattr(hive.broker.messages, verb)(number, OPERATOR))) == names
        for name in names:
            box[name][number][:3] = [to, 0, False]

    @invariant()
    def both_tell_the_same(self) -> None:
        sql = (
            "SELECT recipient, message_id, state, failures FROM deliveries WHERE recipient != 'operator' ORDER BY 1, 2"
        )
        told = [tuple(row) for row in self.hive.do(lambda hive: hive.store.rows(sql))]
        known = self.model.box.items()
        assert told == sorted((name, number, *entry[:2]) for name, box in known for number, entry in box.items())


def test_the_broker_does_what_a_plain_model_does() -> None:
    few = settings(max_examples=40, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Story, settings=few)  # type: ignore[no-untyped-call]
