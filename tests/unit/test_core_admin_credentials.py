"""The verbs about credentials on host.sock, and `hive credentials` and `hive login` on top of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from hive_core.credentials import Credentials
from hive_core.hive import Hive
from hive_core.protocol.words import AgentName
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import Services, connect, run_hive, serve

KEY = "sk-ant-api03-canary-0123456789"
TOKEN = "sk-ant-oat01-" + "canary" * 10
IRIS = AgentName("iris")


@pytest.fixture
async def house(hive: Services, tmp_path: Path) -> AsyncIterator[Hive]:
    await hive.sql("UPDATE agents SET settings = json_set(settings, '$.program', 'claude')")
    house = hive_of(hive)
    await house.breaker.load()
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve):
        yield house


async def hive_says(tmp_path: Path, *words: str, stdin: str = "", code: int = 0) -> str:
    done = await run_hive(tmp_path, *words, stdin=stdin.encode())
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == code, said
    assert "canary" not in said
    return said


async def test_an_api_key_is_read_from_standard_input_stored_and_listed_without_it(house: Hive, tmp_path: Path) -> None:
    said = await hive_says(tmp_path, "login", "--api-key", stdin=f"{KEY}\n")
    assert "agents on it that go on: damocles, hm1nd, iris" in said
    found = house.credentials.find("default")
    assert found is not None
    assert (found.kind, found.secret) == ("api_key", KEY)
    said = await hive_says(tmp_path, "credentials")
    assert f"credential default untried: API key from {found.source} · used by damocles, hm1nd, iris" in said
    (row,) = json.loads(await hive_says(tmp_path, "credentials", "--json"))["credentials"]
    assert (row["name"], row["kind"], row["state"]) == ("default", "api_key", "untried")


async def test_a_token_is_given_by_name_and_takes_the_place_of_a_key(house: Hive, tmp_path: Path) -> None:
    await hive_says(tmp_path, "login", "work", "--api-key", stdin=KEY)
    await hive_says(tmp_path, "login", "work", "--token", stdin=TOKEN)
    found = house.credentials.find("work")
    assert found is not None
    assert (found.kind, found.secret) == ("oauth_token", TOKEN)


@pytest.mark.parametrize(
    ("words", "stdin", "code", "said"),
    [
        (("login", "--api-key"), "canary", 2, "cannot use this API key: it must be one word of 16"),
        (("login", "--api-key"), "", 2, "cannot use this API key"),
        (("login", "--token"), KEY, 2, "begins with sk-ant-oat"),
        (("login", "--token", "--api-key"), KEY, 2, "cannot take them together"),
        (("login", "../x", "--api-key"), KEY, 2, "as a credential's name"),
        (("credentials", "list", "work"), "", 2, "it takes no name"),
        (("credentials", "resume"), "", 2, "give the credential's name"),
        (("credentials", "resume", "work"), "", 3, "there is no credential work"),
        (("credentials", "remove", "work"), "", 3, "there is none"),
    ],
)
async def test_what_cannot_be_done_is_one_sentence_and_changes_nothing(
    house: Hive, tmp_path: Path, words: tuple[str, ...], stdin: str, code: int, said: str
) -> None:
    assert said in await hive_says(tmp_path, *words, stdin=stdin, code=code)
    assert not house.credentials.folder.exists()


@pytest.mark.parametrize("option", ["--api-key", "--token"])
async def test_a_secret_that_is_not_text_is_refused_in_one_line(house: Hive, tmp_path: Path, option: str) -> None:
    done = await run_hive(tmp_path, "login", option, stdin=b"sk-ant-\xff\xfe-0123456789")
    (line,) = done.stderr.decode().splitlines()
    assert (done.returncode, "must be one word of printable ASCII" in line) == (2, True)
    assert not house.credentials.folder.exists()


async def test_a_default_from_the_environment_is_not_changed(hive: Services, tmp_path: Path) -> None:
    house = hive_of(hive, credentials=Credentials(hive.state_dir, {"ANTHROPIC_API_KEY": KEY}))
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve):
        said = await hive_says(tmp_path, "login", "--api-key", stdin=KEY, code=4)
    assert "it comes from ANTHROPIC_API_KEY" in said


async def test_a_limit_is_told_with_what_is_left_and_can_be_resumed(house: Hive, tmp_path: Path) -> None:
    await hive_says(tmp_path, "login", "--api-key", stdin=KEY)
    headers = {"retry-after": "600", "anthropic-ratelimit-unified-5h-utilization": "0.97"}
    credential = house.breaker.credential_for(IRIS)
    assert credential is not None
    house.breaker.answered(IRIS, credential, 429, httpx2.Headers(headers))
    for words in (("credentials",), ()):
        said = await hive_says(tmp_path, *words)
        assert "credential default limited since " in said
        assert "5h window 3 % left" in said
        assert said.count("`hive credentials resume default`") == 1, "once for all agents"
    assert "is tried again at once" in await hive_says(tmp_path, "credentials", "resume", "default")
    assert None in [house.access.closed(agent) for agent in house.breaker.users("default")]


async def test_a_removed_credential_leaves_its_agents_waiting(house: Hive, tmp_path: Path) -> None:
    await hive_says(tmp_path, "login", "--api-key", stdin=KEY)
    said = await hive_says(tmp_path, "credentials", "remove", "default")
    assert "waiting for it: damocles, hm1nd, iris" in said
    closed = house.access.closed(IRIS)
    assert closed is not None
    assert closed.state == "needs_login"
    assert "credential default missing: used by damocles, hm1nd, iris" in await hive_says(tmp_path, "credentials")


@pytest.mark.parametrize(
    "words", [("credentials", "remove", ""), ("credentials", "resume", ""), ("login", "", "--api-key"), ("login", "")]
)
async def test_an_empty_name_is_not_the_default(house: Hive, tmp_path: Path, words: tuple[str, ...]) -> None:
    """It is what a shell makes of a variable that nobody set."""
    await hive_says(tmp_path, "login", "--api-key", stdin=KEY)
    assert "cannot use '' as a credential's name" in await hive_says(tmp_path, *words, stdin=KEY + "other", code=2)
    found = house.credentials.find("default")
    assert found is not None
    assert found.secret == KEY


async def test_a_kind_that_is_none_is_refused(house: Hive, tmp_path: Path) -> None:
    async with connect(tmp_path / "host.sock") as peer:
        for kind in (None, "password", ["api_key"]):
            args: dict[str, Any] = {"credential": "work", "kind": kind, "secret": KEY}
            answer = await peer.ask({"v": 1, "verb": "credentials_give", "args": args})
            assert "as the kind of a credential" in answer["error"]["message"]
