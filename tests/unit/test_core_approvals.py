"""Approvals against a model in plain dicts: whatever happens in whatever order, both tell the same story, once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from hive_core.limits import Limits
from hive_core.procedures.gate import _FREE
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.approvals import Approval, Request, Shown, put_request
from hive_core.services.under_way import in_the_way
from hive_core.store.bus import APPROVED
from tests.dashboards import gate_open, hive_of
from tests.hives import Services, wait_until
from tests.living import LivingHive

IRIS, DAMOCLES = AgentName("iris"), AgentName("damocles")
EXPIRES_S = 3600.0
LIMITS = Limits(inbox_depth=100_000, approval_ttl_s=EXPIRES_S)
DECIDED = {"denied": "it was denied", "cancelled": "took it back", "expired": "it has expired"}


@dataclass
class World:
    """What the changes are about. It outlives daemons.

    version  of each agent: what a change would do is another thing with each
    trouble  of each agent: why nothing can be done to it, "" for nothing
    verdicts approval → how its carrying out ends: True is well
    """

    version: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    trouble: defaultdict[str, str] = field(default_factory=lambda: defaultdict(str))
    verdicts: dict[int, bool] = field(default_factory=dict)
    judged: trio.Event = field(default_factory=trio.Event)


class Paint:
    """A kind of change whose end is the test's to say."""

    def __init__(self, world: World) -> None:
        self._world = world

    def title(self, approval: Approval) -> str:
        return f"another colour of {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        if code := self._world.trouble[approval.agent]:
            raise Refusal(code, f"cannot paint {approval.agent}")
        return self.shown(approval.agent, approval.payload["colour"])

    def shown(self, agent: str, colour: str) -> Shown:
        return Shown({"colour": colour}, {"version": self._world.version[agent]})

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        await step("building")
        while approval.id not in self._world.verdicts:
            await self._world.judged.wait()
        await step("proving")
        if not self._world.verdicts[approval.id]:
            raise Refusal("failed", "cannot paint: the paint is out")
        return Done(lambda tx: None, "healthy")

    async def closed(self, approval: Approval) -> None:
        pass


@dataclass
class Card:
    agent: AgentName
    colour: str
    version: int
    expires_s: float  # by the model's clock
    state: str = "pending"
    events: list[str] = field(default_factory=lambda: ["approval_requested"])
    told: int = 0  # messages to whoever asked

    def move(self, state: str) -> None:
        self.state = state
        self.events.append(f"approval_{state}")
        self.told += state not in ("approved", "cancelled")


def the_one(ends: list[str]) -> str:
    """The end that everybody gets who clicks at the same time; the first to see that a card shows something else says
    more of it."""
    told = set(ends)
    if any("you were shown; look at it again" in end for end in told):
        assert all("you were shown; look at it again and approve that" in end for end in told), told
        return max(told, key=len)
    (end,) = told
    return end


AGENTS, COLOURS = st.sampled_from([IRIS, DAMOCLES]), st.sampled_from(["red", "green"])
NUMBERS = st.sampled_from([1, 1, 2, 2, 3, 3, 4, 5])


