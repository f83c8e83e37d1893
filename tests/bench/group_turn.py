"""Group `turn`: what a hive adds to the agent's program, which is the real one, with a model that answers at once."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hive_agent.claude_command import flags
from hive_agent.wake import parse_wake
from hive_core.cli.client import Client
from tests.bench.bare import bare_seat, open_bare
from tests.bench.figures import figure, say
from tests.bench.group_start import all_idle, cpu_s, rss_mb, spawn
from tests.bench.relay import relay_figures
from tests.bench.stream import ASKED, many_lines, stream_10k
from tests.daemons import KEY, Daemon, open_daemon
from tests.needs import find_claude, missing
from tests.processes import children_of
from tests.scripted_model import Answer, Reply, Request, ScriptedModel, tool
from tests.scripted_model import say as answer_with

ROUNDS = int(os.environ.get("HIVE_BENCH_ROUNDS", "20"))
IDLE_AGENTS = 5
HARNESSES = 20
IDLE_S = 20


def measure() -> Iterator[dict[str, Any]]:
    if trouble := missing("claude") or missing("bwrap"):
        print(f"  left out: {trouble}", file=sys.stderr)
    else:
        with open_stage() as stage:
            yield from cold_turns(stage)
            yield from warm_turns(stage)
            yield from stream_10k(stage)
        yield from wake_tokens()
        yield from prefix_kept()
        yield idle_calls()
    yield from harness_rss()
    yield from relay_figures()


class Stage:
    """A daemon whose agents run the real program, the model that answers them, and a watch over their turns."""

    def __init__(self, daemon: Daemon, model: ScriptedModel, client: Client, watch: Client) -> None:
        self.daemon = daemon
        self.model = model
        self.client = client
        self.port = int(model.base_url.rpartition(":")[2])
        self._events = watch.stream("events", follow=True, after=0)

    def turn(self, agent: str, body: str) -> tuple[float, float]:
        """Send a message and wait for the ack of its turn: the two times."""
        begun = time.monotonic()
        message = self.client.call("send", to=agent, body=body)["message"]
        return begun, self._end_of(agent, message)

    def welcome(self, *agents: str, **settings: str | int) -> None:
        """Make agents with these settings, and wait until each has taken its first turn."""
        for agent in agents:
            asked = self.client.call("request_spawn", agent=agent, persona="You write code.", reason="a measurement")
            self.approve(asked["approval"])
            self._next("turn_ended", agent)
        if settings:
            for agent in agents:
                self._configure(agent, settings)

    def approve(self, approval: int) -> None:
        digest = self.client.call("show", approval=approval)["digest"]
        assert self.client.call("approve", approval=approval, digest=digest)["state"] == "done"

    def settings(self, agent: str) -> dict[str, Any]:
        """What the agent's harness is told with each lease."""
        with contextlib.closing(sqlite3.connect(self.daemon.state / "hive.sqlite")) as db:
            (told,) = db.execute("SELECT settings FROM agents WHERE name = ?", (agent,)).fetchone()
        settings: dict[str, Any] = json.loads(told)
        return settings

    def flags(self, agent: str) -> list[str]:
        """With which the harness starts the agent's program."""
        settings: Any = self.settings(agent)
        return flags(bare_seat(agent, _claude(), self.port), settings)

    def asked_by(self, agent: str) -> list[Request]:
        """The requests of an agent's conversation, known by its role."""
        return [request for request in self.model.turns if f"You are {agent}," in request.system]

    def _configure(self, agent: str, settings: dict[str, str | int]) -> None:
        """By a commit that is approved, as an operator does."""
        folder = self.daemon.state / "proposed" / agent / "config"
        with (folder / "agent.toml").open("a") as file:
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
        git = ["git", "-C", str(folder), "-c", "user.name=bench", "-c", "user.email=bench@hive"]
        subprocess.run([*git, "commit", "--quiet", "--all", "--message", "Set it"], check=True)
        sha = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        asked = self.client.call("request_apply_commit", agent=agent, sha=sha, reason="a measurement")
        self.approve(asked["approval"])

    def _end_of(self, agent: str, message: int) -> float:
        while (data := self._next("turn_started", agent))["message"] != message:
            pass
        while (ended := self._next("turn_ended", agent))["turn"] != data["turn"]:
            pass
        at = time.monotonic()
        assert ended["state"] == "done", ended
        return at

    def _next(self, kind: str, agent: str) -> dict[str, Any]:
        """The next event of this kind about an agent; those before it are gone."""
        for event in self._events:
            if event["kind"] == kind and event["agent"] == agent:
                data: dict[str, Any] = event["data"]
                return data
        raise AssertionError("the daemon ended its events")


