"""One call of a forge's API: bounded in time and size, never redirected, and its refusals in words."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx2
import trio

from hive_core.forge.words import Place
from hive_core.limits import REST_LIMIT_S
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted, quoted
from hive_core.provider_limits import instant_ms, retry_after_ms

ANSWER_LIMIT_BYTES = 4 * 1024 * 1024
CALL_WITHIN_S = 30.0
SAID_LIMIT = 300  # characters of a forge's own complaint that are passed on
# What a forge's answer means: the code of the refusal, and the sentence with the way out.
_STATUSES: dict[int, tuple[str, str]] = {
    400: ("refused", "it does not take the request"),
    401: ("refused", "it refuses the token; `hive forge add` gives it another"),
    403: ("refused", "its token may not do that"),
    404: ("not_found", "it has no such thing, or its token may not see it"),
    405: ("refused", "it does not do that there"),
    409: ("conflict", "that is there already"),
    410: ("refused", "that is switched off there"),
    413: ("refused", "that is too large for it"),
    422: ("refused", "it does not take the request"),
    423: ("refused", "that is locked there"),
}


class ForgeTrouble(Refusal):
    """A forge did not do what it was asked.

    status    of its answer; 0 when it gave none that could be read
    until_ms  before when it wants no other call, in ms since 1970; None when it does not say
    """

    def __init__(self, code: str, message: str, status: int = 0, until_ms: int | None = None) -> None:
        super().__init__(code, message)
        self.status = status
        self.until_ms = until_ms


@dataclass(frozen=True, slots=True)
class Answer:
    data: Any  # of its JSON; None where it had no body
    headers: Mapping[str, str]


class Quiet:
    """Until when each forge wants no call, in ms since 1970: whoever was told so, all keep to it."""

    def __init__(self) -> None:
        self._until_ms: dict[str, int] = {}

    def note(self, place: Place, until_ms: int) -> None:
        self._until_ms[place.url] = until_ms

    def check(self, place: Place) -> None:
        """Raises ForgeTrouble while it wants none."""
        until_ms, now_ms = self._until_ms.get(place.url, 0), int(time.time() * 1000)
        # No rest is longer: a clock was set back.
        if now_ms < until_ms <= now_ms + REST_LIMIT_S * 1000:
            raise _limited(place, "", until_ms, now_ms, 429)


class Api:
    """The API of one forge, called with one token, which no error repeats and no redirect carries elsewhere."""

    def __init__(self, client: httpx2.AsyncClient, place: Place, token: str, quiet: Quiet | None = None) -> None:
        self.place = place
        self._quiet = quiet or Quiet()
        self._client = client
        self._token = token
        scheme = "token" if place.kind == "forgejo" else "Bearer"
        accept = "application/json" if place.kind == "forgejo" else "application/vnd.github+json"
        self._headers = {
            "authorization": f"{scheme} {token}",
            "accept": accept,
            "accept-encoding": "identity",  # what is small packed and huge unpacked has no way in
            "user-agent": "hyperhive",
        }

    async def call(
        self, method: str, path: str, query: Mapping[str, str | int] | None = None, given: object = None
    ) -> Answer:
        """What the forge answers. Raises ForgeTrouble, in whose message its own words stand in quotation marks."""
        self._quiet.check(self.place)
        with trio.move_on_after(CALL_WITHIN_S):
            return await self._call(method, path, query or {}, given)
        why = f"it did not answer within {CALL_WITHIN_S:.0f} s"
        raise ForgeTrouble("unavailable", f"cannot reach the forge at {self.place.url}: {why}; try again later")

    async def _call(self, method: str, path: str, query: Mapping[str, str | int], given: object) -> Answer:
        # Not the client's build_request: that would add cookies which an earlier answer set.
        request = httpx2.Request(
            method,
            f"{self.place.api}{path}",
            params={name: str(value) for name, value in query.items()},
            headers=self._headers,
            json=given,
            extensions={"timeout": httpx2.Timeout(CALL_WITHIN_S).as_dict()},
        )
        try:
            response = await self._client.send(request, stream=True, follow_redirects=False)
            try:
                body = await self._body(response)
            finally:
                with trio.CancelScope(shield=True):
                    await response.aclose()
        except httpx2.HTTPError as exc:
            # Only what the network says: a complaint about the request would quote its headers, the token's too.
            reason = str(exc) if isinstance(exc, httpx2.ConnectError) else type(exc).__name__
            why = f"{reason[:200]}; see whether it runs, and try again later"
            raise ForgeTrouble("unavailable", f"cannot reach the forge at {self.place.url}: {why}") from None
        return self._read(response, body)

    async def _body(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        async with aclosing(response.aiter_raw()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > ANSWER_LIMIT_BYTES:
                    raise self._strange(f"its answer is larger than {ANSWER_LIMIT_BYTES:,} bytes, which is the limit")
        return bytes(body)

    def _read(self, response: httpx2.Response, body: bytes) -> Answer:
        status = response.status_code
        if 300 <= status < 400 and status != 304:
            to = self._quoted(response.headers.get("location", ""))
            why = f"it sends elsewhere{to and f', to {to}'}, where its token does not follow; has the repository moved?"
            raise ForgeTrouble("refused", f"cannot use the forge at {self.place.url}: {why}", status)
        try:
            data = json.loads(body) if body.strip() else None
        except (ValueError, RecursionError):
            if status < 400:
                raise self._strange("its answer is no JSON; is that the address of a forge?") from None
            data = None
        if status >= 400:
            raise self._refused(status, response.headers, data)
        return Answer(data, response.headers)

    def _refused(self, status: int, headers: Mapping[str, str], data: Any) -> ForgeTrouble:
        now_ms = int(time.time() * 1000)
        said = data.get("message") if isinstance(data, dict) else None
        told = f" (it says {words})" if isinstance(said, str) and (words := self._quoted(said)) else ""
        until_ms = retry_after_ms(headers.get("retry-after"), now_ms)
        if headers.get("x-ratelimit-remaining") == "0" and status in (403, 429):
            until_ms = until_ms or instant_ms(headers.get("x-ratelimit-reset"), now_ms)
        if until_ms is not None:
            until_ms = min(until_ms, now_ms + REST_LIMIT_S * 1000)
            self._quiet.note(self.place, until_ms)
        if status == 429 or (status == 403 and until_ms):
            return _limited(self.place, told, until_ms, now_ms, status)
        code, why = _STATUSES.get(status, ("unavailable", f"it answers {status}; try again later"))
        return ForgeTrouble(code, f"cannot use the forge at {self.place.url}: {why}{told}", status, until_ms)

    def _quoted(self, said: str) -> str:
        """The forge's own words; empty where there are none, or they repeat the token."""
        return quoted(said[:SAID_LIMIT]) if said and self._token not in said else ""

    def _strange(self, why: str) -> ForgeTrouble:
        return ForgeTrouble("unavailable", f"cannot use the forge at {self.place.url}: {why}")


def _limited(place: Place, told: str, until_ms: int | None, now_ms: int, status: int) -> ForgeTrouble:
    wait = (
        f"it takes more in {counted(max(1, (until_ms - now_ms) // 1000), 'second')}" if until_ms else "try again later"
    )
    why = f"it wants no more requests now{told}; {wait}"
    return ForgeTrouble("unavailable", f"cannot use the forge at {place.url}: {why}", status, until_ms)
