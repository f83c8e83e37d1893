"""Errands: turns without a message, in which an agent's session is looked after. What they do with any program.

Standard library alone.
"""

from __future__ import annotations

from hive_agent.runner import Ending

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    from hive_core.protocol.harness import Lease

    Attempt = Callable[[str | None, str], Awaitable[tuple[Any, Ending]]]  # one prompt in a session

COMPACT = "/compact"
SHOW_COST = "/cost"  # the program answers it by itself: it says all of itself, and calls no model
SAVE_NOTES = (
    "Your context is nearly full and will be compacted after this turn: most of what was said will be gone. Write what "
    "you must not lose to a file in your working directory, the one you know best or NOTES.md: what you were asked to "
    "do and by whom, what is done, what comes next, what you learned. Keep it short, and send no message.\n"
)
GO_ON = (
    "\nYou had begun with this when your context was full, and it has been compacted: go on where you were, and do "
    "nothing twice that is done already.\n"
)


async def run_errand(lease: Lease, attempt: Attempt) -> Ending:
    """Do the errand of a lease. What cannot be done fails this turn, and nothing else."""
    session = lease["session"]
    if session is None:
        return Ending("done", None)  # a session that has not begun is as small as can be
    if lease.get("errand") != "save_and_compact":
        return await compact(session, attempt)
    _, saved = await attempt(session, SAVE_NOTES)
    if saved.outcome in ("waiting", "cancelled"):
        return saved
    ending = await compact(saved.session or session, attempt)
    # Without its notes the session is too full all the same; that they are not there is said.
    return saved if (saved.outcome, ending.outcome) == ("failed", "done") else ending


async def compact(session: str, attempt: Attempt) -> Ending:
    """Let the program compact its session."""
    report, ending = await attempt(session, COMPACT)
    if ending.outcome != "done" or report.compacted == "success":
        return ending
    error = f"the session was not compacted: {report.compacted or 'the program said nothing of it'}"
    return Ending("failed", ending.session, error, reason="error", context=ending.context)
