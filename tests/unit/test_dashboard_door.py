"""Who gets in: every route, by every way a request can lie about where it comes from."""

from __future__ import annotations

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from dashboard.door import Address, check_source
from hive_core.protocol.refusal import Refusal
from tests.dashboards import HOST, ORIGIN, OURS, browse, hive_of, signed_in
from tests.hives import Services

READS = ["/", "/agents/iris", "/live", "/agents/iris/live", "/agents/nobody", "/nowhere"]
WRITES = ["/messages", "/approvals/1/approve", "/approvals/1/deny", "/sign-out"]
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GOOD_FORM = b"to=iris&body=hello"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7000",
        "hive.localhost",
        "hive.localhost:7001",
        "hive.localhost:7000.evil.example",
        "evil.hive.localhost:7000",
        "0.0.0.0:7000",
        "localhost:7001",
        "127.0.0.1",
        "",
    ],
)
@pytest.mark.parametrize("path", [*READS, *WRITES, "/sign-in?code=x", "/static/style.css"])
async def test_another_host_name_is_refused_on_every_route(hive: Services, host: str, path: str) -> None:
    async with browse(hive_of(hive)) as client:
        for method in ("GET", "POST"):
            answer = await client.request(method, path, headers={"Host": host, **OURS})
            assert answer.status_code == 421
            assert ORIGIN in answer.text
            assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("host", ["127.0.0.1:7000", "localhost:7000", "[::1]:7000"])
async def test_the_machines_own_names_lead_to_the_hives_name_with_port_path_and_query(
    hive: Services, host: str
) -> None:
    async with browse(hive_of(hive), headers={}) as client:
        for path in ("/", "/agents/iris", "/sign-in?code=a%2Fb&x=1", "//evil.example/x"):
            answer = await client.get(httpx2.URL(ORIGIN).copy_with(raw_path=path.encode()), headers={"Host": host})
            assert (answer.status_code, answer.headers["location"]) == (307, f"{ORIGIN}{path}")
        assert (await client.post("/messages", headers={"Host": host, **OURS})).status_code == 421


async def test_the_port_that_counts_is_the_one_that_was_connected_to(hive: Services) -> None:
    app = hive_of(hive)
    async with browse(app, base="http://hive.localhost:8123") as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/", headers={"Host": HOST})).status_code == 421
        wrong = await client.post("/messages", headers={**FORM, "Origin": ORIGIN}, content=GOOD_FORM)
        right = await client.post(
            "/messages", headers={**FORM, "Origin": "http://hive.localhost:8123"}, content=GOOD_FORM
        )
        assert (wrong.status_code, right.status_code) == (403, 303)


@pytest.mark.parametrize("cookie", [None, "", "x", "hive_operator=", "hive_operator=guess", "other=1"])
async def test_without_a_valid_cookie_nothing_is_shown_or_done(hive: Services, cookie: str | None) -> None:
    async with browse(hive_of(hive), headers={"Cookie": cookie} if cookie is not None else {}) as client:
        for path in READS:
            answer = await client.get(path)
            assert answer.status_code == 401
            assert "iris" not in answer.text
        for path in WRITES:
            answer = await client.post(path, headers={**OURS, **FORM}, content=GOOD_FORM)
            assert answer.status_code == 401
    assert await hive.value("SELECT count(*) FROM messages") == 0


async def test_a_page_without_a_cookie_says_how_to_get_one(hive: Services) -> None:
    async with browse(hive_of(hive), headers={}) as client:
        answer = await client.get("/")
        assert "hive dashboard" in answer.text
        said = await client.get("/", headers={"Accept": "application/json"})
        assert said.json()["error"]["message"] == "this browser is not signed in"


async def test_a_cookie_planted_beside_ours_does_not_sign_the_operator_out(hive: Services) -> None:
    ours = hive_of(hive)
    cookie = (await signed_in(ours))["Cookie"]
    async with browse(ours, headers={"Cookie": f"hive_operator=planted; {cookie}"}) as client:
        assert (await client.get("/")).status_code == 200


