"""What one call to the provider costs: its tokens by kind, its price, and an estimate where something is not known."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from hive_core.prices import KINDS, Prices
from hive_core.protocol.words import FORGE, OPERATOR, SYSTEM
from hive_core.store.writer import Transaction
from hive_core.usage import BYTES_PER_TOKEN, Call

DAY_MS = 24 * 3600 * 1000
ESTIMATED_OUTPUT = 1_000  # tokens, of a call that has not told any, or more by the size of its answer
ESTIMATED_INPUT_MOST = 1_000_000  # tokens: no model takes more
COST_MOST = 10**12  # micro-USD of one call, whatever it tells: sums of millions stay within what sqlite counts
FREE_PATHS = frozenset({"/v1/messages/count_tokens"})
_ERROR = 400  # from this status on the provider has done nothing that it charges

Tokens = dict[str, int | None]  # by KINDS; None: unknown


def read_tokens(usage: dict[str, int]) -> Tokens:
    """The provider's counts by KINDS. What it does not tell is unknown."""
    written = usage.get("cache_creation_input_tokens")
    brief, long = (usage.get(f"cache_creation.ephemeral_{span}_input_tokens") for span in ("5m", "1h"))
    if brief is None and long is None:
        brief, long = written, None if written is None else 0
    elif written is not None:
        long = max(long or 0, written - (brief or 0))  # what is written and not said for how long counts at the dearer
    return {
        "input": usage.get("input_tokens"),
        "output": usage.get("output_tokens"),
        "cache_write_5m": brief,
        "cache_write_1h": long,
        "cache_read": usage.get("cache_read_input_tokens"),
    }


@dataclass(frozen=True, slots=True)
class Bill:
    """What a call costs, as far as it has come."""

    tokens: Tokens
    micro_usd: int
    estimated: bool

    @property
    def unknown(self) -> bool:
        return self.tokens["input"] is None or self.tokens["output"] is None