@contextmanager
def open_stage() -> Iterator[Stage]:
    with ScriptedModel(answer) as model:
        given = (f"--claude={find_claude()}", f"--provider-base-url={model.base_url}", "--end-agents-with-daemon")
        with open_daemon(*given, "--pair-rate-per-hour=1000000", ANTHROPIC_API_KEY=KEY) as daemon:
            yield Stage(daemon, model, daemon.start(), daemon.client())


def answer(request: Request) -> Answer:
    """At once: a few calls of tools for a message that asks for work, a word for every other one."""
    if "begin a repository" in request.last_user_text and not request.tool_results:
        return answer_with(tool("Bash", command=BEGIN_REPOSITORY, description="begin"))
    if ASKED in request.last_user_text:
        return many_lines()
    if "work" not in request.last_user_text:
        return "ok"
    done = sum(message["role"] == "assistant" for message in request.messages[_said_last(request) :])
    return STEPS[done] if done < len(STEPS) else "ok"


def _said_last(request: Request) -> int:
    """Where in a request's messages the last one stands that was said by a person."""
    spoken = [number for number, message in enumerate(request.messages) if _is_said(message)]
    return spoken[-1]


def _is_said(message: dict[str, Any]) -> bool:
    content = message["content"]
    return message["role"] == "user" and (
        isinstance(content, str) or not any(block.get("type") == "tool_result" for block in content)
    )


BEGIN_REPOSITORY = "git init --quiet . && git commit --quiet --allow-empty --message one"
STEPS: list[Reply] = [
    answer_with("I look.", tool("Bash", command="date > now; date > $$; ls", description="look")),
    answer_with("Both.", tool("Read", file_path="/state/now"), tool("mcp__hive__list_agents")),
    answer_with(tool("Bash", command="false", description="fail")),
    answer_with(tool("mcp__hive__send", to="operator", body="done")),
]


def cold_turns(stage: Stage) -> Iterator[dict[str, Any]]:
    say(f"turn_cold: {ROUNDS} turns in a process each, through the hive and bare, one after the other")
    stage.welcome("cold", turns="cold")
    seat = bare_seat("cold", _claude(), stage.port)
    ours, theirs = [], []
    with open_bare(stage.daemon, "bare-cold", seat, stage.flags("cold")) as bare:
        for number in range(ROUNDS + 1):
            begun, ended = stage.turn("cold", f"turn {number}")
            ours.append(ended - begun)
            alone = bare.cold_turn(stage.asked_by("cold")[-1].last_user_text)
            theirs.append(alone["ended_at"] - alone["begun_at"])
    yield _milliseconds("turn_cold", ours, "bare, a process each", theirs)