class Story(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.cards: dict[int, Card] = {}
        self.now_s = 0.0
        self.hive = LivingHive(MANAGER, IRIS, DAMOCLES, limits=LIMITS, prepare=self._prepare)

    def _prepare(self, hive: Services, nursery: trio.Nursery) -> None:
        hive.clock.ahead_s = self.now_s
        self.world.judged = trio.Event()
        hive.gate.kinds = {**hive.gate.kinds, "paint": Paint(self.world)}
        nursery.start_soon(hive.gate.serve)

    def teardown(self) -> None:
        self.hive.close()

    def open_like(self, agent: AgentName, colour: str, besides: int = 0) -> int | None:
        """The open card that shows this change as it would be now."""
        wanted = (agent, colour, self.world.version[agent])
        for number, card in self.cards.items():
            is_open = card.state in ("pending", "approved") and number != besides
            if is_open and (card.agent, card.colour, card.version) == wanted:
                return number
        return None

    def under_way(self, agent: AgentName) -> int | None:
        """The one approval that is carried out of an agent now."""
        mine = [number for number, card in self.cards.items() if (card.agent, card.state) == (agent, "approved")]
        assert len(mine) <= 1
        return mine[0] if mine else None

    @rule(agent=AGENTS, colour=COLOURS)
    def request(self, agent: AgentName, colour: str) -> None:
        async def ask(hive: Services) -> int:
            request = Request("paint", agent, MANAGER, "because", Paint(self.world).shown(agent, colour))
            return await hive.store.write(lambda tx: put_request(tx, request, EXPIRES_S))

        number = self.hive.do(ask)
        known = self.open_like(agent, colour)
        assert number == (known or len(self.cards) + 1)
        if known is None:
            self.cards[number] = Card(agent, colour, self.world.version[agent], self.now_s + EXPIRES_S)

    @rule(agent=AGENTS)
    def the_world_moves(self, agent: AgentName) -> None:
        self.world.version[agent] += 1

    @rule(agent=AGENTS, code=st.sampled_from(["", "", "refused", "unavailable"]))
    def trouble_comes_or_goes(self, agent: AgentName, code: str) -> None:
        self.world.trouble[agent] = code

    @rule(number=NUMBERS, clicks=st.sampled_from([1, 2, 20]), stale=st.sampled_from([False, False, False, True]))
    def approve(self, number: int, clicks: int, stale: bool) -> None:
        ends = self.hive.do(lambda hive: self._click(hive, number, clicks, stale))
        end = the_one(ends)
        card = self.cards.get(number)
        if card is None:
            assert "cannot find approval" in end
        elif stale:
            assert "not what you were shown" in end
        elif card.state == "failed" and "approval_approved" not in card.events:
            assert "any more: cannot paint" in end
        elif card.state != "pending":
            assert DECIDED.get(card.state, card.state) in end
        elif other := self.under_way(card.agent):
            assert end.startswith(f"cannot approve {number}: approval {other} changes {card.agent} now (building)")
        elif trouble := self.world.trouble[card.agent]:
            assert "cannot paint" in end
            if trouble != "unavailable":
                card.move("failed")
        elif card.version == self.world.version[card.agent]:
            assert end == "approved"
            card.move("approved")
            self._begin(number)
        elif other := self.open_like(card.agent, card.colour, besides=number):
            assert f"approval {other} does, which is open too" in end
        else:
            assert "do something else than you were shown" in end
            card.version = self.world.version[card.agent]
            card.events.append("approval_changed")

    async def _click(self, hive: Services, number: int, clicks: int, stale: bool) -> list[str]:
        """How each of so many clicks at once ends: the state, or the refusal."""
        ends: list[str] = []
        known = await hive.store.row("SELECT digest FROM approvals WHERE id = ?", (number,))
        digest = "0" * 64 if stale or known is None else known["digest"]

        async def click() -> None:
            try:
                ends.append((await hive.gate.approve(number, digest, OPERATOR, patience_s=0)).state)
            except Refusal as refusal:
                ends.append(refusal.message)

        async with trio.open_nursery() as nursery:
            for _ in range(clicks):
                nursery.start_soon(click)
        return ends

    def _begin(self, number: int) -> None:
        """The first step of what is approved."""
        self.cards[number].events.append("approval_step")

        async def has_begun(hive: Services) -> None:
            async def look() -> Any:
                return (await hive.approvals.get(number)).step == "building"

            await wait_until(hive.store, look)

        self.hive.do(has_begun)

    @rule(agent=AGENTS, well=st.booleans())
    def carrying_out_ends(self, agent: AgentName, well: bool) -> None:
        if (number := self.under_way(agent)) is None:
            return

        async def judge(hive: Services) -> None:
            self.world.verdicts[number] = well
            self.world.judged.set()
            self.world.judged = trio.Event()
            await hive.approvals.wait_settled(number)

        self.hive.do(judge)
        self.cards[number].events.append("approval_step")
        self.cards[number].move("done" if well else "failed")

    @rule(number=NUMBERS, how=st.sampled_from(["denied", "cancelled"]))
    def withdraw(self, number: int, how: str) -> None:
        async def say(hive: Services) -> Approval:
            if how == "denied":
                return await hive.gate.deny(number, "no", OPERATOR)
            return await hive.gate.cancel(number, "no", MANAGER)

        card = self.cards.get(number)
        if card is not None and card.state in ("pending", how):
            assert self.hive.do(say).state == how
            if card.state == "pending":
                card.move(how)
        else:
            with pytest.raises(Refusal) as caught:
                self.hive.do(say)
            assert caught.value.code == ("not_found" if card is None else "conflict")

    @rule(seconds=st.sampled_from([EXPIRES_S / 2, EXPIRES_S]))
    def time_passes(self, seconds: float) -> None:
        self.hive.do(lambda hive: hive.let_time_pass(seconds))
        self.now_s += seconds
        for card in self.cards.values():
            if card.state == "pending" and card.expires_s <= self.now_s:
                card.move("expired")

    @rule()
    def the_daemon_starts_again(self) -> None:
        self.hive.restart()

    @invariant()
    def both_tell_the_same(self) -> None:
        rows, events, told = self.hive.do(self._look)
        assert {row["id"]: (row["state"], row["step"]) for row in rows} == {
            number: (card.state, self._step_of(card)) for number, card in self.cards.items()
        }
        assert events == {number: card.events for number, card in self.cards.items()}
        assert told == sum(card.told for card in self.cards.values())
        for row in rows:
            assert (row["resolved_at_ms"] is None) == (row["state"] == "pending")
            assert (row["proof"] == "healthy") == (row["state"] == "done")

    def _step_of(self, card: Card) -> str | None:
        return "building" if card.state == "approved" and card.events[-1] == "approval_step" else None

    async def _look(self, hive: Services) -> tuple[list[Any], dict[int, list[str]], int]:
        events: dict[int, list[str]] = {}
        sql = "SELECT kind, json_extract(data, '$.approval') AS number FROM events ORDER BY seq"
        for row in await hive.store.rows(sql):
            if row["kind"].startswith("approval_"):
                events.setdefault(row["number"], []).append(row["kind"])
        letters = "SELECT count(*) FROM deliveries WHERE recipient = 'hm1nd'"
        return await hive.store.rows("SELECT * FROM approvals ORDER BY id"), events, await hive.value(letters)


def test_approvals_do_what_a_plain_model_does() -> None:
    few = settings(max_examples=30, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Story, settings=few)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("change", ["", "version", "trouble"])
async def test_of_twenty_clicks_at_once_one_is_the_winner_and_all_get_the_same_end(hive: Services, change: str) -> None:
    world = World()
    paint = Paint(world)
    hive.gate.kinds = {**hive.gate.kinds, "paint": paint}
    request = Request("paint", IRIS, MANAGER, "because", paint.shown(IRIS, "red"))
    number = await hive.store.write(lambda tx: put_request(tx, request, EXPIRES_S))
    digest = (await hive.approvals.get(number)).digest
    world.version[IRIS] += change == "version"
    world.trouble[IRIS] = "refused" if change == "trouble" else ""
    ends: list[str] = []

    async def click() -> None:
        try:
            ends.append((await hive.gate.approve(number, digest, OPERATOR, patience_s=0)).state)
        except Refusal as refusal:
            ends.append(refusal.message)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(click)
    assert len(ends) == 20
    the_one(ends)
    kinds = [kind for kind in await hive.kinds() if kind.startswith("approval_")]
    assert kinds[1:] == [{"": "approval_approved", "version": "approval_changed", "trouble": "approval_failed"}[change]]


async def test_of_clicks_on_two_cards_of_one_agent_at_once_one_card_is_approved_and_the_other_after_its_end(
    hive: Services,
) -> None:
    world = World()
    paint = Paint(world)
    hive.gate.kinds = {**hive.gate.kinds, "paint": paint}
    cards, ends = [], dict[int, set[str]]()
    for colour in ("red", "green"):
        request = Request("paint", IRIS, MANAGER, "because", paint.shown(IRIS, colour))
        number = await hive.store.write(lambda tx, request=request: put_request(tx, request, EXPIRES_S))  # type: ignore[misc]
        cards.append(await hive.approvals.get(number))

    async def click(card: Approval) -> None:
        try:
            end = (await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)).state
        except Refusal as refusal:
            end = f"{refusal.code}: {refusal.message}"
        ends.setdefault(card.id, set()).add(end)

    async with trio.open_nursery() as nursery:
        for card in cards * 10:
            nursery.start_soon(click, card)
    (first,) = (number for number in ends if ends[number] == {"approved"})
    (second,) = (card for card in cards if card.id != first)
    why = f"approval {first} changes iris now; once that is over this is shown anew, approve it then"
    assert ends[second.id] == {f"conflict: cannot approve {second.id}: {why}"}
    assert (await hive.approvals.get(second.id)).state == "pending"
    world.verdicts |= {1: True, 2: True}
    async with gate_open(hive_of(hive)):
        await hive.approvals.wait_settled(first)
        assert (await hive.gate.approve(second.id, second.digest, OPERATOR)).state == "done"


