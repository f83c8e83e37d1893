"""The adapters of forges, against a scripted server that speaks as the published API does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hive_core.forge.adapter import FILES_MOST, PAGE, Forge, open_forge
from hive_core.forge.api import ANSWER_LIMIT_BYTES, ForgeTrouble
from hive_core.forge.words import parse_place
from hive_core.protocol.refusal import Refusal
from tests.forge_story import play
from tests.scripted_forge import BOT, TOKEN, ScriptedForge, Trouble

URL = "https://forge.example"


@asynccontextmanager
async def opened(forge: ScriptedForge, token: str = TOKEN) -> AsyncIterator[Forge]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=forge.app)) as client:
        yield open_forge(client, parse_place(forge.kind, URL, forge.repository), token)


@pytest.fixture(params=["forgejo", "github"])
def forge(request: pytest.FixtureRequest) -> ScriptedForge:
    return ScriptedForge(request.param, branches={"main", "iris/fix"})


async def trouble_of(forge: ScriptedForge, trouble: Trouble) -> ForgeTrouble:
    forge.troubles.append(trouble)
    async with opened(forge) as ours:
        with pytest.raises(ForgeTrouble) as refused:
            await ours.login()
    assert TOKEN not in str(refused.value)
    return refused.value


async def test_a_pull_request_is_opened_found_read_and_commented_on(forge: ScriptedForge) -> None:
    async with opened(forge) as ours:
        assert await ours.find_pull_request("iris/fix", "main") is None
        made = await ours.open_pull_request("Mend it", "It was broken.", "iris/fix", "main")
        found = await ours.find_pull_request("iris/fix", "main")
        assert found is not None
        assert (made.number, found.number, made.kind) == (1, 1, "pull_request")
        said = await ours.comment(1, "Ready.")
        read = await ours.thread(1)
        assert (read.title, read.body, read.author, read.state) == ("Mend it", "It was broken.", BOT, "open")
        assert (read.head, read.base, read.comments) == ("iris/fix", "main", 1)
        assert await ours.comments(1) == [said]


async def test_an_issue_is_opened_and_told_from_a_pull_request(forge: ScriptedForge) -> None:
    forge.pull("ada", "A change", labels=["bug"])
    forge.issue("bob", "A wish", labels=["bug", "later"])
    async with opened(forge) as ours:
        made = await ours.open_issue("The page is blank", "It shows nothing.")
        assert (made.number, made.kind, made.author) == (3, "issue", BOT)
        issues, more = await ours.threads("issue", "open", (), 1)
        assert not more
        assert [(one.number, one.labels) for one in issues] == [(3, ()), (2, ("bug", "later"))]
        assert [one.number for one in (await ours.threads("issue", "open", ("bug",), 1)).threads] == [2]
        assert [one.number for one in (await ours.threads("pull_request", "open", ("bug",), 1)).threads] == [1]
        assert (await ours.threads("pull_request", "open", ("later",), 1)).threads == []
        assert (await ours.thread(1)).kind == "pull_request"
        assert (await ours.thread(2)).kind == "issue"


async def test_of_a_pull_request_reviews_and_changed_files_are_read(forge: ScriptedForge) -> None:
    names = [f"docs/{number}.md" for number in range(PAGE + 3)]
    number = forge.pull("ada", "A change", files=names)
    forge.review("bob", number, "REQUEST_CHANGES", "Not yet.")
    async with opened(forge) as ours:
        assert await ours.files(number) == names
        (review,) = await ours.reviews(number)
        assert (review.author, review.verdict, review.body) == ("bob", "REQUEST_CHANGES", "Not yet.")
        forge.review("ada", number, "COMMENT", "", [("src/a.c", 7, "Why?"), ("src/b.c", 9, "Here, too.")])
        forge.review("ada", number, "PENDING", "not sent yet")
        found = await ours.reviews(number, review.at_ms + 1)
        assert sorted((one.path, one.line, one.body) for one in found if one.path) == [
            ("src/a.c", 7, "Why?"),
            ("src/b.c", 9, "Here, too."),
        ]
        assert {one.body for one in found} == {"", "Why?", "Here, too."}
        assert len(await ours.reviews(number)) == 4
        forge.files[number] = ["x"] * 1000
        assert len(await ours.files(number)) == FILES_MOST


async def test_comments_since_an_instant_are_those_after_it(forge: ScriptedForge) -> None:
    number = forge.issue("ada", "A wish")
    forge.comment("ada", number, "first")
    async with opened(forge) as ours:
        at_ms = (await ours.comments(number))[0].at_ms
        forge.comment("bob", number, "second")
        assert [one.body for one in await ours.comments(number, at_ms + 1000)] == ["second"]


async def test_of_very_many_comments_the_newest_are_among_those_that_are_read(forge: ScriptedForge) -> None:
    number = forge.issue("ada", "A wish")
    for count in range(7 * PAGE + 1):
        forge.comment("bob", number, str(count))
    async with opened(forge) as ours:
        bodies = [one.body for one in await ours.comments(number)]
    assert bodies[-1] == str(7 * PAGE)
    assert bodies[-3 * PAGE :] == [str(count) for count in range(4 * PAGE + 1, 7 * PAGE + 1)]


async def test_what_was_not_read_is_told_oldest_first_until_it_is_marked(forge: ScriptedForge) -> None:
    forge.issue("ada", "A wish")
    forge.pull("ada", "A change")
    forge.poll_interval_s = 90
    async with opened(forge) as ours:
        unread = await ours.unread(0)
        assert [(one.kind, one.number) for one in unread.notifications] == [("issue", 1), ("pull_request", 2)]
        assert unread.every_s == 90
        assert len((await ours.unread(unread.notifications[1].updated_at_ms)).notifications) == 1
        await ours.mark_read(unread.notifications[0].id)
        assert [one.number for one in (await ours.unread(0)).notifications] == [2]
        forge.comment("bob", 1, "again")
        assert [one.number for one in (await ours.unread(0)).notifications] == [2, 1]


async def test_more_notifications_than_a_page_holds_are_all_told(forge: ScriptedForge) -> None:
    for number in range(PAGE + 5):
        forge.issue("ada", f"wish {number}")
    async with opened(forge) as ours:
        assert len((await ours.unread(0)).notifications) == PAGE + 5


@pytest.mark.parametrize(
    "address", ["https://evil.example/issues/1/../2", "/issues/0", "/issues/1?x=2", "/issues/x", ""]
)
async def test_of_an_address_in_an_answer_only_a_plain_number_is_believed(address: str) -> None:
    forge = ScriptedForge()
    subject = {"title": "x", "type": "Issue", "url": address}
    told = [{"id": 1, "updated_at": "2026-01-31T08:30:00Z", "subject": subject}]
    forge.troubles.append(Trouble(200, told, path="/repos"))
    async with opened(forge) as ours:
        (one,) = (await ours.unread(0)).notifications
        assert (one.kind, one.number) == (None, None)


@pytest.mark.parametrize("comments", [-1, 2**63, 10**400])
async def test_a_number_that_can_be_none_is_an_answer_that_is_not_understood(comments: int) -> None:
    """And none that is stored: the table would not take it."""
    issue = {"number": 1, "state": "open", "title": "x", "updated_at": "2026-01-31T08:30:00Z", "comments": comments}
    forge = ScriptedForge()
    forge.troubles.append(Trouble(200, issue))
    async with opened(forge) as ours:
        with pytest.raises(ForgeTrouble, match="comments"):
            await ours.thread(1)


async def test_the_token_goes_in_the_header_alone(forge: ScriptedForge) -> None:
    async with opened(forge) as ours:
        assert await ours.login() == BOT
        assert await ours.default_branch() == "main"
    for asked in forge.asked:
        assert TOKEN in asked.headers["authorization"]
        assert TOKEN not in json.dumps([asked.path, asked.query, asked.given])
    async with opened(forge, "another") as ours:
        with pytest.raises(ForgeTrouble, match="refuses the token"):
            await ours.login()


@pytest.mark.parametrize(
    ("status", "code", "why"),
    [
        (401, "refused", "refuses the token"),
        (403, "refused", "may not do that"),
        (404, "not_found", "no such thing"),
        (409, "conflict", "there already"),
        (422, "refused", "does not take"),
        (423, "refused", "locked"),
        (500, "unavailable", "it answers 500"),
        (503, "unavailable", "it answers 503"),
    ],
)
async def test_an_error_is_told_in_one_sentence_with_the_forges_words_quoted(status: int, code: str, why: str) -> None:
    said = {"message": 'no\n"way"', "url": "https://forge.example/api/swagger"}
    trouble = await trouble_of(ScriptedForge(), Trouble(status, said))
    assert (trouble.status, trouble.code) == (status, code)
    assert why in trouble.message
    assert r'(it says "no\n\"way\"")' in trouble.message
    assert "\n" not in trouble.message


async def test_a_forge_that_repeats_the_token_is_not_quoted() -> None:
    trouble = await trouble_of(ScriptedForge(), Trouble(400, {"message": f"bad header: token {TOKEN}"}))
    assert "it does not take the request" in trouble.message
    assert TOKEN not in trouble.message
    trouble = await trouble_of(ScriptedForge(), Trouble(302, b"", {"location": f"https://forge.example/?t={TOKEN}"}))
    assert "it sends elsewhere, where its token does not follow" in trouble.message
    assert TOKEN not in trouble.message


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_no_redirect_is_followed(status: int) -> None:
    forge = ScriptedForge()
    trouble = await trouble_of(forge, Trouble(status, b"", {"location": "https://evil.example/api/v1/user"}))
    assert '"https://evil.example/api/v1/user"' in trouble.message
    assert len(forge.asked) == 1


async def test_a_forge_that_wants_to_be_left_alone_says_until_when() -> None:
    for status, headers in (
        (429, {"retry-after": "120"}),
        (403, {"retry-after": "120"}),
        (429, {"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"}),
        (429, {}),
        (503, {"retry-after": "120"}),
    ):
        trouble = await trouble_of(ScriptedForge(), Trouble(status, None, headers))
        assert trouble.code == "unavailable"
        assert (trouble.until_ms is not None) == (headers.get("retry-after") == "120")


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[" * 100_000, b'{"login": 7}', b"[]", b"null", b"{", b'"\\ud800"', b" " * (ANSWER_LIMIT_BYTES + 1)],
    ids=lambda body: repr(body[:12]),
)
async def test_an_answer_that_is_none_of_a_forges_is_refused(body: bytes) -> None:
    trouble = await trouble_of(ScriptedForge(), Trouble(200, body))
    assert trouble.code == "unavailable"
    assert "its answer" in trouble.message


async def test_a_forge_that_is_not_there_is_told_without_the_request() -> None:
    def fails(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadError(f"{request.headers}")

    async with httpx2.AsyncClient(transport=httpx2.MockTransport(fails)) as client:
        ours = open_forge(client, parse_place("forgejo", URL, "ada/site"), TOKEN)
        with pytest.raises(ForgeTrouble, match="ReadError") as refused:
            await ours.login()
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "url", "api"),
    [
        ("forgejo", "https://Forge.example/", "https://forge.example/api/v1"),
        ("forgejo", "http://git.lan:3000/git", "http://git.lan:3000/git/api/v1"),
        ("forgejo", "http://[fd00::1]:3000", "http://[fd00::1]:3000/api/v1"),
        ("github", "https://github.com", "https://api.github.com"),
        ("github", "https://ghe.example", "https://ghe.example/api/v3"),
    ],
)
def test_the_address_of_the_api_follows_from_the_forges(kind: str, url: str, api: str) -> None:
    assert parse_place(kind, url, "ada/site").api == api


@pytest.mark.parametrize(
    ("kind", "url", "repository"),
    [
        ("gitlab", URL, "ada/site"),
        ("forgejo", "ftp://x", "ada/site"),
        ("forgejo", "https://you:secret@forge.example", "ada/site"),
        ("forgejo", "https://forge.example/?x", "ada/site"),
        ("forgejo", "https://forge.example/#x", "ada/site"),
        ("forgejo", "https://forge.example/../x", "ada/site"),
        ("forgejo", "https://forge.example:0", "ada/site"),
        ("forgejo", "https://forge.example:99999", "ada/site"),
        ("forgejo", "https://forge.example:١", "ada/site"),
        ("forgejo", "https://", "ada/site"),
        ("forgejo", "https://a b", "ada/site"),
        ("forgejo", "https://a\n", "ada/site"),
        ("forgejo", URL, "site"),
        ("forgejo", URL, "ada/.."),
        ("forgejo", URL, "../site"),
        ("forgejo", URL, "ada/site/x"),
        ("forgejo", URL, "ada/site\n"),
        ("forgejo", URL, "ada/s?te"),
        ("forgejo", URL, 7),
    ],
)
def test_a_place_that_is_none_is_refused(kind: Any, url: Any, repository: Any) -> None:
    with pytest.raises(Refusal) as refused:
        parse_place(kind, url, repository)
    assert refused.value.code == "usage"


@given(st.text(max_size=40), st.text(max_size=40))
def test_whatever_is_taken_as_a_place_stays_below_the_forge_that_was_named(rest: str, repository: str) -> None:
    try:
        place = parse_place("forgejo", f"https://forge.example{rest}", repository)
    except Refusal:
        return
    url = httpx2.URL(f"{place.api}/repos/{place.repository}/issues")
    assert url.host.startswith("forge.example")
    assert not url.userinfo
    assert not url.query
    assert ".." not in url.path.split("/")


async def test_the_story_that_a_real_forge_is_held_to_is_true_of_the_scripted_one(forge: ScriptedForge) -> None:
    forge.tokens["another-token"] = "ada"
    forge.changes["iris/fix"] = ["mended.txt"]
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=forge.app)) as client:
        place = parse_place(forge.kind, URL, forge.repository)
        await play(client, place, TOKEN, "another-token", "iris/fix")
