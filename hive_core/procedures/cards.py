"""What waits for the operator, as it would be now: a card never goes on showing what cannot be approved."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from hive_core.procedures.kinds.kind import Kind
from hive_core.protocol.refusal import Refusal
from hive_core.services.approvals import Approval, Approvals, digest_of, show_again
from hive_core.services.under_way import check_alone
from hive_core.store.bus import APPROVED
from hive_core.store.door import Store
from hive_core.store.errors import StoreError
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)


class Cards:
    def __init__(
        self,
        store: Store,
        approvals: Approvals,
        kind_of: Callable[[Approval], Kind],
        fail: Callable[[Transaction, Approval, str], None],
        close: Callable[[Approval], Awaitable[None]],
    ) -> None:
        """fail: ends one with that reason, and tells whoever asked. close: see Kind.closed."""
        self._store = store
        self._approvals = approvals
        self._kind_of = kind_of
        self._fail = fail
        self._close = close

    async def serve(self) -> None:
        """Look again at what was told against something that its agent does not run on any more, until cancelled."""
        with self._store.bus.listen(APPROVED) as listener:
            while True:
                for approval in await self._approvals.outdated():
                    await self._try(approval)
                await listener.wait()

    async def _try(self, approval: Approval) -> None:
        try:
            await self.look_again(approval)
        except StoreError:
            raise
        except Exception as exc:
            # Whatever its repository does ends no daemon; the click finds it too, and says so.
            log.info("approval %d of %s is not shown anew: %s", approval.id, approval.agent, exc)

    async def look_again(self, approval: Approval) -> bool:
        """Let a card that waits show what would be done now; whether a click on it before counts no more. One that
        cannot be carried out any more fails.

        Raises Refusal when that cannot be told now, or not before something else of its agent is over.
        """
        try:
            shown = await self._kind_of(approval).show_now(approval)
        except Refusal as refusal:
            await self._give_up(approval, refusal)
            return False
        if shown == (approval.payload, approval.effect):
            return False

        def show(tx: Transaction) -> None:
            check_alone(tx, approval)
            show_again(tx, approval, shown)

        await self._store.write(show)
        return digest_of(approval.kind, approval.agent, shown) != approval.digest

    async def _give_up(self, approval: Approval, refusal: Refusal) -> None:
        def write(tx: Transaction) -> bool:
            check_alone(tx, approval)  # it may have been in the midst of that
            if refusal.code == "unavailable":  # later it may be possible
                raise refusal
            is_ours = tx.execute("SELECT 1 FROM approvals WHERE id = ? AND state = 'pending'", (approval.id,))
            if is_ours.fetchone() is None:
                return False  # another look has found that out, or it was decided meanwhile
            self._fail(tx, approval, refusal.message)
            return True

        if await self._store.write(write):
            await self._close(approval)
