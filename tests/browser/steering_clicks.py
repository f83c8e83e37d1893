"""What an operator clicks and types in test_steering.py. A program of its own, as mail_clicks is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.patience import let_what_is_said_stay
from tests.needs import find_chromium

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


def steer(link: str) -> list[str]:
    """Steer iris by each button and by commands; what the browser complained of."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(find_chromium()), args=[*FLAGS, "--no-first-run"])
        page = chromium.new_context(viewport={"width": 360, "height": 800}).new_page()
        let_what_is_said_stay(page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(link)
        page.wait_for_url("**/")
        page.goto(page.url.rstrip("/") + "/agents/iris")
        page.evaluate("window.notReloaded = true")
        row, steering = page.locator("#agent-iris"), page.get_by_role("group", name="steer iris")
        expect(row).to_contain_text("context 75 %")
        for cell in ("th", "td.why"):  # words stand beside each other, and the table scrolls
            width = (page.locator(f"#reach-now tbody {cell}").bounding_box() or {})["width"]
            assert width > 100, f"{cell} of what was refused is {width} wide"

        steering.get_by_role("button", name="compact").click()
        told(page, "the next turn of iris compacts its session")
        expect(row).to_contain_text("compacts next")
        page.get_by_label("effort", exact=True).select_option("high")
        steering.locator("form").filter(has_text="effort").get_by_role("button").click()
        told(page, "the effort of iris is high")
        say(page, "/model opus")
        told(page, "the model of iris is opus")
        expect(row).to_contain_text("chosen by the operator")
        # What was chosen elsewhere is what the field shows, and what somebody picks there meanwhile stays.
        expect(page.get_by_label("model", exact=True)).to_have_value("opus")
        page.get_by_label("effort", exact=True).select_option("low")
        say(page, "/model haiku")
        expect(page.get_by_label("model", exact=True)).to_have_value("haiku")
        say(page, "/effort max")
        told(page, "the effort of iris is max")
        expect(row).to_contain_text("max")
        expect(page.get_by_label("effort", exact=True)).to_have_value("low")
        say(page, "/effort high")
        say(page, "/model opus")
        expect(page.get_by_label("model", exact=True)).to_have_value("opus")
        say(page, "/model")
        told(page, "it takes NAME")

        page.once("dialog", lambda dialog: dialog.dismiss())
        steering.get_by_role("button", name="new session").click()
        expect(row).to_contain_text("compacts next")
        page.once("dialog", lambda dialog: dialog.accept())
        steering.get_by_role("button", name="new session").click()
        told(page, "iris begins a new session with its next turn; turn 1 ends in the old one")
        expect(row).not_to_contain_text("compacts next")
        page.once("dialog", lambda dialog: dialog.accept())
        steering.get_by_role("button", name="cancel turn").click()
        told(page, "turn 1 of iris is cancelled")
        expect(page.locator("#turn-1-head")).to_contain_text("cancelled")
        steering.get_by_role("button", name="pause").click()
        told(page, "iris is paused")
        steering.get_by_role("button", name="resume").click()
        told(page, "iris goes on")

        page.evaluate("""() => {
            const body = document.getElementById("body");
            body.value = "//the first"; body.form.requestSubmit(); body.value = "written meanwhile";
        }""")
        told(page, "is on its way to iris")
        expect(page.locator("#send")).not_to_have_attribute("aria-busy", "true")
        expect(page.locator("#body")).to_have_value("written meanwhile")

        for answer, swarm in (("accept", "thaw"), ("dismiss", "thaw"), ("accept", "estop")):
            page.once("dialog", lambda dialog, answer=answer: getattr(dialog, answer)())  # both ask: keys repeat
            page.locator("#freeze button").press("Enter")
            expect(page.locator(f"#{swarm}")).to_be_visible()

        assert page.evaluate("window.notReloaded") is True
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if folder := os.environ.get("HIVE_TEST_SCREENSHOTS"):
            page.screenshot(path=str(Path(folder) / "steering.png"))
        chromium.close()
    return troubles


def say(page: Page, text: str) -> None:
    expect(page.locator("#send")).not_to_have_attribute("aria-busy", "true")  # while it sends it takes no other
    page.locator("#body").fill(text)
    page.locator("#body").press("Enter")


def told(page: Page, text: str) -> None:
    expect(page.locator("#toasts")).to_contain_text(text)
    page.evaluate("document.getElementById('toasts').replaceChildren()")  # which would be in the way of clicks


if __name__ == "__main__":
    # A command that is refused answers with an error, which the browser writes down as well.
    if found := [text for text in steer(sys.argv[1]) if "400" not in text]:
        sys.exit(f"the browser complained: {found}")
