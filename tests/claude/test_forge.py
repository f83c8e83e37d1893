"""The real Claude Code works on a project: it clones, pushes a branch, opens a pull request and answers a question."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.claude.test_story import play, result_text
from tests.containers.drivers import need
from tests.daemons import Daemon, open_daemon
from tests.needs import find_claude
from tests.scripted_forge import BOT, TOKEN, ScriptedForge
from tests.scripted_model import Request, ScriptedModel, say, tool
from tests.swarm.test_projects import git, let_work_on

WORK = """cd /projects/site && git checkout -q -b iris/fix && echo mended >> README && git commit -qam 'Mend it' &&
git push -q -u origin iris/fix && git rev-parse HEAD; env | grep -c 0123456789abcdef"""
ASK = {"title": "Mend it", "body": "It was broken.", "head": "iris/fix"}


def newest(request: Request) -> str:
    """The newest comment of a thread that was read."""
    return str(json.loads(result_text(request))["below"][-1]["body"])


SCENES = {
    ("iris", "Please mend the site"): [
        say(tool("Bash", command=WORK, description="work")),
        say(tool("mcp__hive__pull_request_open", **ASK)),
        lambda request: say(tool("mcp__hive__send", to="operator", body=f"asked: {result_text(request)}")),
    ],
    ("iris", "new comment on pull request 1"): [
        say(tool("mcp__hive__forge_read", number=1)),
        lambda request: say(tool("mcp__hive__forge_comment", number=1, body=f"You asked: {newest(request)}")),
        say(tool("mcp__hive__send", to="operator", body="answered")),
    ],
}
LANES = """
[[lane]]
name = "site"
agents = ["iris"]
kinds = ["pull_request"]
"""


@pytest.fixture
def forge() -> ScriptedForge:
    return ScriptedForge(branches={"main", "iris/fix"})


@pytest.fixture(params=["bwrap"])
def stage(forge: ScriptedForge, request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, str]]:
    """A daemon that is not started yet, and the forge's address."""
    with ScriptedModel(lambda asked: play(SCENES, asked)) as model, forge.served() as url:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--backoff-s=0.1")
        flags = (*flags, f"--sandbox={need(request.param)}")
        with open_daemon(*flags, ANTHROPIC_API_KEY="sk-ant-api03-of-a-test") as daemon:
            config = daemon.folder / "hyperhive" / "config.toml"
            config.parent.mkdir()
            config.write_text(LANES)
            yield daemon, url


def repository(folder: Path) -> Path:
    """A bare repository with one commit on main."""
    git(folder, "init", "-q", "-b", "main", "work")
    (folder / "work" / "README").write_text("of the site\n")
    git(folder / "work", "add", ".")
    git(folder / "work", "commit", "-qm", "first")
    git(folder, "clone", "-q", "--bare", "work", "site.git")
    return folder / "site.git"


def test_a_pull_request_is_opened_once_over_a_killed_daemon_and_a_question_on_it_is_answered(
    stage: tuple[Daemon, str], forge: ScriptedForge
) -> None:
    daemon, url = stage
    source = repository(daemon.folder)
    client = daemon.start()
    place = {"project": "site", "kind": "forgejo", "url": url, "repository": forge.repository, "token": TOKEN}
    client.call("project_add", project="site", source=str(source))
    client.call("forge_add", **place)
    asked = client.call("request_spawn", agent="iris", persona="You write code.", reason="a test")
    digest = client.call("show", approval=asked["approval"])["digest"]
    assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"
    let_work_on(daemon, client, "iris", '[{ name = "site" }]')

    # The pull request is there, and before anybody hears of it the daemon is gone.
    forge.when_done["/repos/ada/site/pulls"] = daemon.kill
    client.call("send", to="iris", body="Please mend the site")
    daemon.process.wait(60)
    client = daemon.start()
    said = daemon.wait_message(client, "asked: ")["body"].removeprefix("asked: ")
    assert json.loads(said) == {"project": "site", "number": 1, "url": f"{url}/ada/site/pulls/1"}
    (made,) = forge.threads.values()
    assert (made["title"], made["_pull"], made["user"]["login"]) == ("Mend it", ("iris/fix", "main"), BOT)
    assert "Written by the agent `iris`" in made["body"]
    assert git(source, "log", "-1", "--format=%s %an", "refs/hive/iris/iris/fix") == "Mend it iris"

    forge.comment("ada", 1, "Why?\nfrom: operator")
    client.call("forge_add", **place)  # which lets it be looked at now
    daemon.wait_message(client, "answered")
    answer = forge.comments[1][1]
    assert answer["user"]["login"] == BOT
    assert answer["body"].startswith("You asked: Why?\nfrom: operator\n")
    news = [row for row in client.call("messages", agent="iris")["messages"] if row["sender"] == "forge"]
    assert len(news) == 1
    for path in (daemon.state / "agents" / "iris").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
    assert TOKEN not in daemon.log.read_text()
