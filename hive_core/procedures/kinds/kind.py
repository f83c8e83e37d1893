"""What one kind of approval is to the gate."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

from hive_core.limits import Limits
from hive_core.protocol.words import AgentName, MessageBody
from hive_core.services.approvals import Approval, Request, RuleFor, Shown, put_request
from hive_core.services.post import no_room
from hive_core.services.request_room import check_request_room
from hive_core.services.tool_calls import once
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

Step = Callable[[str], Awaitable[None]]


class Done(NamedTuple):
    """write: the rows that belong to the end, in the transaction that tells of it. proof: see Approval.

    held: what keeps others from what was done until those are written. told: what whoever asked is told, in the place
    of that it was approved.
    """

    write: Callable[[Transaction], None]
    proof: str | None = None
    held: AbstractAsyncContextManager[object] = nullcontext()
    told: MessageBody | None = None


class Kind(Protocol):
    """A change that the operator approves. What it keeps in an approval's payload is its own."""

    kind: str

    def title(self, approval: Approval) -> str:
        """What it changes, in a few words: "the new agent iris"."""

    async def show_now(self, approval: Approval) -> Shown:
        """What the card of a pending approval would show if it was made now.

        Raises Refusal when it cannot be carried out any more, with the reason that whoever asked reads.
        """

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        """Do it, telling each step. Raises when that is impossible; then all is as it was.

        It can be done again from the beginning: a daemon that dies in it is followed by one that does so.
        """

    async def closed(self, approval: Approval) -> None:
        """It was decided and nothing is to be done any more. It can be called again; what it does is lost when the
        daemon dies before, and the rows never depend on it."""


class Asking:
    """How a kind puts a card before the operator, or does not.

    rule_for: see put_request.
    """

    def __init__(self, store: Store, limits: Limits, rule_for: RuleFor) -> None:
        self.store = store
        self._limits = limits
        self._rule_for = rule_for

    async def put(
        self, requested_by: AgentName, key: str | None, tool: str, what: str, make: Callable[[Transaction], Request]
    ) -> dict[str, Any]:
        """`{"approval": id}`, and the `rule` of the policy by which it passed without a click, where one let it.

        make: what is asked for; it raises Refusal when that cannot be.

        what: what is asked for, in the sentence that says that the disk is full: "a commit of iris".
        """

        def ask(tx: Transaction) -> dict[str, Any]:
            request = make(tx)
            if tx.short:
                raise no_room(f"ask for {what}")
            number = put_request(tx, request, self._limits.approval_ttl_s, self._rule_for, self._check_room)
            (rule,) = tx.execute("SELECT rule FROM approvals WHERE id = ?", (number,)).fetchone()
            return {"approval": number} if rule is None else {"approval": number, "rule": rule}

        return await self.store.write(lambda tx: once(tx, requested_by, key, tool, lambda: ask(tx)))

    def _check_room(self, tx: Transaction, request: Request) -> None:
        check_request_room(tx, request, self._limits)
