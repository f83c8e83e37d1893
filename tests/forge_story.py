"""What the hive does on a forge, from one end to the other: played on the scripted one and on a real Forgejo alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx2
import pytest
import trio

from hive_core.forge.adapter import Forge, open_forge
from hive_core.forge.api import ForgeTrouble
from hive_core.forge.words import Place

T = TypeVar("T")
PATIENCE_S = 60.0
LOOK_S = 0.5  # a forge tells nobody that it has come so far


async def until(look: Callable[[], Awaitable[T | None]]) -> T:
    with trio.fail_after(PATIENCE_S):
        while (found := await look()) is None:  # noqa: ASYNC110
            await trio.sleep(LOOK_S)
        return found


async def play(client: httpx2.AsyncClient, place: Place, ours: str, other: str, head: str) -> None:
    """Place: a repository where `head` is a branch ahead of the default one, which changes one file.

    ours, other: tokens of two accounts that may write there
    """
    hive, person = open_forge(client, place, ours), open_forge(client, place, other)
    us, them = await hive.login(), await person.login()
    assert us != them
    base = await hive.default_branch()
    await _pull_request(hive, person, them, head, base)
    await _issue(hive, person, us, them)
    with pytest.raises(ForgeTrouble) as refused:
        await hive.thread(999_999_999)
    assert refused.value.status == 404
    with pytest.raises(ForgeTrouble) as refused:
        await open_forge(client, place, f"{ours[:-4]}0000").login()
    assert refused.value.status == 401


async def _pull_request(hive: Forge, person: Forge, them: str, head: str, base: str) -> None:
    assert await hive.find_pull_request(head, base) is None
    made = await hive.open_pull_request("Mend it", "It was broken.", head, base)
    read = await hive.thread(made.number)
    assert (read.kind, read.title, read.body, read.state) == ("pull_request", "Mend it", "It was broken.", "open")
    assert (read.head, read.base, read.merged) == (head, base, False)
    found = await hive.find_pull_request(head, base)
    assert found is not None
    assert found.number == made.number
    with pytest.raises(ForgeTrouble) as refused:
        await hive.open_pull_request("Again", "It was broken.", head, base)
    assert refused.value.status in (409, 422)
    with pytest.raises(ForgeTrouble):
        await hive.open_pull_request("Another", "Of no branch.", f"{head}-that-is-not-there", base)
    assert len(await hive.files(made.number)) == 1
    said = await person.comment(made.number, "Please explain.")
    assert (said.author, said.body) == (them, "Please explain.")

    async def notified() -> str | None:
        unread = await hive.unread(read.updated_at_ms - 600_000)
        return next((one.id for one in unread.notifications if one.number == made.number), None)

    notification = await until(notified)
    await hive.mark_read(notification)
    assert await notified() is None
    assert [one.body for one in await hive.comments(made.number, said.at_ms)] == ["Please explain."]
    assert await hive.comments(made.number, said.at_ms + 60_000) == []
    again = await hive.thread(made.number)
    assert (again.comments, again.updated_at_ms >= read.updated_at_ms) == (1, True)


async def _issue(hive: Forge, person: Forge, us: str, them: str) -> None:
    made = await person.open_issue("The page is blank", "It shows nothing.")
    read = await hive.thread(made.number)
    assert (read.kind, read.author, read.title, read.comments) == ("issue", them, "The page is blank", 0)
    listed = await hive.threads("issue", "open", (), 1)
    assert made.number in [one.number for one in listed.threads]
    assert all(one.kind == "issue" for one in listed.threads)
    assert (await hive.threads("issue", "open", ("no-such-label",), 1)).threads == []
    assert made.number not in [one.number for one in (await hive.threads("pull_request", "all", (), 1)).threads]
    await hive.comment(made.number, "I look at it.")
    assert [one.author for one in await person.comments(made.number)] == [us]
