"""What an operator clicks in test_mail.py. A program of its own: trio-asyncio, which the hive needs, is in the way of
playwright's loop in one process.
"""

from __future__ import annotations

import sys

from playwright.sync_api import expect, sync_playwright

from tests.needs import find_chromium

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def click_through(link: str) -> list[str]:
    """Release one card, requeue the other, drop the third; what the browser complained of."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(find_chromium()), args=[*FLAGS, "--no-first-run"])
        page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(link)
        page.wait_for_url("**/")
        page.evaluate("window.notReloaded = true")
        expect(page).to_have_title("(3) hyperhive")
        for card, button, state in (("3", "R3L34S3", "queued"), ("5", "R3QU3U3", "queued"), ("4", "DR0P", "dropped")):
            page.locator(f"#aside-{card}").get_by_role("button", name=button).click()
            expect(page.locator(f"#aside-{card}")).to_have_count(0)
            expect(page.locator(f"#message-{card}")).to_have_attribute("data-delivery", state)
        expect(page).to_have_title("hyperhive")
        expect(page.locator("#y3r-c4ll").get_by_text("nothing waits for you")).to_be_visible()
        assert page.evaluate("window.notReloaded") is True
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        chromium.close()
    return troubles


if __name__ == "__main__":
    if found := click_through(sys.argv[1]):
        sys.exit(f"the browser complained: {found}")
