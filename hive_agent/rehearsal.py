"""The rehearsal as a runner: it takes claude's flags and speaks claude's stream, and only the executable is another."""

from __future__ import annotations

from hive_agent.claude import Claude
from hive_agent.own_command import own_command


class Rehearsal(Claude):
    name = "rehearsal"

    def executable(self) -> list[str]:
        return own_command("rehearse")
