from __future__ import annotations

from pathlib import Path

import pytest

from hive_agent.wake import wake_prompt
from hive_core.limits import Limits
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName
from hive_core.services.profiles import parse_icon, set_profile, set_status
from hive_core.toolkits import parse_toolkit, toolkits
from tests.dashboards import hive_of, served
from tests.hives import Services
from tests.tools import program_of

IRIS = AgentName("iris")


@pytest.mark.parametrize("icon", ["🦉", "i", "Ж", "★", "✈️", "👋🏽", "🇩🇪", "é", "e\u0301", "1️⃣"])
def test_one_sign_is_an_icon(icon: str) -> None:
    assert parse_icon(icon) == icon


@pytest.mark.parametrize(
    "raw",
    [
        "",
        " ",
        "\n",
        "ab",
        "🦉🦉",
        "👩\u200d💻",
        "\u202e",
        "\x1b",
        "\u0301",
        "🇩",
        "a\u200b",
        "x" * 100,
        None,
        7,
        "\ud800",
    ],
)
def test_what_is_no_one_sign_is_refused(raw: object) -> None:
    with pytest.raises(Refusal, match="give one sign"):
        parse_icon(raw)


def test_a_toolkit_is_one_of_the_file() -> None:
    assert parse_toolkit("reader").tools == ["Read", "Glob", "Grep"]
    assert parse_toolkit(None).tools is None
    assert "git" in toolkits()["coder"].packages
    with pytest.raises(Refusal, match="there are reader, writer, coder"):
        parse_toolkit("hacker")


async def test_an_agent_says_who_it_is_and_everybody_reads_it(hive: Services, tmp_path: Path) -> None:
    async with program_of(hive, "iris", tmp_path) as iris:
        assert await iris.call("set_profile", pronouns="she/her", icon="🦉") == {"pronouns": "she/her", "icon": "🦉"}
        kept = await iris.call("set_profile", pronouns="they/them", about='reads "all"')
        assert kept == {"pronouns": "they/them", "icon": "🦉", "about": 'reads "all"'}
        await iris.call("set_profile", **kept)
    assert (await hive.kinds()).count("agent_profile") == 2, "the same again is nothing new"
    async with program_of(hive, "damocles", tmp_path) as other:
        result = await other.result("list_agents")
    (told,) = [one for one in result["structuredContent"]["agents"] if one["name"] == "iris"]
    assert (told["pronouns"], told["icon"], told["about"]) == ("they/them", "🦉", 'reads "all"')
    assert r'icon "🦉", pronouns "they/them", about "reads \"all\""' in result["content"][0]["text"]


async def test_whom_an_agent_wakes_or_writes_to_in_a_turn_reads_its_pronouns(hive: Services, tmp_path: Path) -> None:
    await set_profile(hive.store, Limits(), IRIS, "she/her")
    for body in ("one", "two"):
        await hive.say("iris", "damocles", body)
    await hive.say("hm1nd", "damocles", "three")
    lease = await hive.broker.lease(AgentName("damocles"))
    assert 'from: iris ("she/her")\nmessage: 1\n' in wake_prompt(lease.message, lease.waiting)
    async with program_of(hive, "damocles", tmp_path) as damocles:
        text = (await damocles.result("recv"))["content"][0]["text"]
    assert 'from: iris ("she/her")\nmessage: 2\n' in text
    assert "from: hm1nd\nmessage: 3\n" in text


@pytest.mark.parametrize(
    "given",
    [
        {"pronouns": ""},
        {"pronouns": "x" * 41},
        {"pronouns": "a\nb"},
        {"pronouns": "a\u202eb"},
        {"pronouns": "it", "icon": "ab"},
        {"pronouns": "it", "about": "x" * 201},
    ],
)
async def test_a_profile_is_short_and_can_be_seen(hive: Services, tmp_path: Path, given: dict[str, str]) -> None:
    async with program_of(hive, "iris", tmp_path) as iris:
        assert "cannot" in await iris.refusal("set_profile", **given)
    assert (await hive.agents.get(IRIS)).pronouns is None


async def test_a_page_shows_what_an_agent_says_of_itself_as_soon_as_it_does(hive: Services) -> None:
    async with served(hive_of(hive)) as browser:
        after = await hive.store.last_seq()
        async with browser.stream(f"/live?after={hive.at(after)}") as stream:
            await set_profile(hive.store, Limits(), IRIS, "<b>they</b>", "🦉", 'says "hi"')
            row = (await stream.until("agent-iris"))[-1].data["html"]
            if "they" not in row:  # each connection is told anew how all are
                row = (await stream.until("agent-iris"))[-1].data["html"]
    assert "&lt;b&gt;they&lt;/b&gt;" in row
    assert "🦉" in row
    assert 'title="says &#34;hi&#34;"' in row


async def test_an_agent_changes_what_it_says_of_itself_so_many_times_an_hour(hive: Services) -> None:
    limits, before = Limits(profile_changes_per_hour=3), len(await hive.kinds())
    for number in range(2):
        await set_status(hive.store, limits, IRIS, f"step {number}")
        await set_status(hive.store, limits, IRIS, f"step {number}")  # which is no change
    await set_profile(hive.store, limits, IRIS, "she/her")
    with pytest.raises(Refusal, match=r"^cannot change the status: iris .* 3 times .*\(profile_changes_per_hour\)"):
        await set_status(hive.store, limits, IRIS, "step 3")
    with pytest.raises(Refusal, match="cannot change the profile"):
        await set_profile(hive.store, limits, IRIS, "they/them")
    agent = await hive.agents.get(IRIS)
    assert (agent.status, agent.pronouns) == ("step 1", "she/her")
    assert (await hive.kinds())[before:] == ["agent_status", "agent_status", "agent_profile"]
    await set_status(hive.store, limits, AgentName("damocles"), "reading")  # another has its own
    hive.clock.ahead_s += 2 * 3600
    await set_status(hive.store, limits, IRIS, "step 3")
