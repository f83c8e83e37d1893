"""Group `approvals`: what a card and a click cost."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from hive_core.cli.client import Client
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName, CommitSha
from hive_core.services.approvals import Approval, Request, Shown, put_request
from hive_core.store.writer import Transaction
from tests import mending
from tests.bench.figures import figure, say
from tests.checkouts import Checkout
from tests.daemons import Daemon, open_daemon
from tests.dashboards import gate_open, hive_of
from tests.hives import Services, clean_environment, open_services
from tests.needs import missing

IRIS = AgentName("iris")
FEW, MANY = 10, 10_000
CLICKS = 300
ROUNDS = 9
CRASHES = 5
FILES = 500


def measure() -> Iterator[dict[str, Any]]:
    yield trio.run(approve_10k_old)
    yield trio.run(effect_500_files)
    yield approve_settings("process", "bwrap")
    if trouble := missing("nspawn"):
        say(f"approve_settings_nspawn is left out: {trouble}")
    else:
        yield approve_settings("nspawn", "nspawn")
    yield crash_to_card()


def approve_settings(name: str, sandbox: str) -> dict[str, Any]:
    say(
        f"approve_settings_{name}: from the click to the agent proven and idle on other settings, against its own start"
    )
    ours, bare = [], []
    with open_daemon("--default-program=rehearsal", f"--sandbox={sandbox}") as daemon:
        client = daemon.start()
        approve_card(client, client.call("request_spawn", agent=IRIS, persona="An agent.", reason="a measurement"))
        config = Checkout(daemon.state / "proposed" / IRIS / "config")
        for number in range(ROUNDS):
            sha = config.commit(agent__toml=f'program = "rehearsal"\nmodel = "model{number}"\n')
            asked = client.call("request_apply_commit", agent=IRIS, sha=sha, reason="a measurement")
            wait_idle(daemon)
            begin = time.perf_counter()
            assert approve_card(client, asked)["proof"] == "healthy"
            wait_idle(daemon)
            ours.append(time.perf_counter() - begin)
            client.call("kill", agent=IRIS)
            begin = time.perf_counter()
            client.call("start", agent=IRIS)
            wait_idle(daemon)
            bare.append(time.perf_counter() - begin)
    peer = "its start"
    return figure(f"approve_settings_{name}", statistics.median(ours), "s", peer, statistics.median(bare), digits=2)


def approve_card(client: Client, asked: dict[str, Any]) -> dict[str, Any]:
    digest = client.call("show", approval=asked["approval"])["digest"]
    done = dict(client.call("approve", approval=asked["approval"], digest=digest))
    assert done["state"] == "done", done["note"]
    return done


def wait_idle(daemon: Daemon) -> None:
    daemon.wait_live(lambda agent: agent["name"] == IRIS and agent["state"] == "idle")


def crash_to_card() -> dict[str, Any]:
    say("crash_to_card: from an agent's crash to the change that a scripted hm1nd asks for then, by their events")
    seconds = []
    for _ in range(CRASHES):
        with mending.open_mending() as daemon:
            seconds.append(mending.crash_to_card(daemon, mending.start(daemon))[1])
    return figure("crash_to_card", statistics.median(seconds), "s", digits=2)


class _Nothing:
    """A kind of change that is done at once: what is left is the gate itself."""

    def title(self, approval: Approval) -> str:
        return "nothing"

    async def show_now(self, approval: Approval) -> Shown:
        return Shown(approval.payload, approval.effect)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        return Done(lambda tx: None)

    async def closed(self, approval: Approval) -> None:
        pass


async def approve_10k_old() -> dict[str, Any]:
    say(f"approve_10k_old: {CLICKS} times asked for and approved, with {MANY:,} old approvals, against {FEW}")
    seconds: dict[int, list[float]] = {FEW: [], MANY: []}
    with tempfile.TemporaryDirectory(prefix="hive-b-") as few, tempfile.TemporaryDirectory(prefix="hive-b-") as many:
        async with open_services(Path(few)) as hive, open_services(Path(many)) as other:
            for services, count in ((hive, FEW), (other, MANY)):
                await _grow_old(services, count)
            async with gate_open(hive_of(hive)), gate_open(hive_of(other)):
                for number in range(CLICKS):  # in turn, so that both see the same machine
                    for services, count in ((hive, FEW), (other, MANY)):
                        seconds[count].append(await _approve_one(services, number))
    few_s, many_s = (statistics.median(seconds[count]) for count in (FEW, MANY))
    return figure("approve_10k_old", many_s * 1e3, "ms", f"with {FEW} old approvals", few_s * 1e3, digits=3)


async def _grow_old(hive: Services, count: int) -> None:
    """So many approvals of before, of all ends, and what was said of them."""
    await hive.add_agents(MANAGER, IRIS)
    hive.gate.kinds = {**hive.gate.kinds, "nothing": _Nothing()}
    ends = ("done", "done", "denied", "failed", "expired", "cancelled")
    columns = ("kind", "agent", "requested_by", "reason", "payload", "digest", "state")
    columns += ("requested_at_ms", "expires_at_ms", "resolved_at_ms")

    def write(tx: Transaction) -> None:
        rows = [
            ("nothing", IRIS, MANAGER, "old", '{"diff": "x"}', f"{number:064x}", ends[number % len(ends)], 1, 2, 2)
            for number in range(count)
        ]
        tx.insert("approvals", columns, rows)
        for number in range(count):
            tx.emit("approval_done", MANAGER, IRIS, approval=number + 1)

    await hive.store.write(write)


async def _approve_one(hive: Services, number: int) -> float:
    """Asked for, listed, looked at, approved, carried out."""
    begin = time.perf_counter()
    request = Request("nothing", IRIS, OPERATOR, "a change", Shown({"number": number}))
    asked = await hive.store.write(lambda tx: put_request(tx, request, 3600.0))
    (card,) = await hive.approvals.pending()
    done = await hive.gate.approve(asked, card.digest, OPERATOR)
    await hive.approvals.recent()
    assert done.state == "done"
    return time.perf_counter() - begin


async def effect_500_files() -> dict[str, Any]:
    say(f"effect_500_files: from the request to its card, {FILES} files of 40 lines that change, against `git diff`")
    ours, bare = [], []
    with tempfile.TemporaryDirectory(prefix="hive-b-") as folder:
        async with open_services(Path(folder)) as hive:
            await hive.gate.ensure_manager("You manage.")
            config = Checkout(hive.repos.proposed_dir / MANAGER / "config")
            await _apply(hive, _commit(config, 0))
            base = config.head()
            for number in range(1, ROUNDS + 1):
                config.git("reset", "-q", "--hard", base)
                config.git("gc", "--quiet")  # as git does by itself: what is new lies loose, what is old is packed
                sha = _commit(config, number)
                begin = time.perf_counter()
                asked = await hive.gate.apply_commit.request(OPERATOR, MANAGER, sha, "a change")
                card = await hive.approvals.get(asked["approval"])
                ours.append(time.perf_counter() - begin)
                assert card.effect is not None
                await hive.gate.deny(card.id, "the next one", OPERATOR)
                bare.append(_diff_seconds(hive.state_dir / "applied" / f"{MANAGER}.git", base, sha))
    peer = "git diff"
    return figure("effect_500_files", statistics.median(ours), "s", peer, statistics.median(bare), digits=3)


def _commit(config: Checkout, number: int) -> CommitSha:
    (config.path / "skills").mkdir(exist_ok=True)
    for file in range(FILES):
        text = "".join(
            f"line {line} of skill {file}, {number if line % 10 == 0 else 'as ever'}\n" for line in range(40)
        )
        (config.path / "skills" / f"{file:03}.md").write_text(text)
    return config.commit()


async def _apply(hive: Services, sha: CommitSha) -> None:
    asked = await hive.gate.apply_commit.request(OPERATOR, MANAGER, sha, "the files")
    async with gate_open(hive_of(hive)):
        card = await hive.approvals.get(asked["approval"])
        done = await hive.gate.approve(card.id, card.digest, OPERATOR)
    assert done.state == "done", done.note


def _diff_seconds(repository: Path, base: CommitSha, sha: CommitSha) -> float:
    begin = time.perf_counter()
    command = ["git", "--git-dir", str(repository), "diff", base, sha]
    subprocess.run(command, check=True, stdout=subprocess.PIPE, env=clean_environment())
    return time.perf_counter() - begin
