"""Requests to the operator that were refused: each leaves one event, with who asked, for what, and why not.

Of one asker who goes on the first within an hour are told one by one, of each kind and code of refusal, and behind
them the hundredth, the thousandth and so on: asking for ever must not fill the event log.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, parse_agent_name, parse_commit_sha
from hive_core.services.approvals import TOPIC
from hive_core.services.rates import count_sent, sent_lately
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

TOLD_PER_HOUR = 20


@asynccontextmanager
async def noting_a_refusal(
    store: Store, asker: AgentName, kind: str, given: Mapping[str, object]
) -> AsyncIterator[None]:
    """A request that is refused in here leaves one event, and no approval.

    kind: of the approval that was asked for. given: its arguments as they came, which may be anything.
    """
    try:
        yield
    except Refusal as refusal:
        code, reason = refusal.code, refusal.message
        agent = _parsed(parse_agent_name, given.get("agent", given.get("name")))
        sha = _parsed(parse_commit_sha, given.get("sha"))

        def note(tx: Transaction) -> None:
            times = sent_lately(tx, asker, place := f"{kind} {code}") + 1  # no name has a space
            count_sent(tx, asker, place)
            if tx.short or (times > TOLD_PER_HOUR and str(times).strip("0") != "1"):
                return
            more: dict[str, str | int] = {"sha": sha} if sha else {}
            if times > TOLD_PER_HOUR:
                more["times"] = times  # within the hour
            tx.emit("approval_refused", asker, agent, None, what=kind, reason=reason, **more)
            tx.wake(TOPIC)

        with contextlib.suppress(Refusal):  # of a store that can take nothing now: the first is the one to tell
            await store.write(note)
        raise


def _parsed(parse: Callable[[object], str], raw: object) -> str | None:
    with contextlib.suppress(Refusal):
        return parse(raw)
    return None
