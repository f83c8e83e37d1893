"""The effect of a change as a card, a terminal and a test tell it: one wording for all."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

WIDE = "wide"  # the weight of a line that widens what somebody may do
PLAIN = "plain"


def effect_line(line: Mapping[str, Any]) -> str:
    """One line of a stored effect: "model: sonnet → opus", "tools: + WebFetch", "recipients: − iris"."""
    what, before, after = line["what"], line["before"], line["after"]
    if before is None:
        return f"{what}: + {after}"
    return f"{what}: − {before}" if after is None else f"{what}: {before} → {after}"


def is_for_itself(effect: Mapping[str, Any] | None) -> bool:
    """Whether a stored effect is of a change that is approved by itself: it gives an agent the host's network."""
    lines = effect["lines"] if effect else ()
    return any(line["what"] == "network" and line["weight"] == WIDE for line in lines)


def builds_line(effect: Mapping[str, Any]) -> str | None:
    """What is built of a stored effect, by the hash and name of its derivation: "builds: 0c1…-nixos-system-iris".
    None where nothing is built, and of an effect from before that was kept."""
    if not (derivation := effect.get("derivation")):
        return None
    digest, _, name = derivation.rpartition("/")[2].partition("-")
    short = f"{digest[:12]}…-{name.removesuffix('.drv')}"
    return f"builds: {short}, the same as now" if effect.get("former") == derivation else f"builds: {short}"
