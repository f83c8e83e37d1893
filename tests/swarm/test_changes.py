"""Changes of a real hive of rehearsals: taken at the turn's edge, proven, and taken back when they are no good."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hive_core.cli.client import Client
from hive_core.protocol.refusal import Refusal
from tests.checkouts import Checkout
from tests.daemons import Daemon, open_daemon
from tests.dying import AFTER, BEFORE, die_at, let_die, packages, wait_dead
from tests.forked import forks_of
from tests.swarm.test_outlive import GATED, SAY_WHO, WELCOME, open_swarm, persona, pid_of, spawn
from tests.swarm.test_tombstones import hive

SAYS = {"from": "operator", "match": "who", "do": [SAY_WHO]}
SAYS_MORE = {
    "from": "operator",
    "match": "who",
    "do": [{"tool": "send", "args": {"to": "operator", "body": "it is me, changed"}}],
}
SERVERS = [{"name": "hive", "status": "failed"}]
INIT = json.dumps({"type": "system", "subtype": "init", "session_id": "s", "mcp_servers": SERVERS})
RESULT = json.dumps({"type": "result", "subtype": "success", "is_error": False})


def ask(daemon: Daemon, client: Client, **files: str) -> dict[str, Any]:
    """The card of a change of iris."""
    sha = Checkout(daemon.state / "proposed" / "iris" / "config").commit(**files)
    asked = client.call("request_apply_commit", agent="iris", sha=sha, reason="a test")
    return dict(client.call("show", approval=asked["approval"]))


def approve(client: Client, card: dict[str, Any]) -> dict[str, Any]:
    return dict(client.call("approve", approval=card["id"], digest=card["digest"]))


def started_iris(daemon: Daemon, *rules: dict[str, Any]) -> Client:
    client = daemon.start()
    spawn(client, "iris", [WELCOME, *rules])
    daemon.wait_live(lambda agent: agent["name"] == "iris" and agent["state"] == "idle")
    return client


def mail_of(client: Client, name: str) -> list[str]:
    return [row["body"] for row in client.call("messages", agent=name)["messages"]]


def steps_of(client: Client, number: int) -> list[str]:
    found = [row for row in client.stream("events") if row["kind"] == "approval_step"]
    return [row["data"]["step"] for row in found if row["data"]["approval"] == number]


def test_a_change_is_taken_at_the_turns_edge_and_proven_before_the_next_message_is_read() -> None:
    with open_swarm() as daemon:
        client = started_iris(daemon, GATED, SAYS)
        before = pid_of(daemon, "iris")
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        card = ask(daemon, client, CLAUDE__md=persona([WELCOME, GATED, SAYS_MORE]))
        done: list[dict[str, Any]] = []
        clicked = threading.Thread(target=lambda: done.append(approve(daemon.client(), card)))
        clicked.start()
        daemon.events(client, lambda e: e["data"].get("step") == "waiting for its turn to end")
        client.call("send", to="iris", body="who are you?")
        assert pid_of(daemon, "iris") == before
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        daemon.wait_message(client, "finished")
        clicked.join()
        assert [(one["state"], one["proof"], one["step"]) for one in done] == [("done", "healthy", None)]
        assert pid_of(daemon, "iris") != before
        assert daemon.wait_message(client, "it is me")["body"] == "it is me, changed"
        assert steps_of(client, card["id"]) == ["building", "waiting for its turn to end", "proving"]


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("echo 'no good' >&2; exit 3", "its program does not come up: no good"),
        (f"read _; echo '{INIT}'; echo '{RESULT}'; cat", "its program does not come up: the hive's tools could not be"),
        ("cat > /dev/null", "its program said nothing of itself within 5 s (init_s)"),
    ],
    ids=["ends", "without_tools", "says_nothing"],
)
def test_a_change_whose_program_does_not_come_up_goes_back_by_itself_and_costs_nobody_anything(
    tmp_path: Path, program: str, why: str
) -> None:
    executable = tmp_path / "claude"
    executable.write_text(f"#!/bin/sh\n{program}\n")
    executable.chmod(0o755)
    says_nothing = {"HIVE_INIT_S": "5"} if "(init_s)" in why else {}
    with open_swarm(f"--claude={executable}", **says_nothing) as daemon:
        client = started_iris(daemon, SAYS)
        card = ask(daemon, client, agent__toml='program = "claude"\n')
        failed = approve(client, card)
        told = f"cannot keep the change of iris: {why}"
        assert (failed["state"], (failed["note"] or "")[: len(told)]) == ("failed", told)
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")
        assert steps_of(client, card["id"])[-2:] == ["proving", "going back"]
        applied = Checkout(daemon.state / "applied" / "iris.git")
        assert applied.git("rev-parse", "main") == card["payload"]["base"]
        assert f"deployed/{card['id']}" not in applied.git("tag", "--list").split()
        assert [body.partition(":")[0] for body in mail_of(client, "hm1nd")] == ["spawned"]


def test_a_change_to_a_program_that_is_missing_goes_back() -> None:
    with open_swarm("--claude=/dev/null") as daemon:
        client = started_iris(daemon, SAYS)
        failed = approve(client, ask(daemon, client, agent__toml='program = "claude"\n'))
        why = "cannot keep the change of iris: claude is not installed"
        assert (failed["state"], (failed["note"] or "")[: len(why)]) == ("failed", why)
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")


def test_an_agent_that_is_kept_down_is_changed_unproven() -> None:
    with open_swarm() as daemon:
        client = started_iris(daemon, SAYS)
        client.call("kill", agent="iris")
        done = approve(client, ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE])))
        assert (done["state"], done["proof"]) == ("done", "unproven: it is kept down")
        client.call("start", agent="iris")
        client.call("send", to="iris", body="who are you?")
        assert daemon.wait_message(client, "it is me")["body"] == "it is me, changed"


def test_a_new_agent_is_proven_before_its_first_turn() -> None:
    with open_swarm() as daemon:
        client = daemon.start()
        asked = client.call("request_spawn", agent="iris", persona=persona([WELCOME, SAYS]), reason="a test")
        done = approve(client, client.call("show", approval=asked["approval"]))
        assert (done["state"], done["proof"]) == ("done", "healthy")
        assert steps_of(client, done["id"]) == ["building", "proving"]
        daemon.events(client, lambda e: e["kind"] == "turn_started" and e["agent"] == "iris")


def test_a_new_agent_that_does_not_come_up_is_there_and_its_approval_says_so(tmp_path: Path) -> None:
    executable = tmp_path / "claude"
    executable.write_text("#!/bin/sh\nexit 3\n")
    executable.chmod(0o755)
    with open_daemon("--default-program=claude", f"--claude={executable}") as daemon:
        client = daemon.start()
        asked = client.call("request_spawn", agent="iris", persona="You read.", reason="a test")
        done = approve(client, client.call("show", approval=asked["approval"]))
        assert done["state"] == "done"
        assert done["proof"].startswith("unhealthy: its program does not come up: ")
        card = ask(daemon, client, agent__toml='program = "rehearsal"\n')
        assert approve(client, card)["proof"] == "healthy"


def test_the_command_rolls_an_agent_back_and_forth_and_tells_its_history() -> None:
    with open_swarm() as daemon:
        client = started_iris(daemon, SAYS)
        approve(client, ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE])))
        done = hive(daemon, "rollback", "iris", "--to", "deployed/0")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "approval 3 of iris: done (healthy)")
        client.call("send", to="iris", body="who are you?")
        assert daemon.wait_message(client, "it is me")["body"] == "it is me"
        back = hive(daemon, "rollback", "iris")
        assert (back.returncode, back.stdout.splitlines()[-1]) == (0, "approval 4 of iris: done (healthy)")
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me, changed")
        told = hive(daemon, "history", "iris").stdout.splitlines()
        assert ["deployed/4" in told[0], "← runs" in told[0], "healthy" in told[0]] == [True, True, True]
        assert told[1:3] == ["  back to deployed/2", told[2]]
        assert "deployed/4" in hive(daemon, "blame", "iris", "CLAUDE.md:3").stdout
        wrong = hive(daemon, "rollback", "iris", "--to", "main")
        assert (wrong.returncode, "give deployed/ID" in wrong.stderr) == (2, True)


# -- what passes by a rule --------------------------------------------------------------------------------------------

RULE = """
[[policy]]
name = "own prompt"
kind = "apply_commit"
agents = ["iris"]
requested_by = "*"
only = ["prompt"]
"""


def test_a_change_that_a_rule_allows_is_on_its_agent_without_a_click_though_the_daemon_is_killed_meanwhile() -> None:
    with open_swarm() as daemon:
        file = daemon.folder / "hyperhive" / "config.toml"
        file.parent.mkdir()
        file.write_text(RULE)
        client = started_iris(daemon, GATED, SAYS)
        client.call("send", to="iris", body="work")
        daemon.wait_message(client, "begun")
        card = ask(daemon, client, CLAUDE__md=persona([WELCOME, GATED, SAYS_MORE]))
        assert (card["state"], card["rule"]) == ("approved", "own prompt")
        daemon.events(client, lambda e: e["data"].get("step") == "waiting for its turn to end")
        daemon.kill()
        file.write_text("")  # the daemon after it knows no rule
        client = daemon.start()
        (daemon.state / "agents" / "iris" / "state" / "go").touch()
        daemon.events(client, lambda e: e["kind"] == "approval_done" and e["data"]["approval"] == card["id"])
        client.call("send", to="iris", body="who are you?")
        assert daemon.wait_message(client, "it is me")["body"] == "it is me, changed"
        told = hive(daemon, "history", "iris").stdout.splitlines()[0]
        assert "by rule own prompt, without a click, for operator" in told
        assert ask(daemon, client, CLAUDE__md=persona([WELCOME]))["state"] == "pending"
        daemon.stop()
        file.write_text(RULE.replace("only", "olny"))
        with pytest.raises(Refusal, match="cannot use the policy: rule 1: only: it is missing; change line 2 of"):
            daemon.start()


# -- a daemon that dies in the walk -----------------------------------------------------------------------------------

PLAIN, TRIAL = "hive_core.procedures.deployments", "hive_core.procedures.trials"
PLACES = [
    (PLAIN, "PlainDeployments.build", "built", AFTER),
    (PLAIN, "PlainDeployments.take", "taken", AFTER),
    (TRIAL, "Trial.prove", "noted", BEFORE),
    (TRIAL, "Trial.prove", "proven", AFTER),
    (PLAIN, "PlainDeployments.settle", "proof kept", BEFORE),
    (PLAIN, "PlainDeployments.settle", "settled", AFTER),
]


@pytest.fixture(scope="module")
def dying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of packages whose daemon dies where it is told to."""
    folder = let_die(packages(tmp_path_factory.mktemp("dying")), PLACES)
    with forks_of(folder):
        yield str(folder)