def warm_turns(stage: Stage) -> Iterator[dict[str, Any]]:
    say(f"turn_warm, enter_to_model: {ROUNDS} turns of one process, with as many cold ones between them")
    stage.welcome("warm")
    seat = bare_seat("warm", _claude(), stage.port)
    colds, warms, bares, enters, bare_enters = [[] for _ in range(5)]
    with open_bare(stage.daemon, "bare-warm", seat, stage.flags("warm")) as bare:
        for number in range(2 * ROUNDS + 2):
            # Before each of the two, so that neither finds the machine busy with what the other left to do.
            begun, ended = stage.turn("cold", f"turn {number} between")
            colds.append(ended - begun)
            if number % 2 == 0:
                begun, ended = stage.turn("warm", f"turn {number}")
                asked = stage.asked_by("warm")[-1]
                warms.append(ended - begun)
                enters.append(asked.came_at - begun)
            else:
                alone = bare.warm_turn(asked.last_user_text)
                bares.append(alone["ended_at"] - alone["begun_at"])
                bare_enters.append(stage.model.turns[-1].came_at - alone["begun_at"])
    yield figure("turn_warm", _median(colds) / _median(warms), "times faster than cold", "bare", digits=1)
    yield _milliseconds("turn_warm_whole", warms, "bare, one process", bares)
    more = (_median(enters) - _median(bare_enters)) * 1e3
    yield figure("enter_to_model", more, "ms more than bare", digits=2)
    yield _milliseconds("enter_to_model_whole", enters, "bare, one process", bare_enters)


def _claude() -> Path:
    claude = find_claude()
    assert claude is not None
    return claude


def _median(seconds: list[float]) -> float:
    """Without the first, which begins the session or the process."""
    return statistics.median(seconds[1:])


def _milliseconds(name: str, ours: list[float], peer: str, theirs: list[float]) -> dict[str, Any]:
    return figure(name, _median(ours) * 1e3, "ms", peer, _median(theirs) * 1e3, digits=2)


def wake_tokens() -> Iterator[dict[str, Any]]:
    say("wake_tokens: what the first request holds more than bare's, with the message's body alone")
    with open_stage() as stage:
        stage.turn("hm1nd", "Please get the login module reviewed.")
        stage.welcome("iris")
        for agent, name in (("iris", "wake_tokens"), ("hm1nd", "wake_tokens_manager")):
            first = stage.asked_by(agent)[0]
            seat = bare_seat(agent, _claude(), stage.port)
            settings: Any = {**stage.settings(agent), "prompt": ""}
            alone = _without_servers(flags(seat, settings))
            with open_bare(stage.daemon, f"bare-{agent}", seat, alone) as bare:
                bare.cold_turn(_body_of(first))
            peer = stage.model.turns[-1]
            added = {part: (size(first, part) - size(peer, part)) / 4 for part in ("system", "tools", "messages")}
            say(f"{agent}: {json.dumps(added)}")
            yield figure(name, sum(added.values()), "tokens of 4 characters", "bare", _whole(peer) / 4, digits=0)


def _body_of(request: Request) -> str:
    wake = parse_wake(request.last_user_text)
    assert wake is not None, request.last_user_text
    return wake.body


def _without_servers(given: list[str]) -> list[str]:
    at = given.index("--mcp-config")
    return given[:at] + given[at + 2 :]


def size(request: Request, part: str) -> int:
    """How many characters a part of a request has."""
    return len(json.dumps(unmarked(request.body[part]), ensure_ascii=False))


def _whole(request: Request) -> int:
    return sum(size(request, part) for part in ("system", "tools", "messages"))


def prefix_kept() -> Iterator[dict[str, Any]]:
    say("prefix_kept: sessions of turns with calls of tools, in one process, in one each, and in one for two")
    ways: dict[str, dict[str, str | int]] = {"warm": {}, "cold": {"turns": "cold"}, "both": {"warm_turns": 2}}
    with open_stage() as stage:
        for agent, settings in ways.items():
            stage.welcome(agent, **settings)
        for number in range(6):
            for agent in ways:
                stage.turn(agent, f"work {number}")
        yield _kept("prefix_kept", {agent: stage.asked_by(agent) for agent in ways})
        # The status of a repository that is the working directory stands in the program's system prompt.
        before = {agent: len(stage.asked_by(agent)) for agent in ways}
        for agent in ways:
            stage.turn(agent, "begin a repository")
        for number in range(6):
            for agent in ways:
                stage.turn(agent, f"work {number}")
        yield _kept("prefix_kept_repository", {agent: stage.asked_by(agent)[before[agent] :] for agent in ways})