@pytest.mark.parametrize("of_all", ["update_meta_inputs", "claude"])
async def test_what_changes_every_agent_and_what_changes_one_are_not_carried_out_at_once(
    hive: Services, of_all: str
) -> None:
    def of(kind: str, agent: str) -> Request:
        return Request(kind, AgentName(agent), MANAGER, "because", Shown({}))

    asked = [of(of_all, "hm1nd"), of("apply_commit", "iris"), of("raise_budget", "iris")]
    for one in asked:
        await hive.store.write(lambda tx, one=one: put_request(tx, one, EXPIRES_S))  # type: ignore[misc]
    for under_way, hindered in ((1, {2, 4}), (2, {1, 4}), (3, set())):
        await hive.sql("UPDATE approvals SET state = 'approved' WHERE id = ?", under_way)
        others = [*enumerate(asked, 1), (4, of("destroy", "iris")), (5, of("schedule_prompt", "iris"))]
        found = {
            number
            for number, one in others
            if await hive.store.write(lambda tx, n=number, one=one: in_the_way(tx, one.kind, one.agent, n))  # type: ignore[misc]
        }
        assert found == hindered, under_way
        await hive.sql("UPDATE approvals SET state = 'pending' WHERE id = ?", under_way)


async def test_what_has_come_to_its_end_since_it_was_listed_is_not_carried_out_again(hive: Services) -> None:
    world = World()
    paint, begun = Paint(world), list[int]()
    hive.gate.kinds = {**hive.gate.kinds, "paint": paint}
    carry_out, approved = paint.carry_out, hive.approvals.approved
    cards = []
    for agent in (IRIS, DAMOCLES):
        request = Request("paint", agent, MANAGER, "because", paint.shown(agent, "red"))
        number = await hive.store.write(lambda tx, request=request: put_request(tx, request, EXPIRES_S))  # type: ignore[misc]
        cards.append(await hive.approvals.get(number))

    async def note_and_carry_out(approval: Approval, step: Step) -> Done:
        begun.append(approval.id)
        return await carry_out(approval, step)

    async def first_is_over() -> bool:
        return (await hive.approvals.get(1)).state == "done" and not hive.gate._busy

    async def list_late() -> list[Approval]:
        """Both are listed, and then the first of them ends."""
        listed = await approved()
        if len(listed) == 2:
            world.verdicts[1] = True
            world.judged.set()
            await wait_until(hive.store, first_is_over, "events", APPROVED, _FREE)  # it may be looked after, too
        return listed

    paint.carry_out = note_and_carry_out  # type: ignore[method-assign]
    hive.approvals.approved = list_late  # type: ignore[method-assign]
    world.verdicts[2] = True
    async with gate_open(hive_of(hive)):
        for card in cards:
            await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
            await wait_until(hive.store, partial(_has_begun, begun, card.id))
        await hive.approvals.wait_settled(2)
    assert begun == [1, 2]
    assert [(await hive.approvals.get(number)).state for number in (1, 2)] == ["done", "done"]


async def _has_begun(begun: list[int], number: int) -> bool:
    return number in begun