def approve_and_die(daemon: Daemon, client: Client, step: str, card: dict[str, Any]) -> Client:
    """A change is approved by one who dies at a step; the operator of the next daemon."""
    die_at(daemon, step)
    with pytest.raises(Refusal):
        approve(client, card)
    wait_dead(daemon)
    return daemon.start()


def ended(daemon: Daemon, client: Client, number: int) -> dict[str, Any]:
    daemon.events(
        client, lambda e: e["kind"] in ("approval_done", "approval_failed") and e["data"]["approval"] == number
    )
    return dict(client.call("show", approval=number))


@pytest.mark.parametrize("step", ["built", "taken", "noted", "proven", "proof kept", "settled"])
def test_a_daemon_that_is_killed_after_any_step_is_followed_by_one_that_finishes(dying: str, step: str) -> None:
    with open_swarm(PYTHONPATH=dying) as daemon:
        client = started_iris(daemon, SAYS)
        card = ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE]))
        client = approve_and_die(daemon, client, step, card)
        if step == "built":  # nothing keeps her from her mail yet: she may read it as she was
            ended(daemon, client, card["id"])
        client.call("send", to="iris", body="who are you?")
        done = ended(daemon, client, card["id"])
        assert (done["state"], done["proof"]) == ("done", "healthy")
        assert daemon.wait_message(client, "it is me")["body"] == "it is me, changed"
        assert not [body for body in mail_of(client, "hm1nd") if "crash" in body]