SOURCES: list[tuple[dict[str, str], bool]] = [
    ({"Origin": ORIGIN}, True),
    ({"Sec-Fetch-Site": "same-origin"}, True),
    (OURS, True),
    ({}, False),
    ({"Origin": "null"}, False),
    ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, False),
    ({"Origin": "http://hive.localhost"}, False),
    ({"Origin": "http://hive.localhost:7001", "Sec-Fetch-Site": "same-site"}, False),
    ({"Origin": "https://hive.localhost:7000"}, False),
    ({"Origin": f"{ORIGIN}.evil.example"}, False),
    ({"Origin": "http://127.0.0.1:7000"}, False),
    ({"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}, False),
    ({"Origin": ORIGIN, "Sec-Fetch-Site": "same-site"}, False),
    ({"Origin": ORIGIN, "Sec-Fetch-Site": "none"}, False),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, False),
]


@pytest.mark.parametrize(("source", "accepted"), SOURCES)
async def test_a_write_must_come_from_our_own_pages(hive: Services, source: dict[str, str], accepted: bool) -> None:
    async with browse(hive_of(hive)) as client:
        for path in WRITES[:3]:
            answer = await client.post(path, headers={**FORM, **source}, content=GOOD_FORM)
            assert (answer.status_code == 403) is not accepted, (path, answer.text)
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            answer = await client.request(method, "/messages", headers=source)
            assert answer.status_code == (405 if accepted else 403)
    assert await hive.value("SELECT count(*) FROM messages") == (1 if accepted else 0)


@pytest.mark.parametrize("path", [*READS, "/static/live.js", "/sign-in?code=x"])
async def test_another_site_can_link_here_and_nothing_else(hive: Services, path: str) -> None:
    async with browse(hive_of(hive)) as client:
        for site in ("cross-site", "same-site"):
            for mode, dest in (("no-cors", "script"), ("cors", "empty"), ("navigate", "iframe"), ("no-cors", "image")):
                headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
                assert (await client.get(path, headers=headers)).status_code == 403
    if not path.endswith("live"):
        async with browse(hive_of(hive)) as client:
            linked = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
            assert (await client.get(path, headers=linked)).status_code != 421


values = st.sampled_from(
    ["", "null", ORIGIN, ORIGIN.upper(), f"{ORIGIN}/", "http://hive.localhost:7001", "http://evil.example", "*"]
)
sites = st.sampled_from(["", "same-origin", "same-site", "cross-site", "none", "SAME-ORIGIN", "same-origin, none"])


@given(st.one_of(st.none(), values), st.one_of(st.none(), sites), st.sampled_from(["POST", "PUT", "DELETE", "get"]))
def test_no_other_mixture_of_headers_gets_a_write_through(origin: str | None, site: str | None, method: str) -> None:
    given_headers = {name: value for name, value in (("origin", origin), ("sec-fetch-site", site)) if value is not None}
    may = origin in (None, ORIGIN) and site in (None, "same-origin") and bool(given_headers)
    if may:
        check_source(Headers(given_headers), method, Address(7000))
    else:
        with pytest.raises(Refusal):
            check_source(Headers(given_headers), method, Address(7000))


async def test_every_answer_carries_the_security_headers(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        answers = [await client.get(path) for path in ("/", "/nowhere", "/static/style.css", "/sign-in?code=no")]
        answers.append(await client.get("/", headers={"Host": "evil.example"}))
        answers.append(await client.post("/messages"))
        for answer in answers:
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cross-origin-opener-policy"] == "same-origin"
            assert answer.headers["cross-origin-resource-policy"] == "same-origin"
            assert answer.headers["referrer-policy"] == "same-origin"
            assert "access-control-allow-origin" not in answer.headers
        assert answers[0].headers["cache-control"] == "no-store"


def test_on_port_80_the_names_carry_no_port() -> None:
    assert Address(80).origin == "http://hive.localhost"
    assert Address(80).is_local_name("127.0.0.1")
    assert not Address(7000).is_local_name("127.0.0.1")
