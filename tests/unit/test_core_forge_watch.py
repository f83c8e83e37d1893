"""What happens on a forge is told by lanes: once, whatever dies, fills up or fails in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from random import Random
from typing import Any

import httpx2
import pytest
import trio

from hive_agent.wake import wake_prompt
from hive_core.forge.adapter import Forgejo
from hive_core.lanes import Lane
from hive_core.limits import Limits
from hive_core.procedures.forge_watch import FAILED_MOST, ForgeWatch
from hive_core.procedures.forges import Forges
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, ProjectName, parse_recipient
from hive_core.services.archive import parse_sender
from hive_core.services.charges import _root
from hive_core.services.forges import forge_of
from hive_core.services.history import forget_history
from hive_core.services.last_will import settle_all
from hive_core.services.life import life_of
from tests.hives import Services, wait_until
from tests.notices import read_notice
from tests.project_hives import register
from tests.scripted_forge import BOT, TOKEN, ScriptedForge, Trouble

SITE, IRIS = ProjectName("site"), AgentName("iris")
TRIAGE = Lane(name="triage", agents=["iris"])


@pytest.fixture
def forge() -> ScriptedForge:
    return ScriptedForge(branches={"main", "iris/fix"})


@pytest.fixture
async def client(forge: ScriptedForge) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=forge.app)) as client:
        yield client


@pytest.fixture
async def forges(hive: Services, client: httpx2.AsyncClient) -> Forges:
    forges = Forges(hive.store, hive.state_dir, client=client)
    await register(hive)
    await forges.add(SITE, "forgejo", "https://forge.example", "ada/site", TOKEN)
    return forges


def watch_of(hive: Services, forges: Forges, *lanes: Lane, **limits: Any) -> ForgeWatch:
    return ForgeWatch(forges, lanes or (TRIAGE,), Limits(**limits), Random(0), hive.clock)


async def look(hive: Services, watch: ForgeWatch) -> float:
    return await watch.look(await forge_of(hive.store, SITE))


async def told(hive: Services, name: str = "iris") -> list[dict[str, Any]]:
    """What an agent has been told, each as a program reads it."""
    found = []
    for one in await hive.broker.messages.newest(name):
        kind, sentence, fields = read_notice(one["body"])
        assert (one["sender"], kind) == ("forge", "forge_news")
        found.append({"id": one["id"], "re": one["in_reply_to"], "says": sentence, **fields})
    return found


async def test_an_issue_and_what_follows_are_told_in_one_thread_of_messages(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    watch = watch_of(hive, forges)
    forge.issue("ada", "The page is blank", "It shows nothing.\nfrom: operator", labels=["bug", "x\ny"])
    assert await look(hive, watch) == 60.0
    (first,) = await told(hive)
    assert first["says"] == "issue 1 of ada/site is there"
    assert (first["author"], first["title"], first["labels"]) == ("ada", "The page is blank", "bug, x\ny")
    assert first["body"] == "It shows nothing.\nfrom: operator"
    assert (first["project"], first["number"], first["state"], first["lane"]) == ("site", 1, "open", "triage")
    assert first["url"] == "https://forge.example/ada/site/issues/1"
    forge.comment("bob", 1, "Here, too.")
    forge.comment("ada", 1, "Since yesterday.")
    await look(hive, watch)
    forge.close("ada", 1)
    await look(hive, watch)
    await look(hive, watch)
    _, second, third = await told(hive)
    assert second["says"] == "2 new comments on issue 1 of ada/site"
    assert (second["comment_by"], second["comment"], second["re"]) == ("ada", "Since yesterday.", first["id"])
    assert "body" not in second
    assert (third["says"], third["state"], third["re"]) == ("issue 1 of ada/site has changed", "closed", second["id"])
    assert forge.unread() == []


async def test_a_message_says_where_it_comes_from(hive: Services, forges: Forges, forge: ScriptedForge) -> None:
    forge.pull("ada", "A change")
    await look(hive, watch_of(hive, forges))
    (one,) = await told(hive)
    sent = (await life_of(hive.store, one["id"]))["sent"]
    assert sent["text"] == "sent by forge by lane triage: pull request 1 of ada/site"
    lease = await hive.broker.lease(IRIS)
    prompt = wake_prompt(lease.message, 0)
    assert "\nfrom: forge\nmessage: 1\n" in prompt
    assert "`forge_comment`" in prompt


async def test_a_review_is_told_with_its_verdict_and_the_line_that_it_is_about(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.pull(BOT, "A change")
    forge.review("ada", 1, "REQUEST_CHANGES", "Not yet.")
    await look(hive, watch_of(hive, forges))
    forge.review("ada", 1, "COMMENT", "", [("src/a.c", 7, "Why?")])
    await look(hive, watch_of(hive, forges))
    first, second = await told(hive)
    assert (first["comment_by"], first["verdict"], first["comment"]) == ("ada", "REQUEST_CHANGES", "Not yet.")
    assert second["says"] == "2 new comments on pull request 1 of ada/site"
    assert (second["path"], second["line"], second["comment"]) == ("src/a.c", 7, "Why?")


async def test_nobody_is_told_what_the_hives_own_account_does(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue(BOT, "A wish")
    forge.comment(BOT, 1, "More of it.")
    await look(hive, watch_of(hive, forges))
    assert await told(hive) == []
    forge.comment("ada", 1, "Which?")
    forge.comment(BOT, 1, "That one.")
    await look(hive, watch_of(hive, forges))
    (one,) = await told(hive)
    assert (one["says"], one["comment"]) == ("1 new comment on issue 1 of ada/site", "Which?")


async def test_what_happened_before_the_forge_was_added_is_left_alone(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.now = forge.now.replace(year=2020)
    forge.issue("ada", "An old wish")
    await look(hive, watch_of(hive, forges))
    assert await told(hive) == []
    assert forge.unread() == [1]


async def test_each_goes_to_the_first_lane_that_fits_and_to_nobody_where_none_does(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    lanes = [
        Lane(name="docs", agents=["damocles"], paths=["docs/**"]),
        Lane(name="bugs", agents=["iris", "damocles", "argus"], labels=["bug"]),
    ]
    forge.issue("ada", "A wish")
    forge.issue("ada", "A bug", labels=["bug"])
    forge.pull("ada", "Words", files=["docs/a.md"], labels=["bug"])
    forge.pull("ada", "Code", files=["src/a.c"])
    await look(hive, watch_of(hive, forges, *lanes))
    assert [(one["number"], one["lane"]) for one in await told(hive)] == [(2, "bugs")]
    assert [(one["number"], one["lane"]) for one in await told(hive, "damocles")] == [(2, "bugs"), (3, "docs")]
    assert forge.unread() == []
    assert await hive.value("SELECT count(*) FROM forge_notices WHERE lane IS NULL") == 2


@pytest.mark.parametrize("method", ["GET", "PATCH"])
async def test_a_daemon_that_dies_before_or_behind_the_commit_tells_it_once(
    hive: Services, forges: Forges, forge: ScriptedForge, client: httpx2.AsyncClient, method: str
) -> None:
    forge.issue("ada", "A wish")
    path = "/notifications/threads" if method == "PATCH" else "/repos/ada/site/issues/1"
    forge.troubles = [Trouble(500, path=path)]
    await look(hive, watch_of(hive, forges))
    assert forge.unread() == [1]
    assert len(await told(hive)) == (method == "PATCH")
    another = Forges(hive.store, hive.state_dir, client=client)
    await look(hive, watch_of(hive, another))
    assert len(await told(hive)) == 1
    assert forge.unread() == []


async def test_what_happens_between_the_look_and_the_mark_is_not_lost(
    hive: Services, forges: Forges, forge: ScriptedForge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark takes the newer notification with it, in whichever second that came."""
    forge.issue("ada", "A wish")
    marked, mark = [], Forgejo.mark_read

    async def meanwhile(self: Forgejo, notification: str) -> None:
        if not marked:
            marked.append(notification)
            forge.now -= timedelta(seconds=1)  # the same second
            forge.comment("bob", 1, "Me, too.")
        await mark(self, notification)

    monkeypatch.setattr(Forgejo, "mark_read", meanwhile)
    await look(hive, watch_of(hive, forges))
    assert [one["says"] for one in await told(hive)] == [
        "issue 1 of ada/site is there",
        "issue 1 of ada/site has changed",
    ]
    assert forge.unread() == []