@pytest.mark.parametrize("step", ["noted", "proven"])
def test_a_daemon_that_is_killed_when_it_proves_a_new_agent_is_followed_by_one_that_finishes(
    dying: str, step: str
) -> None:
    with open_swarm(PYTHONPATH=dying) as daemon:
        client = daemon.start()
        asked = client.call("request_spawn", agent="iris", persona=persona([WELCOME, SAYS]), reason="a test")
        client = approve_and_die(daemon, client, step, client.call("show", approval=asked["approval"]))
        done = ended(daemon, client, asked["approval"])
        assert (done["state"], done["proof"]) == ("done", "healthy")
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")
        assert [body.partition(":")[0] for body in mail_of(client, "hm1nd")] == ["spawned"]


def test_two_daemons_that_are_killed_one_after_the_other_take_no_change_twice_and_none_for_another(dying: str) -> None:
    with open_swarm(PYTHONPATH=dying) as daemon:
        client = started_iris(daemon, SAYS)
        waiting = ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS]) + "one more line\n")
        Checkout(daemon.state / "proposed" / "iris" / "config").git("reset", "-q", "--hard", "HEAD~1")
        card = ask(daemon, client, CLAUDE__md=persona([WELCOME, SAYS_MORE]))
        die_at(daemon, "taken")
        with pytest.raises(Refusal):
            list(client.stream("approve_all", approvals=[[one["id"], one["digest"]] for one in (card, waiting)]))
        wait_dead(daemon)
        die_at(daemon, "settled")
        with contextlib.suppress(Refusal):  # it may be gone before it is asked
            daemon.start()
        wait_dead(daemon)
        client = daemon.start()
        client.call("send", to="iris", body="who are you?")
        ends = {one["id"]: ended(daemon, client, one["id"]) for one in (card, waiting)}
        assert (ends[card["id"]]["state"], ends[card["id"]]["proof"]) == ("done", "healthy")
        assert ends[waiting["id"]]["state"] == "failed"
        assert daemon.wait_message(client, "it is me")["body"] == "it is me, changed"
        runs = [row["id"] for row in client.call("history", agent="iris")["deployments"] if row["runs"]]
        assert runs == [card["id"]]
        kinds = [row["kind"] for row in client.stream("events") if row["data"].get("approval") == card["id"]]
        assert (kinds.count("approval_done"), kinds.count("approval_approved")) == (1, 1)


