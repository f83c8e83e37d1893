"""One turn with the real Claude Code and a real account: the only test that spends money, a few cents."""

from __future__ import annotations

import os

from tests.daemons import open_daemon
from tests.needs import find_claude


def test_hm1nd_answers_the_operator() -> None:
    names = ("ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN")
    credential = {name: os.environ[name] for name in names if name in os.environ}
    with open_daemon(f"--claude={find_claude()}", "--end-agents-with-daemon", **credential) as daemon:
        client = daemon.start()
        client.call("send", to="hm1nd", body="Use your tool `send` to answer me with the one word: pong")
        answer = daemon.wait_message(client, "pong")
        assert answer["sender"] == "hm1nd"