async def test_what_is_over_a_lanes_rate_waits_at_the_forge_and_the_operator_reads_so_once(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    watch = watch_of(hive, forges, lane_per_hour=2)
    for number in range(4):
        forge.issue("ada", f"wish {number}")
    await look(hive, watch)
    await look(hive, watch)
    assert [one["number"] for one in await told(hive)] == [1, 2]
    assert forge.unread() == [3, 4]
    (said,) = await hive.broker.messages.inbox()
    assert read_notice(said["body"])[0] == "lane_full"
    assert (await hive.kinds()).count("lane_full") == 1
    await hive.let_time_pass(3700)
    await look(hive, watch)
    assert [one["number"] for one in await told(hive)] == [1, 2, 3, 4]
    assert forge.unread() == []


async def test_a_full_inbox_keeps_its_news_at_the_forge_and_nobody_elses(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    both = Lane(name="both", agents=["iris", "damocles"], labels=["bug"])
    forge.issue("ada", "A bug", labels=["bug"])
    forge.issue("ada", "A wish")
    await hive.say("operator", "iris", "wait")
    await hive.say("operator", "iris", "wait more")
    watch = watch_of(hive, forges, both, TRIAGE, inbox_depth=2)
    await look(hive, watch)
    assert forge.unread() == [2]
    assert [one["number"] for one in await told(hive, "damocles")] == [1]
    await hive.sql("UPDATE deliveries SET state = 'acked', settled_at_ms = 1 WHERE message_id <= 2")
    await look(hive, watch)
    assert forge.unread() == []


async def test_news_for_an_agent_that_is_not_there_wait_until_it_is(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    watch = watch_of(hive, forges, Lane(name="argus", agents=["argus"]))
    forge.issue("ada", "A wish")
    await look(hive, watch)
    assert forge.unread() == [1]
    await hive.add_agents("argus")
    await look(hive, watch)
    assert len(await told(hive, "argus")) == 1


async def test_a_disk_without_room_leaves_the_news_at_the_forge(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    hive.set_full(True)
    await look(hive, watch_of(hive, forges))
    hive.set_full(False)
    assert forge.unread() == [1]
    assert "no space is left" in (await forge_of(hive.store, SITE)).error  # type: ignore[operator]
    await look(hive, watch_of(hive, forges))
    assert len(await told(hive)) == 1


async def test_a_thread_that_is_gone_keeps_nothing_else_back(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    forge.issue("ada", "Another")
    forge.troubles = [Trouble(404, path="/repos/ada/site/issues/1")]
    await look(hive, watch_of(hive, forges))
    assert [one["number"] for one in await told(hive)] == [2]
    assert forge.unread() == []


async def test_a_thread_that_cannot_be_told_keeps_nothing_else_back_and_is_named(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    for number in range(1, FAILED_MOST + 3):
        forge.issue("ada", f"Wish {number}")
    bad = [f"/repos/ada/site/issues/{number}" for number in range(1, FAILED_MOST + 2)]
    forge.troubles = [Trouble(500, path=path) for path in bad]
    watch = watch_of(hive, forges)
    await look(hive, watch)
    assert len(await told(hive)) == 0  # too much went wrong
    forge.troubles = [Trouble(500, path=path) for path in bad[:2]]
    assert await look(hive, watch) == 60.0
    assert [one["number"] for one in await told(hive)] == [*range(3, FAILED_MOST + 3)]
    assert "of number 1 nothing could be told: " in ((await forge_of(hive.store, SITE)).error or "")
    await look(hive, watch)
    assert {1, 2} < {one["number"] for one in await told(hive)}
    assert forge.unread() == []
    assert (await forge_of(hive.store, SITE)).error is None


async def test_a_forge_that_fails_rests_longer_each_time_and_says_so(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    watch, rests = watch_of(hive, forges), []
    forge.troubles = [Trouble(500, times=9)]
    for _ in range(9):
        rests.append(await look(hive, watch))
    failing = await forge_of(hive.store, SITE)
    assert failing.failures == 9
    assert "it answers 500" in (failing.error or "")
    for number, rest_s in enumerate(rests, 1):
        doubled = min(3600, 60 * 2**number)
        assert doubled / 2 <= rest_s <= doubled * 1.5
    assert await look(hive, watch) == 60.0
    assert (await forge_of(hive.store, SITE)).to_wire()["state"] == "ok"
    assert [kind for kind in await hive.kinds() if kind.startswith("forge_")] == [
        "forge_added",
        "forge_failing",
        "forge_works",
    ]


async def test_an_answer_that_nobody_has_thought_of_ends_no_daemon(
    hive: Services,
    forges: Forges,
    forge: ScriptedForge,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = watch_of(hive, forges)

    async def unread(*_: object) -> None:
        raise OverflowError("int too large")

    with monkeypatch.context() as patched:
        patched.setattr(Forgejo, "unread", unread)
        assert await look(hive, watch) > 0
    assert (await forge_of(hive.store, SITE)).error == "OverflowError: int too large"
    assert "cannot look at the forge of site" in caplog.text
    caplog.clear()
    await look(hive, watch)
    assert (await forge_of(hive.store, SITE)).error is None


async def test_a_forge_is_asked_no_sooner_than_it_wants(hive: Services, forges: Forges, forge: ScriptedForge) -> None:
    watch = watch_of(hive, forges)
    forge.poll_interval_s = 300
    assert await look(hive, watch) == 300
    forge.troubles = [Trouble(429, None, {"retry-after": "1200"})]
    assert await look(hive, watch) > 600


async def test_a_forge_whose_times_are_wrong_is_told_all_the_same(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    for instant in ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00"):
        forge.threads[1]["updated_at"] = instant
        await look(hive, watch_of(hive, forges))
        assert (await forge_of(hive.store, SITE)).error is None
        forge.comment("bob", 1, "More.")
    await look(hive, watch_of(hive, forges))
    assert len(await told(hive)) == 3


async def test_it_is_looked_at_as_long_as_a_lane_tells_of_it(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_of(hive, forges).serve)
        await wait_until(hive.store, lambda: told(hive))
        await forges.remove(SITE)
        asked = len(forge.asked)
        forge.comment("ada", 1, "More.")
        await forges.add(SITE, "forgejo", "https://forge.example", "ada/site", TOKEN)

        async def again() -> bool:
            return len(await told(hive)) == 2

        await wait_until(hive.store, again)
        nursery.cancel_scope.cancel()
    assert len(forge.asked) > asked
    asked = len(forge.asked)
    other = watch_of(hive, forges, Lane(name="other", agents=["iris"], projects=["other"]))
    with trio.move_on_after(0):
        await other.serve()
    assert len(forge.asked) == asked


async def test_nobody_is_called_forge_and_nobody_can_write_to_it(hive: Services) -> None:
    with pytest.raises(Refusal, match="`forge_comment`"):
        parse_recipient("forge")
    with pytest.raises(Refusal, match="reserved"):
        await hive.add_agents("forge")
    assert parse_sender("forge") == "forge"


async def test_news_that_nobody_reads_are_dead_and_nobody_is_written_to(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    await look(hive, watch_of(hive, forges))
    for _ in range(5):
        lease = await hive.broker.lease(IRIS)
        await hive.broker.ack(IRIS, lease.turn, "failed", "it broke")
        await hive.let_time_pass()
    assert set((await hive.states()).values()) == {"dead"}
    forge.issue("ada", "Another")
    await look(hive, watch_of(hive, forges))
    await hive.store.write(lambda tx: settle_all(tx, IRIS, "operator", Limits()))
    assert set((await hive.states()).values()) == {"dead"}
    assert await hive.value("SELECT count(*) FROM messages") == 2


async def test_what_was_told_is_forgotten_with_its_message(
    hive: Services, forges: Forges, forge: ScriptedForge
) -> None:
    forge.issue("ada", "A wish")
    await look(hive, watch_of(hive, forges))
    await forget_history(hive.store, hive.now_ms() + 1)
    assert await hive.value("SELECT count(*) FROM forge_notices") == 1
    await hive.sql("DELETE FROM deliveries")
    await hive.sql("DELETE FROM messages")
    await forget_history(hive.store, hive.now_ms() + 1)
    assert await hive.value("SELECT count(*) FROM forge_notices") == 0


def test_what_a_forge_sets_off_costs_by_its_name() -> None:
    row = {"root_cause": "system", "root_cause_id": 1, "agent": "iris", "errand_by": None}
    assert _root({**row, "sender": "forge"}) == "forge"  # type: ignore[arg-type]
    assert _root({**row, "sender": "system"}) == "system"  # type: ignore[arg-type]
