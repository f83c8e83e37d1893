"""Why a message waits for the operator, and what happens next: the same words in every tool, terminal and page."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

WHY_HELD = {
    "hops": "its chain of turns is longer than the limit (hops)",
    "rate": "more messages went there within an hour than the limit (pair_rate_per_hour)",
}
NEXT = "the operator releases or drops it, and until then it goes nowhere; do not send it again"


def say_held(message: int, held: Mapping[str, str]) -> str:
    """One sentence for whoever sent a message that is held: from whom, why, and what happens next."""
    names: dict[str, list[str]] = {}
    for name, why in sorted(held.items()):
        names.setdefault(why, []).append(name)
    parts = [f"{', '.join(those)}, because {WHY_HELD.get(why, why)}" for why, those in names.items()]
    return f"message {message} is held from {'; and from '.join(parts)}: {NEXT}"
