"""Amounts of money: whole micro-USD, read and written without a float between."""

from __future__ import annotations

import re

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

MICRO = 1_000_000
MOST_USD = 10**9  # more than any account; sums of it stay within what sqlite counts


def parse_usd(raw: object, what: str) -> int:
    """An amount in micro-USD from decimals such as "5" or "0.25". Raises Refusal("usage")."""
    match = re.fullmatch(r"(\d{1,10})(?:\.(\d{1,6}))?", raw, re.ASCII) if isinstance(raw, str) else None
    micro = int(match[1]) * MICRO + int((match[2] or "").ljust(6, "0")) if match else 0
    if not 0 < micro <= MOST_USD * MICRO:
        form = f"give an amount of USD above 0 and up to {MOST_USD:,}, with at most 6 decimals, such as 2.50"
        raise Refusal("usage", f"cannot use {shown(raw)} as {what}: {form}")
    return micro


def usd(micro: int) -> str:
    """The amount as "1.25 USD": every decimal that it has, and two at least."""
    whole, rest = divmod(abs(micro), MICRO)
    decimals = f"{rest:06}".rstrip("0").ljust(2, "0")
    return f"{'-' if micro < 0 else ''}{whole:,}.{decimals} USD"


def about(micro: int) -> str:
    """The amount at a glance: to the cent from 1 USD on, below that to a hundredth of one."""
    step = MICRO // 100 if micro >= MICRO else MICRO // 10_000
    return usd((micro + step // 2) // step * step)
