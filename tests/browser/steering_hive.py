"""A hive whose iris has a session, her page, and who clicks: `python -m tests.browser.steering_hive FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from hive_core.protocol.words import AgentName
from tests.dashboards import hive_of, served
from tests.hives import open_services
from tests.needs import ROOT

IRIS = AgentName("iris")
REFUSED = """
    INSERT INTO connections (agent, host, port, how, sent, received, count, began_at_ms, ended_at_ms, verdict, reason)
    SELECT name, 'registry.example', 443, 'tunnel', 0, 0, 1, created_at_ms, created_at_ms, 'refused',
        'cannot connect: registry.example:443 is not in egress of agent.toml; asked the operator (approval 12)'
    FROM agents WHERE name = 'iris'
"""
WITHIN_S = 240.0  # on a machine with other things to do


async def main(folder: Path) -> None:
    async with open_services(folder) as hive:
        await hive.add_agents("hm1nd", "iris")
        await hive.sql("UPDATE agents SET session = 'old', context_tokens = 150, context_window = 200")
        await hive.sql(REFUSED)
        await hive.say("operator", "iris", "work")
        await hive.broker.lease(IRIS)
        ours = hive_of(hive)
        async with served(ours) as browser:
            ours.dashboard_port = browser.port
            command = [sys.executable, "-m", "tests.browser.steering_clicks", ours.sign_in_url()]
            with trio.fail_after(WITHIN_S):
                await trio.run_process(command, cwd=ROOT)
        agent = await hive.agents.get("iris")
        assert (agent.chosen_model, agent.chosen_effort, agent.session, agent.wanted) == ("opus", "high", None, "up")


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
