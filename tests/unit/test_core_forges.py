"""Forges are registered when they answer; `hive forge` and its verbs on host.sock."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hive_core.cli.check_forges import look_at_forges
from hive_core.forge.api import ForgeTrouble
from hive_core.forge.words import parse_place
from hive_core.hive import Hive
from hive_core.lanes import Lane
from hive_core.procedures.forges import Forges
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import ProjectName
from hive_core.services.forges import Registered, forge_of, note_look
from hive_core.sockets.admin import AdminDesk
from hive_core.store.errors import StoreBusy
from hive_core.store.writer import Transaction
from tests.dashboards import hive_of
from tests.hives import Services, connect, run_hive, serve
from tests.project_hives import register
from tests.scripted_forge import BOT, TOKEN, ScriptedForge, Trouble

SITE = ProjectName("site")
URL = "https://forge.example"
LANES = [Lane(name="words", agents=["iris", "operator"], paths=["docs/**"])]


@pytest.fixture
def forge() -> ScriptedForge:
    return ScriptedForge()


@pytest.fixture
async def forges(hive: Services, forge: ScriptedForge) -> AsyncIterator[Forges]:
    await register(hive)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=forge.app)) as client:
        yield Forges(hive.store, hive.state_dir, LANES, client)


@pytest.fixture
async def house(hive: Services, forges: Forges, tmp_path: Path) -> AsyncIterator[Hive]:
    house = hive_of(hive)
    house.forges = forges
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve):
        yield house


async def add(forges: Forges, url: str = URL, token: str = TOKEN) -> Any:
    return await forges.add(SITE, "forgejo", url, "ada/site", token)


def files(hive: Services) -> list[Path]:
    return sorted((hive.state_dir / "credentials" / "forges").glob("*"))


async def hive_says(tmp_path: Path, *words: str, stdin: str = "", code: int = 0) -> str:
    done = await run_hive(tmp_path, *words, stdin=stdin.encode())
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == code, said
    assert TOKEN not in said
    return said


async def test_a_forge_is_added_listed_checked_and_forgotten(
    house: Hive, hive: Services, forge: ScriptedForge, tmp_path: Path
) -> None:
    said = await hive_says(tmp_path, "forge", "add", "site", URL, "ada/site", "--token", "-", stdin=f"{TOKEN}\n")
    assert f"knows the hive as {BOT}, default branch main, 0 unread" in said
    (file,) = files(hive)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    said = await hive_says(tmp_path, "forge", "list")
    assert "site     forgejo  https://forge.example/ada/site" in said
    forge.now = forge.now.replace(year=forge.now.year + 1)
    forge.issue("ada", "A wish")
    assert "1 unread notification" in await hive_says(tmp_path, "forge", "check", "site")
    assert forge.unread() == [1]
    await hive_says(tmp_path, "forge", "rm", "site")
    assert files(hive) == []
    assert "no project has a forge" in await hive_says(tmp_path, "forge")
    assert json.loads(await hive_says(tmp_path, "forge", "list", "--json")) == {"forges": []}
    assert {"forge_added", "forge_removed"} <= set(await hive.kinds())
    assert await hive.value("SELECT count(*) FROM events WHERE data LIKE ?", f"%{TOKEN}%") == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("add", "site", URL, "ada/site"), 2, "--token"),
        (("add", "site", URL, "--token", "-"), 2, "it takes PROJECT URL OWNER/REPO"),
        (("add", "Site", URL, "ada/site", "--token", "-"), 2, "as a project's name"),
        (("add", "site", "forge", "ada/site", "--token", "-"), 2, "as the forge's address"),
        (("add", "site", URL, "site", "--token", "-"), 2, "give OWNER/REPO"),
        (("add", "site", URL, "ada/other", "--token", "-"), 3, "no such thing"),
        (("add", "site", URL, "ada/site", "--token", "/nowhere/at-all"), 2, "there is no such file"),
        (("add", "site", URL, "ada/site", "--kind", "github", "--token", "-"), 3, "no such thing"),
        (("add", "notes", URL, "ada/site", "--token", "-"), 3, "there is no project notes: `hive project add notes"),
        (("check", "site"), 3, "it has none"),
        (("rm", "site"), 3, "it has none"),
        (("list", "site"), 2, "it takes nothing"),
        (("rehearse", "site"), 2, "it takes PROJECT NUMBER"),
        (("rehearse", "site", "x"), 2, "as the number"),
        (("rehearse", "site", "7"), 3, "it has none"),
        (("list", "--kind", "github"), 2, "belong to"),
    ],
)
async def test_what_cannot_be_is_refused_and_leaves_nothing(
    house: Hive, hive: Services, tmp_path: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    assert said in await hive_says(tmp_path, "forge", *words, stdin=TOKEN, code=code)
    assert files(hive) == []
    assert await house.forges.rows() == []


async def test_a_project_that_is_removed_takes_its_forge_and_the_token_along(
    house: Hive, hive: Services, tmp_path: Path
) -> None:
    await add(house.forges)
    await register(hive, "notes")
    await house.forges.add(ProjectName("notes"), "forgejo", URL, "ada/site", TOKEN)
    await hive_says(tmp_path, "project", "rm", "site")
    assert [row["project"] for row in await house.forges.rows()] == ["notes"]
    assert [path.name.partition(".")[0] for path in files(hive)] == ["notes"]
    assert (await hive.kinds())[-2:] == ["forge_removed", "project_removed"]


async def test_the_token_of_a_forge_that_a_daemon_removed_and_died_is_removed_by_the_next(
    forges: Forges, hive: Services
) -> None:
    await add(forges)
    await hive.sql("DELETE FROM forges")
    await forges.tidy()  # as the watch begins
    assert files(hive) == []


async def test_a_token_that_the_forge_refuses_is_not_kept(forges: Forges, hive: Services) -> None:
    for token, why in (
        (TOKEN[::-1], "refuses the token"),
        ("short", "one word"),
        (f"{TOKEN} x", "one word"),
        (7, "one"),
    ):
        with pytest.raises(Refusal, match=why) as refused:
            await add(forges, token=token)  # type: ignore[arg-type]
        assert TOKEN not in refused.value.message
    assert files(hive) == []


async def test_a_new_token_takes_the_place_of_the_old_one(forges: Forges, hive: Services, forge: ScriptedForge) -> None:
    await add(forges)
    first = await forge_of(hive.store, SITE)
    forge.tokens = {"another-token": "other-bot"}
    with pytest.raises(ForgeTrouble, match="refuses the token"):
        await forges.check(SITE)
    await add(forges, token="another-token")
    again = await forge_of(hive.store, SITE)
    assert (again.id, again.login) == (first.id, "other-bot")
    assert [file.read_text() for file in files(hive)] == ["another-token\n"]


async def test_a_token_is_never_sent_to_another_place_than_it_was_given_for(
    forges: Forges, hive: Services, forge: ScriptedForge
) -> None:
    await add(forges)
    first = await forge_of(hive.store, SITE)
    # As one that a daemon left behind which died between the two.
    await hive.sql("UPDATE forges SET url = 'https://evil.example'")
    asked = len(forge.asked)
    with pytest.raises(Refusal, match="its token is not there"):
        await forges.check(SITE)
    assert len(forge.asked) == asked
    await add(forges, "https://other.example")
    assert (await forge_of(hive.store, SITE)).id > first.id
    assert len(files(hive)) == 1


async def test_a_disk_that_takes_nothing_leaves_the_forge_as_it_was(
    forges: Forges, hive: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add(forges)
    before = files(hive), await forges.rows()

    async def fails(_: Any) -> None:
        raise StoreBusy("no")

    monkeypatch.setattr(hive.store, "write", fails)
    with pytest.raises(StoreBusy):
        await add(forges, "https://other.example")
    monkeypatch.undo()
    assert (files(hive), await forges.rows()) == before


async def test_no_forge_is_added_that_does_not_answer_as_one(forges: Forges, forge: ScriptedForge) -> None:
    for path in ("/user", "/repos/ada/site/notifications"):
        forge.troubles = [Trouble(403, {"message": "token does not have at least one of required scope(s)"}, path=path)]
        with pytest.raises(ForgeTrouble, match="required scope"):
            await add(forges)
    assert await forges.rows() == []


def test_the_state_of_a_forge_is_one_word() -> None:
    place = parse_place("forgejo", URL, "ada/site")
    for looked, failures, state in ((None, 0, "new"), (1, 0, "ok"), (1, 2, "failing"), (None, 1, "failing")):
        assert Registered(1, SITE, place, BOT, 0, looked, failures, None, None).to_wire()["state"] == state


async def test_a_look_that_fails_is_told_once_until_one_works(forges: Forges, hive: Services) -> None:
    await add(forges)
    for error in ("no", "no", None, None, "no"):
        forge = await forge_of(hive.store, SITE)

        def note(tx: Transaction, forge: Any = forge, error: str | None = error) -> None:
            note_look(tx, forge, error, None)

        await hive.store.write(note)
    assert [kind for kind in await hive.kinds() if kind in ("forge_failing", "forge_works")] == [
        "forge_failing",
        "forge_works",
        "forge_failing",
    ]


async def test_the_doctor_names_a_forge_that_fails_and_a_lane_that_tells_nobody(
    house: Hive, hive: Services, tmp_path: Path
) -> None:
    async def doctor(*lanes: Lane) -> list[str]:
        async with connect(tmp_path / "host.sock") as operator:
            status = (await operator.ask({"v": 1, "verb": "status"}))["result"]
        found = look_at_forges("forges", lanes, status["forges"], ["iris"])
        return [f"{one.status}: {one.message}" for one in found]

    assert await doctor() == []
    triage = Lane(name="triage", agents=["iris"], projects=["site"])
    (said,) = await doctor(triage)
    assert said == "warning: lane triage: no project that it names has a forge; `hive forge add` gives it one"
    await add(house.forges)
    assert await doctor(triage) == ["ok: 1 forge, 1 lane; `hive forge list` shows them"]
    registered = await forge_of(hive.store, SITE)
    await hive.store.write(lambda tx: note_look(tx, registered, "cannot reach it; wait", None))
    assert await doctor(triage, Lane(name="other", agents=["argus"])) == [
        "warning: lane other: agents names argus, which no agent is called; mend it in the configuration",
        "warning: site: cannot reach it; wait",
    ]
    (found,) = look_at_forges("forges", [triage], None, ["iris"])
    assert found.message == "1 lane; `hive forge list` shows them"


async def test_which_lane_would_tell_of_a_thread_can_be_asked(
    house: Hive, hive: Services, forge: ScriptedForge, tmp_path: Path
) -> None:
    await add(house.forges)
    forge.pull("ada", "Words", files=["docs/a.md"])
    forge.issue("ada", "A wish")
    said = await hive_says(tmp_path, "forge", "rehearse", "site", "1")
    assert said == "of pull request 1 of site lane words tells iris, operator\n"
    assert await hive_says(tmp_path, "forge", "rehearse", "site", "2") == "of issue 2 of site no lane tells anybody\n"
    assert "no such thing" in await hive_says(tmp_path, "forge", "rehearse", "site", "3", code=3)
    assert forge.unread() == [1, 2]
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_a_forge_that_fails_is_told_where_the_operator_looks_first(
    house: Hive, hive: Services, tmp_path: Path
) -> None:
    await add(house.forges)
    assert "fails" not in await hive_says(tmp_path)
    registered = await forge_of(hive.store, SITE)
    await hive.store.write(lambda tx: note_look(tx, registered, "cannot reach it", None))
    assert "! the forge of site fails: cannot reach it" in await hive_says(tmp_path)
    assert "site: cannot reach it" in await hive_says(tmp_path, "forge", "list")
