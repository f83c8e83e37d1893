"""What an agent tried to reach, as a card that is ready to be approved: the commit is the daemon's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio

from hive_core.cli.show_approvals import approval as show_approval
from hive_core.destinations import TUNNEL
from hive_core.procedures.kinds.egress import DAY_LIMIT, WAITING_LIMIT
from hive_core.procedures.together import Click, Together
from hive_core.protocol.effect import effect_line
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.approvals import Approval
from tests.checkouts import Checkout
from tests.git.test_gate import IRIS, TOML, applied, approve, click_and_die, hive, iris, mail_of, serving, tags
from tests.hives import Services, wait_until

__all__ = ["hive", "iris"]
KEPT = "# hers\n" + TOML + '\n[env]\nA = "b" # why\n'


async def wish(hive: Services, host: str = "git.example.org", port: int = 443, how: str = TUNNEL) -> str:
    return await hive.gate.egress.wish(IRIS, how, host, port)


async def cards(hive: Services) -> list[Approval]:
    return [card for card in await hive.approvals.pending() if card.kind == "egress"]


async def policy(hive: Services) -> Any:
    return json.loads(await hive.value("SELECT policy FROM agents WHERE name = 'iris'")).get("egress")


async def deploy(hive: Services, checkout: Checkout, **files: str) -> None:
    sha = checkout.commit(**files)
    asked = await hive.gate.apply_commit.request(AgentName("hm1nd"), IRIS, sha, "a change")
    async with serving(hive):
        assert (await approve(hive, asked["approval"])).state == "done"


async def test_a_wish_is_a_card_whose_commit_adds_the_entry_and_leaves_all_else(hive: Services, iris: Checkout) -> None:
    await deploy(hive, iris, agent__toml=KEPT)
    said = await wish(hive)
    (card,) = await cards(hive)
    assert said == f"asked the operator (approval {card.id}); you are told when it is decided"
    assert (card.agent, card.requested_by, card.payload["to"]) == ("iris", "iris", "git.example.org:443")
    assert hive.gate.egress.title(card) == "iris wants git.example.org:443"
    line = "wish of iris: iris wants git.example.org:443, which it tried to reach"
    assert show_approval(card.to_wire()).splitlines()[0] == f"◆ {card.id} {line}"
    (line,) = (card.effect or {})["lines"]
    assert (effect_line(line), line["weight"]) == ("egress: + git.example.org:443", "wide")
    async with serving(hive):
        assert (await approve(hive, card.id)).state == "done"
    expected = KEPT.replace(TOML, TOML + 'egress = ["git.example.org:443"]\n')
    assert applied(hive, "show", "main:agent.toml") == expected.strip()
    assert await policy(hive) == [{"to": "git.example.org:443"}]
    assert tags(hive)[f"deployed/{card.id}"] == card.payload["sha"]
    assert f"approval {card.id}, iris wants git.example.org:443: approved" in (await mail_of(hive, "iris"))[-1]
    told = (await mail_of(hive, "hm1nd"))[-1]
    assert "by which it reaches what it tried to" in told
    assert "deployed.bundle main" in told


async def test_plain_requests_are_wished_for_with_their_methods(hive: Services, iris: Checkout) -> None:
    await wish(hive, "repo.example.org", 80, "GET")
    await wish(hive, "repo.example.org", 8080, "POST")
    assert [card.payload["to"] for card in await cards(hive)] == [
        "http://repo.example.org",
        {"to": "http://repo.example.org:8080", "methods": ["GET", "HEAD", "POST"]},
    ]


async def test_the_same_wish_waits_once_however_often_and_at_once_it_comes(hive: Services, iris: Checkout) -> None:
    said: list[str] = []

    async def try_it() -> None:
        said.append(await wish(hive))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(try_it)
    (card,) = await cards(hive)
    again = f"the operator is asked already (approval {card.id}); you are told when it is decided"
    assert sorted(said) == sorted([again] * 19 + [f"asked the operator (approval {card.id}); {again.split('; ')[1]}"])


async def test_no_more_wait_than_somebody_reads_and_no_more_are_asked_in_a_day(hive: Services, iris: Checkout) -> None:
    for number in range(DAY_LIMIT):
        await wish(hive, f"h{number}.example.org")
        if number >= WAITING_LIMIT - 1:
            said = await wish(hive, "more.example.org")
            assert said.startswith(f"{WAITING_LIMIT} wishes of yours wait")
            await hive.gate.deny((await cards(hive))[0].id, "no", "operator")
    assert "within a day; let hm1nd propose it" in await wish(hive, "more.example.org")
    assert len(await cards(hive)) == WAITING_LIMIT - 1
    await hive.let_time_pass(25 * 3600)
    assert "asked the operator" in await wish(hive, "more.example.org")


async def test_what_was_denied_is_told_with_its_reason_and_asked_again_only_a_day_later(
    hive: Services, iris: Checkout
) -> None:
    await wish(hive)
    (card,) = await cards(hive)
    await hive.gate.deny(card.id, "use the mirror", "operator")
    assert await wish(hive) == f"the operator denied it (approval {card.id}): use the mirror"
    assert await cards(hive) == []
    await hive.let_time_pass(25 * 3600)
    assert "asked the operator" in await wish(hive)


async def test_a_card_is_shown_anew_when_its_agent_runs_on_something_else(hive: Services, iris: Checkout) -> None:
    await wish(hive)
    (before,) = await cards(hive)
    await deploy(hive, iris, agent__toml=KEPT)

    async def is_anew() -> bool:
        return bool((await cards(hive))[0].payload["base"] != before.payload["base"])

    async with serving(hive):
        await wait_until(hive.store, is_anew)
        (card,) = await cards(hive)
        assert card.payload["base"] == applied(hive, "rev-parse", "main")
        assert (card.payload["to"], card.digest) == ("git.example.org:443", before.digest)
        assert (await approve(hive, card.id)).state == "done"
    assert "# hers" in applied(hive, "show", "main:agent.toml")
    assert await policy(hive) == [{"to": "git.example.org:443"}]


async def test_cards_of_one_agent_are_approved_together_each_behind_the_other(hive: Services, iris: Checkout) -> None:
    hosts = ["one.example.org", "two.example.org", "three.example.org"]
    for host in hosts:
        await wish(hive, host)
    together = Together(hive.store, hive.approvals, hive.gate)
    clicks = [Click(card.id, card.digest) for card in await cards(hive)]
    async with serving(hive):
        outcomes = await together.approve(clicks, "operator")
    assert [one.approval and one.approval.state for one in outcomes] == ["done"] * 3, outcomes
    assert await policy(hive) == [{"to": f"{host}:443"} for host in hosts]
    shas = [one.approval.payload["sha"] for one in outcomes if one.approval]
    assert applied(hive, "rev-list", "--reverse", "-3", "main").split() == shas
    assert [tags(hive)[f"deployed/{click.approval_id}"] for click in clicks] == shas


async def test_a_click_counts_also_when_another_wish_was_fulfilled_since_it_was_shown(
    hive: Services, iris: Checkout
) -> None:
    for host in ("one.example.org", "two.example.org"):
        await wish(hive, host)
    first, second = await cards(hive)
    async with serving(hive):
        await approve(hive, first.id)

        async def is_on_what_runs() -> bool:
            return (await hive.approvals.get(second.id)).payload["base"] != second.payload["base"]

        await wait_until(hive.store, is_on_what_runs)
        assert (await hive.gate.approve(second.id, second.digest, "operator")).state == "done"
    assert await policy(hive) == [{"to": "one.example.org:443"}, {"to": "two.example.org:443"}]


async def test_a_card_that_is_looked_at_while_another_wish_is_fulfilled_goes_on_waiting(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for host in ("one.example.org", "two.example.org"):
        await wish(hive, host)
    first, second = await cards(hive)
    await click_and_die(hive, first.id)
    threads = trio.to_thread.current_default_thread_limiter()
    monkeypatch.setattr(threads, "total_tokens", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.cards.look_again, second)
        while not threads.borrowed_tokens:
            await trio.lowlevel.checkpoint()
        async with threads:  # it knows what main was, and no more
            applied(hive, "update-ref", "refs/heads/main", first.payload["sha"])
    (card,) = await cards(hive)
    assert (card.id, card.payload["base"], card.digest) == (second.id, first.payload["sha"], second.digest)


async def test_what_is_queued_behind_another_and_died_with_the_daemon_is_carried_out_by_the_next(
    hive: Services, iris: Checkout
) -> None:
    for host in ("one.example.org", "two.example.org"):
        await wish(hive, host)
    first, second = await cards(hive)
    for card in (first, second):
        await click_and_die(hive, card.id)
    async with serving(hive):
        for card in (first, second):
            assert (await hive.approvals.wait_settled(card.id)).state == "done"
    assert await policy(hive) == [{"to": "one.example.org:443"}, {"to": "two.example.org:443"}]
    told = [(await mail_of(hive, name))[-1] for name in ("iris", "hm1nd")]
    assert [applied(hive, "rev-parse", "main") in one for one in told] == [True, True], told


async def test_what_was_approved_and_would_do_something_else_by_now_is_not_carried_out(
    hive: Services, iris: Checkout
) -> None:
    for host in ("one.example.org", "two.example.org"):
        await wish(hive, host)
    first, second = await cards(hive)
    for card in (first, second):
        await click_and_die(hive, card.id)
    await hive.sql(f"UPDATE approvals SET digest = 'of something else' WHERE id = {second.id}")
    async with serving(hive):
        assert (await hive.approvals.wait_settled(first.id)).state == "done"
        ended = await hive.approvals.wait_settled(second.id)
    assert (ended.state, await policy(hive)) == ("failed", [{"to": "one.example.org:443"}])
    assert "it would do something else than was approved" in (ended.note or "")


async def test_a_card_whose_entry_came_another_way_fails_and_says_so(hive: Services, iris: Checkout) -> None:
    await wish(hive)
    (card,) = await cards(hive)
    await deploy(hive, iris, agent__toml='egress = ["git.example.org:443"]\n' + TOML)

    async def is_over() -> bool:
        return not await cards(hive)

    async with serving(hive):
        await wait_until(hive.store, is_over)
    assert "it is there already" in ((await hive.approvals.get(card.id)).note or "")


async def test_a_daemon_that_dies_behind_the_click_is_followed_by_one_that_carries_it_out(
    hive: Services, iris: Checkout
) -> None:
    await wish(hive)
    (card,) = await cards(hive)
    await click_and_die(hive, card.id)
    assert "the operator lets it" in await wish(hive)
    async with serving(hive):
        assert (await hive.approvals.wait_settled(card.id)).state == "done"
    assert await policy(hive) == [{"to": "git.example.org:443"}]


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.7", "169.254.169.254", "::1", "fd00::1", "64:ff9b::a00:7"])
async def test_an_address_that_is_not_public_is_never_put_before_the_operator_by_trying(
    hive: Services, iris: Checkout, host: str
) -> None:
    assert await wish(hive, host) == "it is no public address; let hm1nd propose it"
    assert await cards(hive) == []


@pytest.mark.parametrize("host", ["localhost", "me.localhost", "printer", "git.lan", "git.corp", "nas.home.arpa"])
async def test_a_name_that_is_never_public_is_not_put_before_the_operator_by_trying(
    hive: Services, iris: Checkout, host: str
) -> None:
    where = 'addresses = ["127.0.0.1"]' if "localhost" in host else "the `addresses` that it has"
    told = f"it is no public name, and needs an entry with {where}; let hm1nd propose it"
    for how in (TUNNEL, "GET"):
        assert await wish(hive, host, how=how) == told
    assert await cards(hive) == []


async def test_a_wish_for_more_than_reading_names_the_method(hive: Services, iris: Checkout) -> None:
    await deploy(hive, iris, agent__toml=f'egress = ["http://example.org"]\n{KEPT}')
    await wish(hive, "example.org", 80, "POST")
    (card,) = await cards(hive)
    assert card.reason == "iris wants POST http://example.org, which it tried to reach"
    assert hive.gate.egress.title(card) == "iris wants POST http://example.org"


async def test_what_cannot_be_asked_for_is_not_tried_again_with_each_connection(hive: Services, iris: Checkout) -> None:
    full = [f"h{number}.example.org:443" for number in range(200)]
    await deploy(hive, iris, agent__toml=f"egress = {json.dumps(full)}\n{KEPT}")
    for host in ("git.example.org", "other.example.org"):
        with pytest.raises(Refusal, match=r"cannot add 'git.example.org:443'"):
            await wish(hive, host)
    await deploy(hive, iris, agent__toml=f"egress = {json.dumps(full[:9])}\n{KEPT}")
    assert "asked the operator" in await wish(hive, "other.example.org")


async def test_a_public_ipv4_address_in_the_spelling_of_a_translator_is_to_be_asked_for_as_it_is(
    hive: Services, iris: Checkout
) -> None:
    assert await wish(hive, "64:ff9b::808:808") == "it stands for 8.8.8.8; ask for that"
    assert await cards(hive) == []


async def test_what_was_let_this_way_is_in_the_history_and_can_be_taken_back(hive: Services, iris: Checkout) -> None:
    await wish(hive)
    (card,) = await cards(hive)
    async with serving(hive):
        await approve(hive, card.id)
        back = await hive.gate.apply_commit.ask_back({"agent": "iris"})
        assert (await approve(hive, back["approval"])).state == "done"
    assert await policy(hive) is None
