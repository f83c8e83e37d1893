"""The uids of agents' containers: a range each, allocated once and kept."""

from __future__ import annotations

import grp
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from hive_core.containers import ranges
from hive_core.containers.ranges import RANGES, SIZE, pick_range
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.uid_ranges import UidRanges
from tests.hives import Services, open_services

IRIS, ARGUS = AgentName("iris"), AgentName("argus")


async def test_an_agent_keeps_its_uids_and_no_other_gets_them(tmp_path: Path) -> None:
    async with open_services(tmp_path) as hive:
        uids = UidRanges(hive.store, "a")
        iris, argus = await uids.first_uid(IRIS), await uids.first_uid(ARGUS)
        assert abs(iris - argus) >= SIZE
        assert [event for event in await hive.kinds() if event == "uids_allocated"] == ["uids_allocated"] * 2
    async with open_services(tmp_path) as hive:
        assert await UidRanges(hive.store, "moved").first_uid(IRIS) == iris


async def test_who_asks_at_the_same_time_gets_the_same(hive: Services) -> None:
    uids, found = UidRanges(hive.store, "a"), []

    async def ask() -> None:
        found.append(await uids.first_uid(IRIS))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
    assert len({*found}) == 1


async def test_uids_that_were_released_are_free(hive: Services) -> None:
    uids = UidRanges(hive.store, "a")
    first = await uids.first_uid(IRIS)
    await hive.store.write(lambda tx: uids.release(tx, IRIS))
    assert await hive.value("SELECT count(*) FROM uid_ranges") == 0
    assert await uids.first_uid(IRIS) == first


def test_the_ranges_are_those_that_systemd_keeps_for_containers() -> None:
    assert (RANGES[0], RANGES[-1] + 2 * SIZE - 1) == (0x80000, 0x6FFFFFFF)


def test_a_range_that_is_taken_gives_the_next_one_and_after_the_last_comes_the_first() -> None:
    first = pick_range("iris", ())
    assert pick_range("iris", {first}) == first + SIZE
    assert pick_range("iris", {uid for uid in RANGES if uid != RANGES[0]}) == RANGES[0]
    with pytest.raises(Refusal, match="all 28663 ranges are; purge some agents"):
        pick_range("iris", {*RANGES})


def test_what_a_user_of_the_host_has_or_may_give_to_containers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pick_range("iris", ())

    def getpwuid(uid: int) -> object:
        if uid == first + SIZE:
            return "somebody"
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.setattr(ranges, "_subordinate", lambda: [(first - 1, 2), (100000, 65536)])
    assert pick_range("iris", ()) == first + 2 * SIZE


def test_a_range_in_whose_middle_a_user_or_a_group_of_the_host_is_goes_to_no_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = pick_range("iris", ())
    monkeypatch.setattr(pwd, "getpwall", lambda: [SimpleNamespace(pw_uid=first + 1000)])
    monkeypatch.setattr(grp, "getgrall", lambda: [SimpleNamespace(gr_gid=first + 2 * SIZE - 1)])
    assert pick_range("iris", ()) == first + 2 * SIZE
