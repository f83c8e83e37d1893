"""Search and threads as pages."""

from __future__ import annotations

import pytest

from tests.dashboards import browse, hive_of
from tests.hives import Services


async def test_the_search_page_finds_and_links_the_thread(hive: Services) -> None:
    await hive.say("operator", "iris", "the login <b>leaks</b>")
    await hive.say("iris", "operator", "which login?", in_reply_to=1)
    await hive.say("operator", "damocles", "something else")
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/search", params={"text": "login"})).text
        narrowed = (await client.get("/search", params={"text": "login", "sender": "iris"})).text
        empty = (await client.get("/search")).text
    assert page.index('id="found-2"') < page.index('id="found-1"')
    assert 'id="found-3"' not in page
    assert 'href="/threads/1#message-2"' in page
    assert "&lt;b&gt;leaks&lt;/b&gt;" in page
    assert 'value="login"' in page
    assert 'id="found-1"' not in narrowed
    assert "found-" not in empty


async def test_the_front_page_has_a_box_to_search_from(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        assert 'action="/search"' in (await client.get("/")).text


@pytest.mark.parametrize(
    "query", [{"sender": "No One"}, {"after": "soon"}, {"thread": "x"}, {"cursor": "-1"}, {"text": "x" * 2000}]
)
async def test_a_search_that_makes_no_sense_says_why_on_its_page(hive: Services, query: dict[str, str]) -> None:
    async with browse(hive_of(hive)) as client:
        answer = await client.get("/search", params=query)
    assert answer.status_code == 200
    assert 'id="trouble"' in answer.text
    assert "cannot" in answer.text


async def test_more_than_a_page_goes_on(hive: Services) -> None:
    for _ in range(25):
        await hive.say("operator", "iris", "word")
    async with browse(hive_of(hive)) as client:
        first = (await client.get("/search", params={"text": "word"})).text
        assert 'href="/search?text=word&amp;cursor=6"' in first
        second = (await client.get("/search?text=word&cursor=6")).text
    assert 'id="found-5"' in second
    assert 'id="found-6"' not in second
    assert 'id="more"' not in second


async def test_a_thread_is_a_page_with_the_state_of_each_delivery(hive: Services) -> None:
    await hive.say("operator", "iris", "question")
    await hive.say("iris", "operator", "answer <script>", in_reply_to=1)
    async with browse(hive_of(hive)) as client:
        page = (await client.get("/threads/2")).text
        missing = await client.get("/threads/9")
        nonsense = [(await client.get(f"/threads/{text}")).status_code for text in ("x", "-1", "9" * 30, "%00", "²")]
    assert page.index('id="message-1"') < page.index('id="message-2"')
    assert "for you" in page
    assert "answer &lt;script&gt;" in page
    assert missing.status_code == 404
    assert "kept_s" in missing.text
    assert nonsense == [404] * 5


async def test_what_was_found_is_for_the_operator_alone(hive: Services) -> None:
    await hive.say("operator", "iris", "word")
    async with browse(hive_of(hive), headers={}) as stranger:
        for path in ("/search?text=word", "/threads/1"):
            answer = await stranger.get(path)
            assert answer.status_code == 401
            assert "found-" not in answer.text
