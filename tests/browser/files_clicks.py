"""What an operator does in test_files.py. A program of its own: trio-asyncio, which the hive needs, is in the way of
playwright's loop in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.browser.patience import let_what_is_said_stay
from tests.needs import find_chromium

FLAGS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
FIRST = 5  # message of the composer: a question, its answer, and that hm1nd is told of both come before
# What a browser would hand over: a file that was dragged here, an image that was copied elsewhere.
DROP = """
(name) => {
  const data = new DataTransfer();
  data.items.add(new File(["dropped"], name));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}
"""
PASTE = """
(text) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array([137, 80, 78, 71])], "image.png", { type: "image/png" }));
  if (text) data.setData("text/plain", text);
  const paste = new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
  return document.getElementById("body").dispatchEvent(paste);
}
"""


def click_through(link: str, folder: Path) -> list[str]:
    """Send files from the dashboard, from an agent's page on a phone, and without the script; what the browser
    complained of.
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
        answer(page, folder)
        page.locator("#recipients").select_option("iris")
        pick_and_paste(page, folder)
        take_back(page, folder)
        assert page.evaluate("window.notReloaded") is True
        page.set_viewport_size({"width": 390, "height": 844})
        page.goto(f"{page.url}agents/iris")
        drop_on_a_phone(page)
        storage = context.storage_state()
        send_without_the_script(
            chromium.new_context(java_script_enabled=False, storage_state=storage), page.url, folder
        )
        chromium.close()
    return troubles


def answer(page: Page, folder: Path) -> None:
    """An answer takes files too."""
    form = page.locator("#question-1 form")
    form.get_by_label("your answer").fill("this one")
    form.get_by_label("files").set_input_files([folder / "notes.txt", folder / "other.txt"])
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    form.get_by_role("button", name="◆ ANSW3R").click()
    expect(page.locator(".toast.good")).to_have_text("question 1 of iris is answered")
    expect(page.locator("#question-1")).to_have_count(0)


def pick_and_paste(page: Page, folder: Path) -> None:
    """What was picked twice adds up, what is over a limit stays out, and one can be left out again."""
    files, picker = page.locator("#chosen-files li"), page.get_by_label("+ files")
    picker.set_input_files(folder / "other.txt")
    picker.set_input_files(folder / "notes.txt")
    expect(files).to_have_text(["other.txt · 5 bytes ✕", "notes.txt · 5 bytes ✕"])
    picker.set_input_files(folder / "large.bin")
    expect(page.locator(".toast.bad")).to_have_text(
        "cannot attach large.bin: it has 1,000,001 bytes and the limit is 1,000,000 bytes"
    )
    picker.set_input_files([folder / "notes.txt", folder / "other.txt"])
    expect(page.locator(".toast.bad").last).to_have_text("cannot attach 4 files: the limit is 3 a message")
    page.get_by_role("button", name="do not send other.txt").click()
    assert page.evaluate(PASTE, "words") is True, "text is pasted as text"
    assert page.evaluate(PASTE, "") is False
    expect(files).to_have_text(["notes.txt · 5 bytes ✕", "image.png · 4 bytes ✕"])
    page.locator("#body").fill("look")
    page.locator("#body").press("Enter")
    expect(page.locator(".toast.good").last).to_have_text(f"message {FIRST} is on its way to iris with 2 files")
    expect(files).to_have_count(0)
    expect(page.locator("#body")).to_have_value("")


def take_back(page: Page, folder: Path) -> None:
    """The row that came live has the files; a click saves one, and shows nothing."""
    row = page.locator(f"#message-{FIRST} .files")
    expect(row).to_contain_text("image.png image/png · 4 bytes")
    with page.expect_download() as download:
        row.get_by_role("link", name="notes.txt").click()
    download.value.save_as(folder / "back.txt")
    assert download.value.suggested_filename == "notes.txt"
    assert (folder / "back.txt").read_text() == "notes"


def drop_on_a_phone(page: Page) -> None:
    """Files alone are a message, and a long name breaks nothing."""
    page.evaluate(DROP, "a-name-without-any-room-to-break-it-in-" * 3)
    expect(page.locator("#chosen-files li")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="do not send").click()
    expect(page.locator("#chosen-files")).to_be_hidden()
    page.evaluate(DROP, "dropped.txt")
    page.locator("#body").press("Enter")
    expect(page.locator(f"#message-{FIRST + 1} .files")).to_contain_text("dropped.txt text/plain · 7 bytes")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def send_without_the_script(context: BrowserContext, address: str, folder: Path) -> None:
    page = context.new_page()
    page.goto(address)
    page.get_by_label("+ files").set_input_files(folder / "notes.txt")
    page.locator("#body").fill("without the script")
    page.get_by_role("button", name="◆ S3ND").click()
    expect(page.locator(f"#message-{FIRST + 2} .files")).to_contain_text("notes.txt")


if __name__ == "__main__":
    if found := click_through(sys.argv[1], Path(sys.argv[2])):
        sys.exit(f"the browser complained: {found}")
