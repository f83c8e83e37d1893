"""The real Claude Code as a harness runs it, with a scripted model and scripted tools of the hive."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import trio

from hive_agent.claude import Claude
from hive_agent.runner import Ending, Seat
from tests.harness_host import a_lease
from tests.needs import find_claude
from tests.processes import PATIENCE_S
from tests.scripted_model import Answer, AnswerFunction, ScriptedModel
from tests.scripted_tools import ScriptedTools


class Desk:
    """One agent's program, and what it printed."""

    def __init__(self, runner: Claude, model: ScriptedModel) -> None:
        self.runner = runner
        self.model = model
        self.lines: list[dict[str, Any]] = []
        self.states: list[str] = []  # what it did, as its lines came
        self.on_line: Callable[[dict[str, Any]], object] = lambda line: None
        self._session: str | None = None
        self._turns = 0

    @property
    def pid(self) -> int | None:
        program = self.runner._program
        return program._process.pid if program is not None else None

    async def turn(self, body: str, **settings: Any) -> Ending:
        return await self._take(self._lease(body, **settings))

    async def errand(self, errand: str) -> Ending:
        return await self._take({**self._lease(""), "message": None, "errand": errand})

    def begin_new_session(self) -> None:
        self._session = None

    def of_hive(self) -> list[dict[str, Any]]:
        """The harness's own lines."""
        return [line for line in self.lines if line["type"] == "hive"]

    def _lease(self, body: str, **settings: Any) -> dict[str, Any]:
        self._turns += 1
        settings = {"prompt": "You are iris.", "session": self._session, **settings}
        return a_lease(self._turns, body, program="claude", **settings)

    async def _take(self, lease: dict[str, Any]) -> Ending:
        def take_line(line: str) -> None:
            self.lines.append(json.loads(line))
            if not self.states or self.states[-1] != self.runner.activity.state:
                self.states.append(self.runner.activity.state)
            self.on_line(self.lines[-1])

        with trio.fail_after(PATIENCE_S):
            ending = await self.runner.take_turn(cast("Any", lease), take_line)
        self._session = ending.session
        return ending

    def prompts(self) -> list[str]:
        return [request.last_user_text for request in self.model.turns]


@asynccontextmanager
async def a_desk(
    folder: Path, answers: list[Answer] | AnswerFunction, harness: str = "", config: str = ".claude"
) -> AsyncIterator[Desk]:
    """config: its program's own directory in the folder, which is its working directory and its home."""
    with ScriptedTools(folder / "mcp.sock"), ScriptedModel(answers) as model:
        port = int(model.base_url.rpartition(":")[2])
        where = str(folder)
        seat = Seat("iris", where, where, where, f"{where}/{config}", "/usr/bin:/bin", str(find_claude()), True, port)
        runner = Claude(replace(seat, harness=harness, extras_dir=f"{where}/extras"))
        try:
            yield Desk(runner, model)
        finally:
            with trio.CancelScope(shield=True):
                await runner.close()
