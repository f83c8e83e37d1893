"""What agents' directories take of the disk, and who is told."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from dashboard.rows import Rows
from hive_core.cli import show
from hive_core.limits import Limits
from hive_core.protocol.words import AgentName
from hive_core.services.disk_use import DiskUses, measure
from hive_core.sockets.admin import AdminDesk
from hive_core.trees import remove_tree
from tests.dashboards import hive_of
from tests.hanging_disk import hanging
from tests.hives import PATIENCE_S, Services, open_services

IRIS, HM1ND = AgentName("iris"), AgentName("hm1nd")
QUOTA = 1024 * 1024


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    async with open_services(tmp_path, limits=Limits(disk_quota_bytes=QUOTA)) as services:
        await services.add_agents("hm1nd", "iris")
        for folder in (
            "agents/iris/state",
            "agents/iris/claude",
            "agents/iris/projects/x",
            "proposed/iris/config",
            "agents/hm1nd/state",
        ):
            (tmp_path / folder).mkdir(parents=True)
        yield services


def fill(hive: Services, size: int, path: str = "agents/iris/state/notes") -> None:
    (hive.state_dir / path).write_bytes(os.urandom(size))


async def take_turn(hive: Services, name: str = "iris") -> None:
    await hive.say("operator", name, "work")
    await hive.broker.ack(AgentName(name), (await hive.broker.lease(AgentName(name))).turn, "done")


async def warnings(hive: Services, name: str = "hm1nd") -> list[str]:
    sql = """
        SELECT body FROM messages m JOIN deliveries d ON d.message_id = m.id
        WHERE d.recipient = ? AND body LIKE 'disk_quota%'
    """
    return [row[0] for row in await hive.store.rows(sql, (name,))]


async def test_each_part_is_measured_after_a_turn_and_not_without_one(hive: Services) -> None:
    disk = DiskUses(hive.store, hive.broker.limits, hive.state_dir)
    await disk.look()
    empty = disk.of(IRIS)
    assert empty is not None
    fill(hive, 100_000)
    fill(hive, 50_000, "agents/iris/claude/session")
    fill(hive, 20_000, "proposed/iris/config/CLAUDE.md")
    fill(hive, 70_000, "agents/iris/projects/x/main.c")
    (hive.state_dir / "agents/iris/mirrors").mkdir()
    fill(hive, 200_000, "agents/iris/mirrors/pack")  # the hive's own, which the agent borrows from
    await disk.look()
    assert disk.of(IRIS) == empty
    await take_turn(hive)
    await disk.look()
    full = disk.of(IRIS)
    assert full is not None
    grown = [full.state - empty.state, full.claude - empty.claude, full.config - empty.config]
    assert [size // 1000 for size in (*grown, full.projects - empty.projects)] == [102, 53, 20, 73]
    assert full.bytes - empty.bytes == sum(grown) + full.projects - empty.projects
    assert full.whole


async def test_over_the_quota_is_told_once_until_it_has_cleared_up_also_by_the_next_daemon(hive: Services) -> None:
    fill(hive, QUOTA + 1)
    for _ in range(3):
        disk = DiskUses(hive.store, hive.broker.limits, hive.state_dir)
        await disk.look()
        assert disk.is_over(IRIS)
    (told,) = await warnings(hive)
    assert "the directories of iris take 1.0 MiB" in told
    assert "more than 1.0 MiB (disk_quota_bytes)" in told
    fill(hive, QUOTA // 2)
    await take_turn(hive)
    await disk.look()
    assert not disk.is_over(IRIS)
    fill(hive, 2 * QUOTA)
    await take_turn(hive)
    await disk.look()
    assert len(await warnings(hive)) == 2
    kinds = [kind for kind in await hive.kinds() if kind.startswith("disk_")]
    assert kinds == ["disk_quota_exceeded", "disk_quota_met", "disk_quota_exceeded"]


async def test_who_is_over_the_quota_takes_turns_all_the_same(hive: Services) -> None:
    fill(hive, 2 * QUOTA)
    await DiskUses(hive.store, hive.broker.limits, hive.state_dir).look()
    await take_turn(hive)


async def test_the_managers_own_is_told_to_the_operator(hive: Services) -> None:
    fill(hive, 2 * QUOTA, "agents/hm1nd/state/notes")
    await DiskUses(hive.store, hive.broker.limits, hive.state_dir).look()
    assert await warnings(hive) == []
    assert "the directories of hm1nd take" in (await warnings(hive, "operator"))[0]


async def test_the_list_and_the_row_show_it(hive: Services) -> None:
    fill(hive, 2 * QUOTA)
    house = hive_of(hive)
    house.disk._limits = hive.broker.limits
    iris = await hive.agents.get("iris")
    assert "disk over its quota" not in Rows(house).agent(iris)
    await house.disk.look()
    assert "disk over its quota" in Rows(house).agent(iris)
    assert "bytes in /state" in Rows(house).agent(iris, alone=True)
    listed = await AdminDesk(house)._list({})
    (row,) = [agent for agent in listed["agents"] if agent["name"] == "iris"]
    assert (row["disk_bytes"] > 2 * QUOTA, row["disk_quota_bytes"]) == (True, QUOTA)
    assert "2.0 MiB of 1.0 MiB!" in show.agents(listed)


async def test_what_is_linked_to_is_not_measured_and_one_that_takes_long_is_at_least_so_much(hive: Services) -> None:
    fill(hive, 10 * QUOTA, "precious")
    before = measure(hive.state_dir, IRIS)
    (hive.state_dir / "agents/iris/state/link").symlink_to(hive.state_dir)
    assert measure(hive.state_dir, IRIS).bytes - before.bytes < 10_000
    fill(hive, 1000)
    assert not measure(hive.state_dir, IRIS, within_s=-1).whole
    assert measure(hive.state_dir, AgentName("nobody")).bytes == 0
    (hive.state_dir / "agents/iris").rename(hive.state_dir / "moved")
    (hive.state_dir / "agents/iris").symlink_to(hive.state_dir / "moved")
    assert measure(hive.state_dir, IRIS).state == 0, "a link in the place of its directory"


async def test_what_all_share_is_measured_too_whatever_an_agent_plants_there(hive: Services) -> None:
    house = hive_of(hive)
    await house.disk.look()
    assert (await AdminDesk(house)._list({}))["shared_bytes"] == 0
    shared = hive.state_dir / "shared"
    shared.mkdir()
    fill(hive, 3 * QUOTA, "shared/data")
    fill(hive, 9 * QUOTA, "precious")
    (shared / "link").symlink_to(hive.state_dir)
    os.mkfifo(shared / "fifo")
    deep = os.open(shared, os.O_RDONLY)
    for _ in range(3000):  # deeper than a path can name
        os.mkdir("deep", dir_fd=deep)
        below = os.open("deep", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    await take_turn(hive)
    await house.disk.look()
    listed = await AdminDesk(house)._list({})
    assert 3 * QUOTA < listed["shared_bytes"] < 9 * QUOTA
    assert "/shared takes" in show.agents(listed)
    assert "in /shared" in Rows(house).agent(await hive.agents.get("hm1nd"), alone=True)
    assert "in /shared" not in Rows(house).agent(await hive.agents.get("iris"), alone=True)
    remove_tree("shared", os.open(hive.state_dir, os.O_RDONLY))


async def test_an_agent_whose_disk_hangs_keeps_nobody_elses_from_being_measured(
    hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_core.services.disk_use.HANGS_AFTER_S", 3.0)  # who does not hang is measured by then
    disk = DiskUses(hive.store, hive.broker.limits, hive.state_dir)
    with hanging(hive.state_dir / "agents" / "hm1nd" / "state"):
        await disk.look()
        assert disk.of(IRIS) is not None
        assert disk.of(HM1ND) is None
        fill(hive, 100_000)
        await take_turn(hive)
        await disk.look()  # whoever hangs is not looked at a second time
        use = disk.of(IRIS)
        assert use is not None
        assert use.state >= 100_000
    with trio.fail_after(PATIENCE_S):
        while disk.of(HM1ND) is None:
            await disk.look()
