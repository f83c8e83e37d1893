"""The story in a real browser: sign in, see the agents live, approve by clicks, see what comes without a reload."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

import tests.browser.patience  # noqa: F401 - as it is imported, it sets how long is waited for
from tests.needs import find_chromium

QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
APPROVE = re.compile("APPR0VE")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(find_chromium()), args=["--no-sandbox", *QUIET])
        yield opened
        opened.close()


@pytest.fixture
def demo_link() -> Iterator[str]:
    """The sign-in link of a demo that waits for its first click."""
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:
        demo = subprocess.Popen(
            [sys.executable, "-m", "hive_core.cli", "demo"],
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert demo.stdout is not None
            link = ""
            for line in demo.stdout:
                if found := re.search(r"http://\S+/sign-in\S+", line):
                    link = found[0]
                if "waiting for your click" in line:
                    break
            yield link
        finally:
            demo.terminate()
            demo.communicate(timeout=60)


def sign_in(browser: Browser, link: str, width: int, height: int) -> Page:
    page = browser.new_context(viewport={"width": width, "height": height}).new_page()
    page.goto(link)
    page.wait_for_url("**/")
    return page


def keep_screenshot(page: Page, name: str) -> None:
    """For the README, when asked for: make test would otherwise change the tree it tests."""
    if folder := os.environ.get("HIVE_TEST_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / name))


def approve(page: Page, shown: str) -> None:
    """Click on the card that shows this, once it is there and could be read."""
    button = page.locator("[id^=approval-]", has_text=shown).get_by_role("button", name=APPROVE)
    expect(button).to_be_visible(timeout=30_000)
    button.click(trial=True)
    # In one go: a card that comes or goes between the two would have to be read first.
    button.evaluate("(button) => { placed = null; movedAt.clear(); button.click(); }")


def test_a_click_brings_argus_without_a_reload(browser: Browser, demo_link: str) -> None:
    page = sign_in(browser, demo_link, 1280, 900)
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.evaluate("window.notReloaded = true")
    for name in ("hm1nd", "iris", "damocles"):
        expect(page.locator(f"#agent-{name}")).to_contain_text("idle")
    expect(page.locator("#agent-argus")).to_have_count(0)
    keep_screenshot(page, "dashboard.png")

    approve(page, "argus")
    expect(page.locator("#agent-argus")).to_contain_text("idle", timeout=30_000)
    expect(page.get_by_text("argus here: a hundred eyes")).to_be_visible()

    expect(page.locator("#heard")).to_have_text("your call: change iris", timeout=30_000)
    approve(page, "haiku")
    expect(page.locator("#agent-iris")).to_contain_text("haiku", timeout=30_000)
    expect(page.get_by_text("iris runs on haiku now")).to_be_visible(timeout=30_000)

    approve(page, "findings|bugs")
    expect(page.locator("#decision-5")).to_contain_text("its program does not come up", timeout=30_000)
    expect(page.get_by_text("iris here, on haiku as before")).to_be_visible(timeout=30_000)
    expect(page.locator("#agent-iris")).to_contain_text("haiku")
    assert page.evaluate("window.notReloaded") is True
    # The click on a change that soon comes to nothing is answered by 409, of which the browser keeps a note.
    assert [text for text in troubles if "status of 409" not in text] == []


def test_denying_with_a_reason_tells_the_manager_and_the_card_goes(browser: Browser, demo_link: str) -> None:
    page = sign_in(browser, demo_link, 1280, 900)
    card = page.locator("[id^=approval-]", has_text="argus")
    card.get_by_text("deny").first.click()
    card.locator("[name=reason]").fill("Not tonight.")
    card.get_by_role("button", name="D3NY").click()
    expect(page.get_by_text('reason: "Not tonight."')).to_be_visible(timeout=30_000)
    expect(page.get_by_text("Understood, no argus.")).to_be_visible(timeout=30_000)
    expect(page.locator("#agent-argus")).to_have_count(0)


def test_the_agents_own_page_streams_its_turns_and_takes_a_message(browser: Browser, demo_link: str) -> None:
    page = sign_in(browser, demo_link, 1280, 900)
    page.locator("#agent-iris a").first.click()
    page.wait_for_url(lambda url: "agents" in url or not url.endswith(":7000/"))
    expect(page.get_by_text("turn").first).to_be_visible()
    page.locator("textarea").fill("who are you?")
    page.locator("textarea").press("Enter")
    expect(page.get_by_text("who are you?").first).to_be_visible(timeout=30_000)
    expect(page.get_by_text(re.compile("rehearsal", re.IGNORECASE)).last).to_be_visible(timeout=30_000)
    keep_screenshot(page, "agent.png")


def test_a_change_that_went_back_is_told_on_the_agents_page(browser: Browser, demo_link: str) -> None:
    page = sign_in(browser, demo_link, 1280, 900)
    for shown in ("argus", "haiku", "findings|bugs"):
        approve(page, shown)
    expect(page.get_by_text("iris here, on haiku as before")).to_be_visible(timeout=60_000)
    page.locator("#agent-iris a").first.click()
    log = page.locator("#deploys-now li")
    expect(log.nth(0)).to_contain_text("failed: cannot keep the change of iris: its program does not come up")
    expect(log.nth(1)).to_contain_text("deployed/4 ← runs")
    expect(log.nth(1)).to_contain_text(re.compile(r"\d\d:\d\d:\d\d · [0-9a-f]{12} · healthy · by operator"))
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_is_cut_off_on_a_phone(browser: Browser, demo_link: str) -> None:
    page = sign_in(browser, demo_link, 390, 844)
    expect(page.locator("#agent-hm1nd")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    keep_screenshot(page, "phone.png")


def test_a_stranger_without_the_link_sees_nothing(browser: Browser, demo_link: str) -> None:
    page = browser.new_context().new_page()
    origin = demo_link.partition("/sign-in")[0]
    answer = page.goto(origin + "/")
    assert answer is not None
    assert answer.status == 401
    expect(page.get_by_text("hive dashboard")).to_be_visible()
    assert "damocles" not in page.content()
