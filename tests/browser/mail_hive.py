"""A hive with held and dead mail, its page, and somebody who clicks: `python -m tests.browser.mail_hive FOLDER`."""

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


async def main(folder: Path) -> None:
    async with open_services(folder, limits=Limits(tries=1, pair_rate_per_hour=2)) as hive:
        await hive.add_agents("hm1nd", "iris", "damocles")
        for number in range(4):
            await hive.say("damocles", "hm1nd", f"message {number}")
        await hive.say("operator", "iris", "work")
        await hive.broker.ack(IRIS, (await hive.broker.lease(IRIS)).turn, "failed", "it broke")
        await hive.questions.ask(IRIS, Ask(OPERATOR, "which?", ("red", "green", "blue"), multi=True))
        ours = hive_of(hive)
        async with served(ours) as browser:
            ours.dashboard_port = browser.port
            command = [sys.executable, "-m", "tests.browser.mail_clicks", ours.sign_in_url()]
            with trio.fail_after(WITHIN_S):
                await trio.run_process(command, cwd=ROOT)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
