"""What tests do for a browser on a machine with other things to do."""

from __future__ import annotations

from playwright.sync_api import Page, expect

expect.set_options(timeout=30_000)  # of each expectation that names no other

# What is said for seconds would go before it is looked at.
_SAID_STAYS = """
const later = window.setTimeout;
window.setTimeout = (what, wait) => later(what, wait >= 5000 ? 1e9 : wait);
"""


def let_what_is_said_stay(page: Page) -> None:
    """On every page that is opened from now on."""
    page.add_init_script(_SAID_STAYS)
