"""What containers are called on the host."""

from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
import trio
from hypothesis import assume, given
from hypothesis import strategies as st

from hive_core.protocol.container_id import CONTAINER_ID_LIMIT, container_id
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, RESERVED, AgentName, CommitSha, parse_agent_name
from hive_core.services.configured import note_configured
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import Services, open_services
from tests.processes import PATIENCE_S

PARTS = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=9)
NAMES = (
    st.lists(PARTS, min_size=1, max_size=3)
    .map(lambda parts: "a" + "-".join(parts))
    .filter(lambda name: name not in RESERVED)
    .map(parse_agent_name)
)
# Two names of one beginning and one digest, found by trying.
TWINS = ("agent-0141", "agent-3948")


@given(NAMES)
def test_every_name_has_an_id_that_a_machine_and_its_interfaces_can_have(name: AgentName) -> None:
    found = container_id(name)
    assert len(found) <= CONTAINER_ID_LIMIT
    assert len(f"ve-{found}") <= 15
    assert re.fullmatch(r"hm1nd|h-[a-z0-9]([a-z0-9-]*[a-z0-9])?", found)
    assert found == container_id(name)


@given(NAMES, NAMES)
def test_a_short_name_shares_its_id_with_no_other(one: AgentName, other: AgentName) -> None:
    assume(one != other and min(len(one), len(other)) <= 9)
    assert container_id(one) != container_id(other)


@pytest.mark.parametrize(
    ("name", "found"),
    [("hm1nd", "hm1nd"), ("iris", "h-iris"), ("damocles9", "h-damocles9"), ("release-notes", "h-rel--jlq6")],
)
def test_short_names_are_kept_and_long_ones_are_cut(name: str, found: str) -> None:
    assert container_id(AgentName(name)) == found


async def test_a_name_whose_container_would_have_the_id_of_another_is_refused_when_it_is_asked_for(
    hive: Services,
) -> None:
    first, second = TWINS
    await hive.add_agents(first)
    assert container_id(AgentName(first)) == container_id(AgentName(second))
    why = f"cannot ask for {second}: its container would be called {container_id(AgentName(first))}, as that of {first}"
    with pytest.raises(Refusal, match=why):
        await hive.gate.spawn.request(MANAGER, AgentName(second), "You are late.", "a test")
    with pytest.raises(Refusal, match=f"cannot create {second}"):
        await hive.store.write(lambda tx: hive.agents.create(tx, AgentName(second), OPERATOR))
    assert await hive.value("SELECT count(*) FROM approvals") == 0


async def test_a_name_whose_container_would_have_the_id_of_an_agent_to_be_is_refused_when_it_is_asked_for(
    hive: Services,
) -> None:
    first, second = map(AgentName, TWINS)
    await hive.store.write(lambda tx: note_configured(tx, first, CommitSha("0" * 40), MANAGER, None))
    for ask in (hive.gate.spawn.request, hive.gate.init_config.request):
        with pytest.raises(Refusal, match=f"cannot ask for {second}: .* as that of {first} is; choose another name"):
            await ask(MANAGER, second, "You are late.", "a test")
    await hive.add_agents(first)


async def test_of_two_whose_containers_would_share_an_id_and_who_are_approved_together_nothing_is_made_of_one(
    tmp_path: Path,
) -> None:
    async with open_services(tmp_path) as hive:
        cards = []
        for name in TWINS:
            asked = await hive.gate.spawn.request(OPERATOR, AgentName(name), "You read.", "a test")
            cards.append(await hive.approvals.get(asked["approval"]))
        for card in cards:
            await hive.gate.approve(card.id, card.digest, OPERATOR, patience_s=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hive.gate.serve)
            with trio.fail_after(PATIENCE_S):
                done, failed = [await hive.approvals.wait_settled(card.id) for card in cards]
            nursery.cancel_scope.cancel()
        assert (done.state, failed.state) == ("done", "failed")
        shared = f"its container would be called {container_id(done.agent)}, as that of {done.agent} is"
        assert shared in (failed.note or "")
        assert [path.name for path in (tmp_path / "applied").iterdir()] == [f"{done.agent}.git"]


async def test_list_tells_the_id_of_each_container(hive: Services) -> None:
    await hive.add_agents("release-notes")
    listed = (await AdminDesk(hive_of(hive))._list({}))["agents"]
    assert {agent["name"]: agent["container"] for agent in listed} == {
        name: container_id(AgentName(name)) for name in ("hm1nd", "iris", "damocles", "release-notes")
    }
