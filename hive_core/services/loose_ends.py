"""Loose ends: what waits for somebody's word, and whose word somebody waits for."""

from __future__ import annotations

from typing import Any

from hive_core.protocol.words import OPERATOR
from hive_core.services.background import Background
from hive_core.services.questions import Questions, open_questions
from hive_core.services.reminders import Reminders
from hive_core.services.schedules import Schedules
from hive_core.store.door import Store

SHOWN = 50  # of each kind


class LooseEnds:
    def __init__(
        self,
        store: Store,
        questions: Questions,
        reminders: Reminders,
        schedules: Schedules,
        background: Background,
    ) -> None:
        self.store = store
        self.questions = questions
        self.reminders = reminders
        self.schedules = schedules
        self.background = background

    async def of(self, who: str) -> dict[str, Any]:
        """What waits on `who`, an agent or the operator, and what `who` waits for."""
        waits_on = {
            "questions": open_questions(await self.questions.open_to(who, SHOWN)),
            "unread": await self._count(_UNREAD, who),
            "dead": await self._messages("dead", who),
        }
        waits_for: dict[str, Any] = {
            "questions": open_questions(await self.questions.open_from(who, SHOWN)),
            "approvals": await self._approvals(who),
            "reminders": await self.reminders.open_of(who),
            "background": await self.background.running_of(who),
            "held": await self._messages("held", who),  # whoever sent it waits for the operator's release
        }
        if who == OPERATOR:
            waits_on["approvals"] = waits_for.pop("approvals")
            waits_on["held"] = waits_for.pop("held")
            del waits_for["background"]
            waits_for["schedules"] = [row for row in await self.schedules.all() if row["state"] == "on"]
        return {"waits_on_you": waits_on, "you_wait_for": waits_for}

    async def of_all(self) -> dict[str, Any]:
        """What waits in the whole hive, whoever it is for."""
        return {
            "questions": open_questions(await self.questions.open_of_all(SHOWN)),
            "approvals": (await self._approvals(None))[:SHOWN],
            "held": await self._messages("held", OPERATOR),
            "dead": await self._messages("dead", OPERATOR),
        }

    async def _count(self, sql: str, who: str) -> int:
        row = await self.store.row(sql, (who,))
        return int(row[0]) if row else 0

    async def _messages(self, state: str, who: str) -> list[dict[str, Any]]:
        """The oldest deliveries that are held or dead: those that an agent sent, all for the operator."""
        # The state stands in the text: sqlite takes an index of held or dead ones alone for no other query.
        sql = f"""
            SELECT message_id AS message, sender, recipient, coalesce(held, note) AS why
            FROM deliveries INDEXED BY deliveries_{state}
            WHERE state = '{state}' AND (sender = :who OR :who = 'operator')
            ORDER BY message_id LIMIT :limit
        """
        return [dict(row) for row in await self.store.rows(sql, {"who": who, "limit": SHOWN})]

    async def _approvals(self, who: str | None) -> list[dict[str, Any]]:
        """What an agent, or anybody, asked for and is not done; for the operator, what waits for a click."""
        sql = """
            SELECT id AS approval, kind, agent, requested_by, state FROM approvals
            WHERE state = 'pending' OR (state = 'approved' AND :who IS NOT 'operator')
            ORDER BY id
        """
        rows = [dict(row) for row in await self.store.rows(sql, {"who": who})]
        return [row for row in rows if who in (None, OPERATOR, row["requested_by"])][:SHOWN]


_UNREAD = """
    SELECT count(*) FROM deliveries INDEXED BY deliveries_queued WHERE recipient = ? AND state = 'queued'
"""
