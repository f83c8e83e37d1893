"""What an operator clicks and types in test_approvals.py. A program of its own, as mail_clicks is."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.patience import let_what_is_said_stay
from tests.needs import find_chromium

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FREEZES_AFTER_MS = 6_000  # on a machine with other things to do
READ = "placed = null; movedAt.clear()"  # as if the time to read what has changed was over
MOVED = "what you clicked on has just moved or changed: look again, then click"
WATCH = """
window.longest = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration);
}).observe({ type: "longtask", buffered: true });
"""


def decide(link: str, pipe: Path) -> list[str]:
    """Decide each card as an operator does; what the browser complained of."""
    troubles: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(find_chromium()), args=FLAGS)
        page = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.add_init_script(WATCH)
        let_what_is_said_stay(page)
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto(link)
        page.wait_for_url("**/")
        page.evaluate("window.notReloaded = true")
        read_the_large_card(page)
        look(page, "cards")
        page.set_viewport_size({"width": 360, "height": 800})
        fits(page)
        look(page, "cards-phone")
        approve_two_by_keyboard(page)
        choose_only_what_was_seen(page)
        approve_only_what_was_read(page)
        approve_what_takes_its_time(page, pipe)
        assert page.evaluate("window.notReloaded") is True
        see_its_page(page)
        chromium.close()
    return troubles


def read_the_large_card(page: Page) -> None:
    card = page.locator("#approval-4")
    expect(card).to_contain_text("500 files, folded")
    effect = card.locator(".effect li")
    expect(effect.first).to_have_text("▲ widens tools: + WebFetch")
    expect(effect.filter(has_text="model: sonnet → opus")).to_have_count(1)
    expect(effect.filter(has_text="files: + 498: skills/000.md")).to_have_count(1)
    last = card.locator("details.shown", has_text="skills/497.md")
    expect(last.locator("pre")).to_be_hidden()
    last.locator("summary").click()
    expect(last.locator("pre")).to_contain_text("line 39 of skill 497")
    prompt = card.locator("details.shown", has_text="CLAUDE.md")
    prompt.locator("summary").press("Enter")
    expect(prompt.locator(".mark")).to_have_text("⟨U+202E⟩")
    longest = page.evaluate("window.longest")
    print(f"the longest that a card of 500 files kept the page: {longest:.0f} ms", file=sys.stderr)
    assert longest < FREEZES_AFTER_MS


def approve_two_by_keyboard(page: Page) -> None:
    button = page.locator("#approve-chosen")
    expect(button).to_be_disabled()
    for number in (2, 3):
        page.locator(f"#approval-{number}").get_by_label("choose").press("Space")
    expect(button).to_have_text("◆ APPR0VE the chosen (2)")
    button.press("Enter")
    # On a machine with other things to do it is told while it is under way.
    said = re.compile("2: approved(, and under way)?: spawn argus.*3: approved(, and under way)?: spawn damocles")
    expect(page.locator("#toasts")).to_contain_text(said, timeout=30_000)
    for number in (2, 3):
        expect(page.locator(f"#decision-{number}")).to_contain_text("approved", timeout=30_000)
        expect(page.locator(f"#approval-{number}")).to_have_count(0)
    expect(page.locator("#agent-argus")).to_have_count(1)
    expect(button).to_be_disabled()


def choose_only_what_was_seen(page: Page) -> None:
    """A card that comes again stays chosen while it shows the same, and no longer."""
    box = page.locator("#approval-5").get_by_label("choose")
    digest = box.get_attribute("value")
    again = "swap({ target: 'approval-5', html: $('#approval-5').outerHTML.replaceAll('%s', '%s') }); count()"
    box.check()
    page.evaluate(again % ("because", "because"))
    expect(box).to_be_checked()
    page.evaluate(again % (digest, "0" * 64))
    expect(box).not_to_be_checked()
    heard = page.locator("#heard")
    expect(heard).to_have_text("shows something else now: slow iris")
    expect(page.locator(":is([aria-live], [role=log], [role=status]) #approval-5")).to_have_count(0)
    expect(page.locator("#approve-chosen")).to_be_disabled()
    page.evaluate(again % ("0" * 64, digest))
    expect(box).to_have_attribute("value", str(digest))


def approve_only_what_was_read(page: Page) -> None:
    """A click that meets a card which has just come there, or become another, approves nothing."""
    card = page.locator("#approval-5")
    digest = card.locator("input[name=digest]").first
    shown = str(digest.get_attribute("value"))
    other = "swap({ target: 'approval-5', html: $('#approval-5').outerHTML.replaceAll('%s', '%s') }); count()"
    came = (
        "swap({ target: 'approval-99', html: $('#approval-5').outerHTML.replaceAll('approval-5', 'approval-99'), "
        "list: 'pending', place: 'prepend' })"
    )
    # In one go: on a busy machine the time to read would be over before the click.
    click = "; $('#approval-5 .approve').click(); $('#toasts').lastElementChild?.textContent"
    anchor = "document.documentElement.style.overflowAnchor = '%s'"  # else the browser scrolls along, and nothing moved
    page.evaluate(anchor % "none")
    went = "swap({ target: 'approval-99' })"
    agent = (
        "swap({ target: 'agent-new', html: $('#agent-iris').outerHTML.replaceAll('agent-iris', 'agent-new'), "
        "list: 'agents', place: 'append' })"
    )
    line = "swap({ target: 'agent-new', html: '<li id=\"agent-new\">' + '<p>more<p>'.repeat(5) + '</li>' })"
    banner = "document.body.prepend(parse('<p id=banner></p>')); swap({ target: 'banner', html: '<p>stopped</p>' })"
    for change in (other % (shown, "0" * 64), other % ("0" * 64, shown), came, went, agent, line, banner):
        page.evaluate(READ)
        page.evaluate("$('#toasts').replaceChildren()")
        assert page.evaluate(change + click) == MOVED, change
    expect(card).to_have_count(1)
    expect(digest).to_have_value(shown)
    page.evaluate(READ)
    # What is below moves nothing of it, and neither does the reader who goes there.
    below = "swap({ target: 'm-0', html: '<li>hello</li>', list: 'flow', place: 'append' }); scrollBy(0, 40)"
    assert page.evaluate(below + "; isRead($('#approval-5 .approve'))")
    page.evaluate(anchor % "")
    page.evaluate(READ)


def approve_what_takes_its_time(page: Page, pipe: Path) -> None:
    page.evaluate(READ)
    page.locator("#approval-5").get_by_role("button", name="APPR0VE").click()
    expect(page.locator("#toasts")).to_contain_text("approved, and under way: slow iris")
    row = page.locator("#decision-5")
    expect(row).to_contain_text("under way")
    expect(row.get_by_role("status")).to_contain_text("building, since")
    row.scroll_into_view_if_needed()
    look(page, "under-way-phone")
    pipe.write_text("go on")
    expect(row).to_contain_text("proof: healthy")
    expect(row).to_contain_text("by operator, the dashboard, 127.0.0.1")
    fits(page)


def see_its_page(page: Page) -> None:
    page.locator("#approval-4").get_by_role("link", name="against another base").click()
    expect(page.locator("#c0mp4r3d")).to_contain_text("no commit was approved for iris before it")
    page.get_by_role("link", name="what runs now").click()
    expect(page.locator("#c0mp4r3d")).to_contain_text("500 files, folded")
    fits(page)
    look(page, "approval-phone")
    page.locator("#approval-4").get_by_role("button", name="APPR0VE").click()
    # All 500 files are looked at once more before the click counts, which takes a busy machine its time.
    expect(page.locator("#decision-4")).to_contain_text(re.compile("approved|under way"), timeout=120_000)


def fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def look(page: Page, name: str) -> None:
    if folder := os.environ.get("HIVE_TEST_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


if __name__ == "__main__":
    if found := decide(sys.argv[1], Path(sys.argv[2])):
        sys.exit(f"the browser complained: {found}")