def bill(call: Call, prices: Prices, likely_model: str | None = None) -> Bill:
    """likely_model: taken for the price while the call has not told its own; then the price is estimated."""
    if call.path in FREE_PATHS or call.status >= _ERROR:
        return Bill(dict.fromkeys(KINDS, 0), 0, False)
    usage = call.usage
    tokens = read_tokens(usage or {})
    counts = {kind: count for kind, count in tokens.items() if count is not None}
    if usage is None:
        counts["input"] = min(call.request_bytes // BYTES_PER_TOKEN, ESTIMATED_INPUT_MOST)
    if tokens["output"] is None:
        # An answer in one piece tells its counts at its end, which an agent need not wait for.
        by_size = max(ESTIMATED_OUTPUT, call.reader.size // BYTES_PER_TOKEN)
        counts["output"] = by_size if usage is None else usage.get("estimated_output_tokens", ESTIMATED_OUTPUT)
    cost = prices.cost(call.model or likely_model, counts, (usage or {}).get("server_tool_use.web_search_requests", 0))
    estimated = usage is None or tokens["output"] is None or call.model is None or not cost.of_known_model
    return Bill(tokens, min(cost.micro_usd, COST_MOST), estimated)


@dataclass(frozen=True, slots=True)
class Charge:
    """A call that was made and has ended."""

    at_ms: int
    agent: str
    turn: int | None
    call: Call
    bill: Bill

    @property
    def day(self) -> int:
        return self.at_ms // DAY_MS


def write_charges(tx: Transaction, charges: Sequence[Charge]) -> None:
    """The rows of some calls, their sums by day and by turn, in a few statements for all."""
    origins = {turn: _origin(tx, turn) for turn in {charge.turn for charge in charges}}
    tx.insert("charges", _CHARGE, [(*_row(charge), *origins[charge.turn]) for charge in charges])
    sums: dict[tuple[int, str, str, str], list[int]] = {}
    for charge in charges:
        key = (charge.day, charge.agent, charge.call.model or "", origins[charge.turn][-1])
        counts = [charge.bill.tokens[kind] or 0 for kind in KINDS]
        cost = charge.bill.micro_usd
        more = [1, int(charge.bill.unknown), *counts, cost, cost if charge.bill.estimated else 0]
        sums[key] = [one + other for one, other in zip(sums.get(key, [0] * len(more)), more, strict=True)]
    tx.executemany(_ADD_TO_DAY, [(*key, *more) for key, more in sums.items()])
    of_turns = sorted((charge.turn, charge.bill.micro_usd) for charge in charges if charge.turn is not None)
    by_turn = [(sum(cost for _, cost in some), turn) for turn, some in groupby(of_turns, key=lambda pair: pair[0])]
    tx.executemany("UPDATE turns SET cost_micro_usd = coalesce(cost_micro_usd, 0) + ? WHERE id = ?", by_turn)


def _row(charge: Charge) -> tuple[object, ...]:
    call = charge.call
    what = (charge.at_ms, charge.agent, charge.turn, call.credential, call.model, call.status)
    tokens = (charge.bill.tokens[kind] for kind in KINDS)
    return (*what, *tokens, charge.bill.micro_usd, int(charge.bill.estimated), int(call.complete))


def _origin(tx: Transaction, turn: int | None) -> tuple[str | None, int | None, int | None, str]:
    """What set a turn off: its message's cause, the first message of the chain, and who sent that one."""
    row = tx.execute(_ORIGIN, (turn,)).fetchone() if turn is not None else None
    if row is None:
        return None, None, None, "no turn"
    return row["cause"], row["cause_id"], row["chain_id"], _root(row)


def _root(row: sqlite3.Row) -> str:
    match row["root_cause"]:
        case None:
            return str(row["errand_by"] or "unknown")  # an errand has no message, and old messages are forgotten
        case "operator":
            return OPERATOR
        case "schedule":
            return f"schedule {row['root_cause_id']}"
        case "reminder":  # the agent's own, set long before
            return f"agent {row['agent']}"
        case "turn":
            return f"agent {row['sender']}"
        case _:
            return FORGE if row["sender"] == FORGE else SYSTEM


TOKEN_COLUMNS = tuple(f"{kind}_tokens" for kind in KINDS)
# fmt: off
_CHARGE = ("at_ms", "agent", "turn_id", "credential", "model", "status", *TOKEN_COLUMNS, "cost_micro_usd", "estimated",
           "complete", "cause", "cause_id", "chain_id", "root")
# fmt: on
# What is not known of the cost of a turn `t`, as columns of a query.
UNSURE_OF_TURN = """
    (SELECT count(*) FROM charges INDEXED BY charges_by_turn
     WHERE turn_id = t.id AND (input_tokens IS NULL OR output_tokens IS NULL)) AS unknown_calls,
    (SELECT coalesce(sum(cost_micro_usd), 0) FROM charges INDEXED BY charges_by_turn
     WHERE turn_id = t.id AND estimated) AS estimated_micro_usd
"""
SUMS = ("calls", "unknown_calls", *TOKEN_COLUMNS, "cost_micro_usd", "estimated_micro_usd")
_ADD_TO_DAY = f"""
    INSERT INTO spend_days (day, agent, model, root, {", ".join(SUMS)}) VALUES (?, ?, ?, ?{", ?" * len(SUMS)})
    ON CONFLICT DO UPDATE SET {", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)}
"""
_ORIGIN = """
    SELECT t.agent, t.errand_by, t.chain_id, coalesce(m.cause, t.errand_by) AS cause, m.cause_id,
           root.sender, root.cause AS root_cause, root.cause_id AS root_cause_id
    FROM turns t LEFT JOIN messages m ON m.id = t.message_id LEFT JOIN messages root ON root.id = t.chain_id
    WHERE t.id = ?
"""
