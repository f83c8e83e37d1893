"""Clicks on one card at once, on the page and on the command line of a real hive."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlencode, urlsplit

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.daemons import WITHIN_S, Daemon
from tests.swarm.test_changes import SAYS, SAYS_MORE, ask, started_iris
from tests.swarm.test_outlive import WELCOME, open_swarm, persona
from tests.swarm.test_tombstones import hive

DOORS = ("the dashboard, 127.0.0.1", "host.sock, uid ")


class Page:
    """The front page of a daemon, in a browser that signed in."""

    def __init__(self, client: Client) -> None:
        link = urlsplit(client.call("dashboard")["url"])
        self._host, self._cookie = link.netloc, ""
        _, cookie = self._ask("GET", f"{link.path}?{link.query}")
        self._cookie = cookie.partition(";")[0]

    def click(self, path: str, **fields: str) -> str:
        """What the script of the page is told."""
        told: dict[str, Any] = json.loads(self._ask("POST", path, urlencode(fields))[0])
        return str(told.get("said") or told["error"]["message"])

    def _ask(self, method: str, path: str, body: str = "") -> tuple[str, str]:
        with closing(HTTPConnection("127.0.0.1", int(self._host.partition(":")[2]), timeout=WITHIN_S)) as connection:
            kind = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
            ours = {"Host": self._host, "Origin": f"http://{self._host}", "Cookie": self._cookie}
            connection.request(method, path, body, {**ours, **kind})
            answer = connection.getresponse()
            return answer.read().decode(), answer.getheader("Set-Cookie") or ""


def at_once(*calls: Callable[[], str]) -> list[str]:
    """What each says, of calls that begin together; a refusal says its sentence."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], str]) -> str:
        barrier.wait(WITHIN_S)
        try:
            return call()
        except Refusal as refusal:
            return refusal.message

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


def by_socket(daemon: Daemon, verb: str, **told: object) -> str:
    """How an approval is after a word of the operator's on the command line's socket."""
    return str(daemon.client().call(verb, **told)["state"])


def kinds_of(client: Client, number: int) -> list[str]:
    """What was told of an approval, but for its steps."""
    events = client.stream("events")
    return [e["kind"] for e in events if e["data"].get("approval") == number and e["kind"] != "approval_step"]


def test_of_clicks_on_the_page_and_on_the_command_line_one_decides_and_all_get_its_end() -> None:
    with open_swarm() as daemon:
        client = started_iris(daemon, SAYS)
        page, card = Page(client), ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE]))
        clicks: list[Callable[[], str]] = [
            partial(page.click, "/approvals/2/approve", digest=card["digest"]),
            partial(by_socket, daemon, "approve", approval=2, digest=card["digest"]),
            lambda: hive(daemon, "approve", "2", "--digest", card["digest"]).stdout.splitlines()[-1],
        ]
        said = at_once(*clicks, *clicks, *clicks)
        assert {one.partition(":")[0] for one in said[::3]} <= {"approved", "approved, and under way"}
        assert set(said[1::3]) == {"done"}
        assert {one.removesuffix(" (healthy)") for one in said[2::3]} == {"approval 2 of iris: done"}
        assert kinds_of(client, 2) == ["approval_requested", "approval_approved", "approval_done"]
        assert client.call("show", approval=2)["resolved_from"].startswith(DOORS)
        started = [e for e in client.stream("events") if e["kind"] == "agent_started"]
        assert [e["agent"] for e in started].count("iris") == 2, "it was carried out once"
        history = hive(daemon, "history", "iris").stdout
        assert [history.count(f"deployed/{number}") for number in (2, 3)] == [1, 0]


def test_of_a_yes_and_a_no_at_once_one_counts_and_the_other_is_told_so() -> None:
    with open_swarm() as daemon:
        client = started_iris(daemon, SAYS)
        page, card = Page(client), ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE]))
        said = at_once(
            partial(page.click, "/approvals/2/deny", digest=card["digest"], reason="not now"),
            partial(by_socket, daemon, "approve", approval=2, digest=card["digest"]),
            partial(page.click, "/approvals/2/approve", digest=card["digest"]),
            partial(by_socket, daemon, "deny", approval=2, reason="not now"),
        )
        no_by_page, yes, yes_by_page, no = said
        if yes == "done":
            assert kinds_of(client, 2) == ["approval_requested", "approval_approved", "approval_done"]
            assert yes_by_page.startswith("approved")
            assert all(
                one.startswith("cannot move approval 2 on (set it to denied): it is") for one in (no_by_page, no)
            )
        else:
            assert kinds_of(client, 2) == ["approval_requested", "approval_denied"]
            assert {yes, yes_by_page} == {"cannot approve 2: it was denied"}
            assert (no_by_page, no) == ("denied: change iris", "denied")
