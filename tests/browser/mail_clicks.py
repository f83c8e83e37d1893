"""What an operator clicks in test_mail.py. A program of its own: trio-asyncio, which the hive needs, is in the way of
playwright's loop in one process.
"""

from __future__ import annotations

import sys

from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.browser.patience import let_what_is_said_stay
from tests.needs import find_chromium

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def click_through(link: str) -> list[str]:
    """Release one card, requeue the other, drop the third, answer a question, and stop the swarm without the script;
    what the browser complained of.
    """
    troubles: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(find_chromium()), args=[*FLAGS, "--no-first-run"])
        context = chromium.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        let_what_is_said_stay(page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(link)
        page.wait_for_url("**/")
        page.evaluate("window.notReloaded = true")
        expect(page).to_have_title("(4) hyperhive")
        for card, button, state in (("3", "R3L34S3", "queued"), ("5", "R3QU3U3", "queued"), ("4", "DR0P", "dropped")):
            page.locator(f"#aside-{card}").get_by_role("button", name=button).click()
            expect(page.locator(f"#aside-{card}")).to_have_count(0)
            expect(page.locator(f"#message-{card}")).to_have_attribute("data-delivery", state)
        answer_after_a_swap(page)
        expect(page).to_have_title("hyperhive")
        expect(page.locator("#y3r-c4ll").get_by_text("nothing waits for you")).to_be_visible()
        assert page.evaluate("window.notReloaded") is True
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        stop_and_thaw(chromium.new_context(java_script_enabled=False, storage_state=context.storage_state()), page.url)
        chromium.close()
    return troubles


def answer_after_a_swap(page: Page) -> None:
    """What is ticked stays so when the card is rendered anew, which knows of no tick."""
    card = page.locator("#question-1")
    for colour in ("red", "blue"):
        card.get_by_label(colour).check()
    page.evaluate("swap({target: 'question-1', html: document.getElementById('question-1').outerHTML})")
    for colour, ticked in (("red", True), ("green", False), ("blue", True)):
        expect(card.get_by_label(colour)).to_be_checked(checked=ticked)
    card.get_by_role("button", name="◆ ANSW3R").click()
    expect(card).to_have_count(0)
    expect(page.locator("#flow")).to_contain_text("red")


def stop_and_thaw(context: BrowserContext, address: str) -> None:
    """Without the script a page asks."""
    page = context.new_page()
    page.goto(address)
    page.locator("#estop").click()
    expect(page.get_by_role("heading")).to_contain_text("sure?")
    page.get_by_role("link", name="no, go back").click()
    page.locator("#estop").click()
    page.get_by_role("button").click()
    page.locator("#thaw").click()
    page.get_by_role("button").click()
    expect(page.locator("#estop")).to_be_visible()


if __name__ == "__main__":
    if found := click_through(sys.argv[1]):
        sys.exit(f"the browser complained: {found}")
