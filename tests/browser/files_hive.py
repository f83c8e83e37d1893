"""A hive, its pages, and somebody who sends files there: `python -m tests.browser.files_hive FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from hive_core.limits import Limits
from hive_core.protocol.words import OPERATOR, AgentName
from hive_core.services.question_words import Ask
from tests.dashboards import hive_of, served
from tests.hives import open_services
from tests.needs import ROOT

IRIS = AgentName("iris")
WITHIN_S = 240.0  # on a machine with other things to do
SENT = [  # by files_clicks, in this order: the body, and what the agent finds
    ('answer to your question 1, "Which plan?":\n| this one', {"notes.txt": 5, "other.txt": 5}),
    ("look", {"notes.txt": 5, "image.png": 4}),
    ("1 file attached", {"dropped.txt": 7}),
    ("without the script", {"notes.txt": 5}),
]


async def main(folder: Path) -> None:
    (folder / "state").mkdir()
    async with open_services(folder / "state", limits=Limits(files_per_message=3, file_bytes=1_000_000)) as hive:
        await hive.add_agents("hm1nd", "iris")
        (folder / "state/agents/iris/state").mkdir(parents=True)
        (folder / "notes.txt").write_text("notes")
        (folder / "other.txt").write_text("other")
        (folder / "large.bin").write_bytes(bytes(1_000_001))
        await hive.questions.ask(IRIS, Ask(OPERATOR, "Which plan?"))
        ours = hive_of(hive)
        async with served(ours) as browser:
            ours.dashboard_port = browser.port
            command = [sys.executable, "-m", "tests.browser.files_clicks", ours.sign_in_url(), str(folder)]
            with trio.fail_after(WITHIN_S):
                await trio.run_process(command, cwd=ROOT)
        leased = await hive.broker.lease(IRIS)
        more = (await hive.broker.recv(IRIS, 9, 0))["messages"]
        found = [
            (one["body"], {file["name"]: file["bytes"] for file in one["files"]}) for one in (leased.message, *more)
        ]
        assert found == SENT, found


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
