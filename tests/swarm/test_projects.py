"""Two agents of a real hive work on one repository of the host, each in its own clone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hive_core.cli.client import Client
from tests.checkouts import Checkout
from tests.daemons import Daemon
from tests.hives import clean_environment
from tests.processes import look_until
from tests.swarm.test_outlive import WELCOME, open_swarm, spawn

# Who commits is told by the environment, for what runs without it by the clone.
WORK = """exec > /state/said 2>&1
cd /projects/site && git checkout -q -b iris/fix && echo more > more && git add more && git commit -qm more &&
git log -1 --format='%an <%ae> %cn <%ce>' > /state/who &&
env -i PATH=$PATH git -c user.useConfigOnly=true commit --allow-empty -qm again && git push -q &&
git -C /projects/site count-objects -v | grep in-pack > /state/own && git fsck --strict &&
touch /state/done || touch /state/failed
"""
# Before its turn it was fetched; what comes in the middle of one it fetches by itself.
LOOK = """exec > /state/said 2>&1
cd /projects/site && git rev-parse origin/iris/fix > /state/seen &&
git pull -q origin iris/fix && cp more /state/more && git rev-parse HEAD > /state/pulled
"""
# The clone waits when it is connected, where it writes down what it hears; so does the first push, before it sends
# anything; each push that follows a kill waits for the next daemon.
CLONE_AND_PUSH = """exec > /state/said 2>&1
GIT_TRACE_PACKET=/state/heard git clone -q hive://site /state/copy 2> /state/cloned; echo $? > /state/code
: > /state/heard & # for a reader whom a clone that failed left waiting
git -C /state/copy fsck --strict && mv /state/code /state/clone_code
cd /projects/site && git checkout -q -b iris/fix && head -c 3000000 /dev/urandom > more && git add more &&
git commit -qm more && git rev-parse HEAD > /state/head
printf '#!/bin/sh\\ntouch /state/pushing; while [ ! -e /state/go ]; do sleep 0.05; done' > .git/hooks/pre-push
chmod +x .git/hooks/pre-push
git push -q 2> /state/first; echo $? > /state/code; mv /state/code /state/first_code
git push -q 2> /state/second; echo $? > /state/code; mv /state/code /state/second_code
"""
SEND = {"tool": "send", "args": {"to": "operator", "body": "done"}}


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def let_work_on(daemon: Daemon, client: Client, name: str, projects: str) -> None:
    """Approve what is added to an agent's agent.toml."""
    checkout = Checkout(daemon.state / "proposed" / name / "config")
    sha = checkout.commit(agent__toml=f"projects = {projects}\n{(checkout.path / 'agent.toml').read_text()}")
    asked = client.call("request_apply_commit", agent=name, sha=sha, reason="a test")
    digest = client.call("show", approval=asked["approval"])["digest"]
    assert client.call("approve", approval=asked["approval"], digest=digest)["state"] == "done"


def take_turn(daemon: Daemon, client: Client, name: str, word: str) -> int:
    """The number of a turn that a message made, once it has ended."""
    number = client.call("send", to=name, body=word)["message"]
    begun = daemon.events(client, lambda e: e["kind"] == "turn_started" and e["data"].get("message") == number)
    turn = begun["data"]["turn"]
    daemon.events(client, lambda e: e["kind"] == "turn_ended" and e["data"]["turn"] == turn, begun["seq"])
    return int(turn)


def started(daemon: Daemon, readme: bytes = b"of the site\n", **scripts: str) -> tuple[Client, Path]:
    """A hive whose agents do this when they are told to work on its project, and where that is on the host."""
    source = daemon.folder / "site.git"
    git(daemon.folder, "init", "-q", "-b", "main", "work")
    (daemon.folder / "work" / "README").write_bytes(readme)
    git(daemon.folder / "work", "add", ".")
    git(daemon.folder / "work", "commit", "-qm", "first")
    git(daemon.folder, "clone", "-q", "--bare", "work", str(source))
    client = daemon.start()
    client.call("project_add", project="site", source=str(source))
    for name, script in scripts.items():
        spawn(client, name, [WELCOME, {"from": "operator", "match": "work", "do": [{"run": script}, SEND]}])
        let_work_on(daemon, client, name, '[{ name = "site" }]')
    return client, source


def two_agents_work_on_one_project(sandbox: str) -> None:
    with open_swarm(f"--sandbox={sandbox}") as daemon:
        client, source = started(daemon, iris=WORK, argus=LOOK)
        iris, argus = (daemon.state / "agents" / name / "state" for name in ("iris", "argus"))
        take_turn(daemon, client, "iris", "work")
        assert not (iris / "failed").exists(), (iris / "said").read_text()
        assert (iris / "done").exists()
        assert (iris / "who").read_text() == "iris <iris@hive> iris <iris@hive>\n"
        assert (iris / "own").read_text() == "in-pack: 0\n", "what it cloned it borrows"
        pushed = git(source, "rev-parse", "refs/hive/iris/iris/fix")

        take_turn(daemon, client, "argus", "work")
        assert [(argus / name).read_text().strip() for name in ("seen", "pulled", "more")] == [pushed, pushed, "more"]
        assert git(source, "for-each-ref", "--format=%(refname)", "refs/heads") == "refs/heads/main"


def test_two_agents_work_on_one_project() -> None:
    two_agents_work_on_one_project("bwrap")


def test_a_killed_daemon_costs_no_clone_and_no_push_by_halves_and_what_comes_next_waits_for_another_daemon() -> None:
    with open_swarm() as daemon:
        client, source = started(daemon, os.urandom(5_000_000), iris=CLONE_AND_PUSH)
        state, mirror = daemon.state / "agents" / "iris" / "state", daemon.state / "mirrors" / "site.git"
        os.mkfifo(state / "heard")
        client.call("send", to="iris", body="work")
        with (state / "heard").open("rb") as heard:
            daemon.kill()
            while heard.read(1 << 16):
                pass
        look_until((state / "clone_code").exists)
        # git has the socket itself, and carries the clone to its end.
        assert ((state / "clone_code").read_text(), (state / "cloned").read_text()) == ("0\n", "")

        daemon.start()
        look_until((state / "pushing").exists)
        daemon.kill()
        (state / "go").touch()
        look_until((state / "first_code").exists)
        assert (state / "first_code").read_text() != "0\n"
        told = [line.strip() for line in (state / "first").read_text().splitlines() if "the hive" in line]
        assert len(told) == 1, (state / "first").read_text()
        assert told[0].endswith("push again")
        for repository, pushed in ((source, "refs/hive"), (mirror, "refs/heads/iris")):
            assert git(repository, "for-each-ref", pushed) == ""
            git(repository, "fsck", "--strict")

        daemon.start()
        look_until((state / "second_code").exists)
        assert (state / "second_code").read_text() == "0\n", (state / "second").read_text()
        assert git(source, "rev-parse", "refs/hive/iris/iris/fix") == (state / "head").read_text().strip()
        assert not list((mirror / "objects").glob("*incoming*"))
