"""The one-time link and the cookie it gives."""

from __future__ import annotations

from tests.dashboards import OURS, browse, hive_of
from tests.hives import Services


async def test_a_link_signs_in_once(hive: Services) -> None:
    ours = hive_of(hive)
    code = ours.sign_ins.new_code()
    async with browse(ours, headers={}) as client:
        first = await client.get(f"/sign-in?code={code}")
        cookie = first.headers["set-cookie"]
        assert first.status_code == 200
        assert 'http-equiv="refresh" content="0;url=/"' in first.text
        assert {"HttpOnly", "SameSite=strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
        client.cookies.clear()
        second = await client.get(f"/sign-in?code={code}")
        assert second.status_code == 403
        assert "set-cookie" not in second.headers
        assert "hive dashboard" in second.text
        assert (await client.get("/", headers={"Cookie": cookie.partition(";")[0]})).status_code == 200


async def test_a_link_is_not_used_up_by_a_head_or_a_prefetch(hive: Services) -> None:
    ours = hive_of(hive)
    code = ours.sign_ins.new_code()
    async with browse(ours, headers={}) as client:
        assert "set-cookie" not in (await client.head(f"/sign-in?code={code}")).headers
        ahead = await client.get(f"/sign-in?code={code}", headers={"Sec-Purpose": "prefetch;prerender"})
        assert "set-cookie" not in ahead.headers
        assert "set-cookie" in (await client.get(f"/sign-in?code={code}")).headers


async def test_a_wrong_code_or_none_signs_nobody_in(hive: Services) -> None:
    async with browse(hive_of(hive), headers={}) as client:
        for path in ("/sign-in", "/sign-in?code=", "/sign-in?code=guess", "/sign-in?code=%00%ff"):
            answer = await client.get(path)
            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


async def test_signing_out_ends_the_cookie_on_the_host_too(hive: Services) -> None:
    async with browse(hive_of(hive)) as client:
        answer = await client.post("/sign-out", headers=OURS)
        assert answer.status_code == 303
        assert 'hive_operator=""' in answer.headers["set-cookie"]
        assert (await client.get("/")).status_code == 401
