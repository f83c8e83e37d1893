"""The real Claude Code builds and pushes to a git server that only the hive has the token of, in each sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.claude.test_story import play, result_text
from tests.containers.drivers import need
from tests.daemons import Daemon, open_daemon
from tests.git_servers import serve_http
from tests.needs import find_claude
from tests.scripted_model import ScriptedModel, say, tool
from tests.swarm.test_projects import git, let_work_on

TOKEN = "token-of-the-server-0123456789abcdef"
BUILD = r"""cd /projects/site && git checkout -q -b iris/build && printf 'out: README\n\tcp README out\n' > Makefile &&
make -s && cat out && git add . && git commit -qm 'Build it' && git push -q && git rev-parse HEAD &&
env | grep -c token-of"""
# How it came by that is another question; it leaves by no push.
LEAK = f"""cd /projects/site && git checkout -q -b iris/leak && echo 'url = https://x:{TOKEN}@git.example' > settings
git add . && git commit -qm 'Set it up' && git push -q
git push -q origin iris/build:main"""
SEND = "mcp__hive__send"
SCENES = {
    ("iris", "Please build the site"): [
        say(tool("Bash", command=BUILD, description="build")),
        lambda request: say(tool(SEND, to="operator", body=f"built: {result_text(request)}")),
        say(tool("Bash", command=LEAK, description="leak")),
        lambda request: say(tool(SEND, to="operator", body=f"leaked: {result_text(request)}")),
    ],
}


@pytest.fixture(params=["bwrap", "nspawn"])
def stage(request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, ScriptedModel]]:
    with ScriptedModel(lambda request: play(SCENES, request)) as model:
        flags = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        flags = (*flags, f"--sandbox={need(request.param)}")
        with open_daemon(*flags, ANTHROPIC_API_KEY="sk-ant-api03-of-a-test") as daemon:
            yield daemon, model


def test_it_builds_what_it_finds_cloned_and_pushes_what_it_may(
    stage: tuple[Daemon, ScriptedModel], tmp_path: Path
) -> None:
    daemon, model = stage
    git(tmp_path, "init", "-q", "-b", "main", "work")
    (tmp_path / "work" / "README").write_text("of the site\n")
    git(tmp_path / "work", "add", ".")
    git(tmp_path / "work", "commit", "-qm", "first")
    git(tmp_path, "clone", "-q", "--bare", "work", "site.git")
    client = daemon.start()
    with serve_http(tmp_path, TOKEN) as server:
        client.call("project_add", project="site", source=f"{server.url}/site.git", token=TOKEN)
        asked = client.call("request_spawn", agent="iris", persona="You write code.", reason="a test")
        digest = client.call("show", approval=asked["approval"])["digest"]
        assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"
        let_work_on(daemon, client, "iris", '[{ name = "site" }]')
        client.call("send", to="iris", body="Please build the site.")
        built = daemon.wait_message(client, "built: ")["body"].split()
        refused = daemon.wait_message(client, "leaked: ")["body"]
    heads = git(tmp_path / "site.git", "for-each-ref", "--format=%(refname) %(authorname)").splitlines()
    assert [head.split()[0] for head in heads] == ["refs/heads/iris/build", "refs/heads/main"]
    assert built[1:4] == ["of", "the", "site"], "what it made"
    assert built[4:] == [git(tmp_path / "site.git", "rev-parse", "iris/build"), "0"], "and no token in its environment"
    assert "settings holds a secret of the hive's (credentials/projects/site.token); take it out" in refused
    assert "main cannot be pushed: only iris/* may be pushed" in refused
    (system,) = {request.system[-200:] for request in model.turns if "Please build" in request.last_user_text}
    assert "- /projects/site, a clone of hive://site: you may push to iris/*" in system
