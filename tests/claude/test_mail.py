"""A turn of the real Claude Code that works for long, takes more of its mail, and answers."""

from __future__ import annotations

from tests.claude.test_story import step
from tests.daemons import KEY, open_daemon
from tests.needs import find_claude
from tests.processes import look_until
from tests.scripted_model import Answer, Request, ScriptedModel, say, tool

WAITS = "touch begun; while [ ! -e go ]; do sleep 0.05; done; echo went on"


def answer(request: Request) -> Answer:
    if "take more" not in request.user_texts[0]:
        return "ok"
    match step(request):
        case 0:
            return say(tool("Bash", command=WAITS, description="wait"))
        case 1:
            return say(tool("mcp__hive__recv", max=10))
        case 2:
            return say(tool("mcp__hive__send", to="operator", body=f"I took {request.tool_results[-1].text}"))
        case _:
            return "Done."


def test_a_turn_takes_the_mail_that_came_during_a_long_call_of_a_tool_and_answers_it() -> None:
    with ScriptedModel(answer) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        with open_daemon(*flags, ANTHROPIC_API_KEY=KEY) as daemon:
            client = daemon.start()
            home = daemon.state / "agents" / "hm1nd" / "state"
            messages = [client.call("send", to="hm1nd", body="work, then take more")["message"]]
            look_until((home / "begun").exists)
            daemon.wait_live(lambda agent: (agent["state"], agent["detail"]) == ("tool", "Bash"))
            messages += [
                client.call("send", to="hm1nd", body=f"the {word} one")["message"] for word in ("second", "third")
            ]
            (home / "go").touch()
            said = daemon.wait_message(client, "I took")["body"]
            assert "the second one" in said
            assert "the third one" in said
            daemon.wait_live(lambda agent: agent["state"] == "idle" and agent["queued"] == 0)
            lives = [client.call("explain", message=message)["deliveries"][0] for message in messages]
    assert [life["state"] for life in lives] == ["acked"] * 3
    assert len({moment["turn"] for life in lives for moment in life["life"] if moment["what"] == "leased"}) == 1