def test_who_is_destroyed_while_its_change_is_tried_comes_back_as_it_was(tmp_path: Path) -> None:
    executable = tmp_path / "claude"
    executable.write_text("#!/bin/sh\ncat > /dev/null\n")
    executable.chmod(0o755)
    with open_swarm(f"--claude={executable}") as daemon:
        client = started_iris(daemon, SAYS)
        card = ask(daemon, client, agent__toml='program = "claude"\n')
        ends: list[dict[str, Any]] = []
        clicked = threading.Thread(target=lambda: ends.append(approve(daemon.client(), card)))
        clicked.start()
        daemon.events(client, lambda e: (e["data"].get("step"), e["data"].get("approval")) == ("proving", card["id"]))
        client.call("destroy", agent="iris", now=True)
        clicked.join()
        assert [(end["state"], end["note"]) for end in ends] == [
            ("failed", "cannot deploy iris: it was destroyed meanwhile")
        ]
        daemon.events(client, lambda e: e["kind"] == "agent_destroyed")
        client.call("revive", tombstone="iris")
        client.call("send", to="iris", body="who are you?")
        daemon.wait_message(client, "it is me")


@pytest.mark.parametrize("step", ["built", "noted"])
def test_what_is_no_good_is_taken_back_by_the_next_daemon_too(dying: str, tmp_path: Path, step: str) -> None:
    executable = tmp_path / "claude"
    executable.write_text("#!/bin/sh\nexit 3\n")
    executable.chmod(0o755)
    with open_swarm(f"--claude={executable}", PYTHONPATH=dying) as daemon:
        client = started_iris(daemon, SAYS)
        card = ask(daemon, client, agent__toml='program = "claude"\n')
        client = approve_and_die(daemon, client, step, card)
        client.call("send", to="iris", body="who are you?")
        failed = ended(daemon, client, card["id"])
        assert failed["state"] == "failed"
        assert failed["note"].startswith("cannot keep the change of iris: its program does not come up")
        daemon.wait_message(client, "it is me")
        assert not [body for body in mail_of(client, "hm1nd") if "crash" in body]
        assert {row["state"] for row in client.call("turns", agent="iris")["turns"]} <= {"done", "running"}