def _kept(name: str, sessions: dict[str, list[Request]]) -> dict[str, Any]:
    kept = []
    for agent, requests in sessions.items():
        assert len({request.headers["x-claude-code-session-id"] for request in requests}) == 1
        for before, after in itertools.pairwise(requests):
            changed = difference(before, after)
            kept.append(changed is None)
            if changed:
                say(f"{agent}: {changed}")
    return figure(name, sum(kept) / len(kept), f"share of {len(kept)} requests")


def difference(before: Request, after: Request) -> str | None:
    """What of a request is not the beginning of the next one; None where all of it is."""
    for part in ("tools", "system", "messages"):
        old, new = unmarked(before.body[part]), unmarked(after.body[part])
        if part != "messages" and len(old) != len(new):
            return f"{part}: {len(old)} pieces, then {len(new)}"
        for number, (left, right) in enumerate(itertools.zip_longest(map(json.dumps, old), map(json.dumps, new))):
            if left is not None and left != right:
                return f"{part} {number}: {_around_first_difference(left, right or '')}"
    return None


def _around_first_difference(old: str, new: str) -> str:
    at = next((at for at, (left, right) in enumerate(zip(old, new, strict=False)) if left != right), len(new))
    return f"after {at} characters …{old[max(0, at - 40) : at + 60]}… became …{new[max(0, at - 40) : at + 60]}…"


def unmarked(value: Any) -> Any:
    """Without the marks of the cache. A text that bears one stands in a block, and by itself else: the same to it."""
    if isinstance(value, dict):
        rest = {key: unmarked(each) for key, each in value.items() if key != "cache_control"}
        if "role" in rest and isinstance(rest.get("content"), str):
            rest["content"] = [{"type": "text", "text": rest["content"]}]
        return rest
    return [unmarked(each) for each in value] if isinstance(value, list) else value


def idle_calls() -> dict[str, Any]:
    say(f"idle_calls: requests of {IDLE_AGENTS} agents in {IDLE_S} s after their turns")
    with open_stage() as stage:
        stage.welcome(*(f"agent{number}" for number in range(IDLE_AGENTS)))
        before = len(stage.model.requests)
        time.sleep(IDLE_S)
        calls = len(stage.model.requests) - before
    return figure("idle_calls", calls, f"calls in {IDLE_S} s", digits=0)


def harness_rss() -> Iterator[dict[str, Any]]:
    say(f"harness_rss: {HARNESSES} harnesses that have taken no turn, for {IDLE_S} s")
    with open_daemon("--default-program=rehearsal", "--end-agents-with-daemon") as daemon:
        client = daemon.start()
        spawn(client, HARNESSES)
        all_idle(client, HARNESSES + 1)
        names = [f"agent{number}" for number in range(HARNESSES)]
        # Another harness of each, for which no mail waits.
        for name in names:
            client.call("kill", agent=name)
        for name in names:
            client.call("start", agent=name)
        all_idle(client, HARNESSES + 1)
        pids = [_harness_of(daemon, name) for name in names]
        time.sleep(2)
        begun = sum(map(cpu_s, pids))
        assert begun > 0, "this kernel does not count what a process uses"
        time.sleep(IDLE_S)
        used = sum(map(cpu_s, pids)) - begun
        sizes = [rss_mb(pid) for pid in pids]
        private = [_private_mb(pid) for pid in pids]
    yield figure("harness_rss", statistics.median(sizes), "MB", digits=1)
    yield figure("harness_private", statistics.median(private), "MB", digits=1)
    yield figure("harness_cpu", used / IDLE_S * 100, f"% of a core, {HARNESSES} together", digits=4)


def _harness_of(daemon: Daemon, name: str) -> int:
    """The pid of an agent's harness: process 1 of its sandbox, the child of bwrap."""
    bwrap = int(json.loads((daemon.state / "processes" / f"{name}.json").read_text())["pid"])
    (harness,) = children_of(bwrap)
    return harness


def _private_mb(pid: int) -> float:
    """What no other process shares with it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
