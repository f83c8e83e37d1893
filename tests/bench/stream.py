"""A turn whose program prints ten thousand lines: what it costs to keep and show them all, beside the program alone."""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.bench.bare import bare_seat, open_bare
from tests.bench.figures import figure, say
from tests.bench.group_start import cpu_s
from tests.needs import find_chromium, find_claude
from tests.scripted_model import Reply
from tests.scripted_model import say as answer_with

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from tests.bench.group_turn import Stage

LINES = 10_000
ROUNDS = 3
ASKED = "ten thousand lines, please"
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
BROWSER_S = 30.0


def many_lines() -> Reply:
    """An answer of so many blocks, each of which the program prints as a line of its own."""
    return answer_with(*(f"line {number} of what it says" for number in range(LINES)))


def stream_10k(stage: Stage) -> Iterator[dict[str, Any]]:
    say(f"stream_10k: {ROUNDS} turns of {LINES} lines through the hive and bare, each in a session of its own")
    claude = find_claude()
    assert claude is not None
    ours, theirs, busy, shown = [], [], [], []
    for number in range(ROUNDS):
        name = f"talker{number}"
        stage.welcome(name, turns="cold")
        seat = bare_seat(name, claude, stage.port)
        with open_bare(stage.daemon, f"bare-{name}", seat, stage.flags(name)) as bare:
            bare.cold_turn(stage.asked_by(name)[-1].last_user_text)
            used = cpu_s(stage.daemon.process.pid)
            begun, ended = stage.turn(name, ASKED)
            ours.append(ended - begun)
            busy.append(cpu_s(stage.daemon.process.pid) - used)
            kept = _kept_lines(stage, name)
            assert kept >= LINES, f"{kept} lines are kept"
            alone = bare.cold_turn(stage.asked_by(name)[-1].last_user_text)
            theirs.append(alone["ended_at"] - alone["begun_at"])
    with _watched(stage, name) as page:
        if page is not None:
            stage.turn(name, "a word")
            _, ended = stage.turn(name, ASKED)
            shown.append(_last_line_s(page, ended))
    yield figure("stream_10k", statistics.median(ours), "s", "bare", statistics.median(theirs), digits=2)
    yield figure("stream_10k_cpu", statistics.median(busy), "s of the daemon", digits=2)
    if shown:
        yield figure("stream_10k_shown", max(shown), "s behind the ack, in a browser", digits=2)


def _kept_lines(stage: Stage, name: str) -> int:
    """The rows of its last turn."""
    with contextlib.closing(sqlite3.connect(stage.daemon.state / "hive.sqlite")) as db:
        sql = "SELECT count(*) FROM turn_lines WHERE turn_id = (SELECT max(id) FROM turns WHERE agent = ?)"
        (count,) = db.execute(sql, (name,)).fetchone()
    return int(count)


def _last_line_s(page: Page, ended: float) -> float:
    """How long after `ended` the last line stood on the page."""
    page.get_by_text(f"line {LINES - 1} of what it says").first.wait_for(timeout=BROWSER_S * 1e3)
    return time.monotonic() - ended


@contextmanager
def _watched(stage: Stage, name: str) -> Iterator[Page | None]:
    """A browser on the agent's page, where there is one."""
    chromium = find_chromium()
    if chromium is None:
        say("chromium is not installed: when the last line is shown is not measured")
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(chromium), args=[*QUIET, "--no-first-run"])
        page = browser.new_page()
        page.goto(stage.client.call("dashboard")["url"])
        page.wait_for_url("**/")
        page.goto(f"{stage.client.call('status')['dashboard']}/agents/{name}")
        page.locator('#link[data-link="on"]').wait_for(timeout=BROWSER_S * 1e3)
        yield page
        browser.close()
