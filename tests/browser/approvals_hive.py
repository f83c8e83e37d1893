"""A hive with cards to decide, one of 500 files among them, and who clicks: `python -m tests.browser.approvals_hive
FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import trio

from hive_core.effects import Effect, Line
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.approvals import Approval, Request, Shown, put_request
from tests.checkouts import Checkout
from tests.dashboards import gate_open, hive_of, served
from tests.hives import Services, open_services
from tests.needs import ROOT

IRIS = AgentName("iris")
WITHIN_S = 400.0  # on a machine with other things to do


class Slow:
    """A kind of change that goes on when somebody writes into a pipe."""

    def __init__(self, pipe: Path) -> None:
        self._pipe = pipe
        os.mkfifo(pipe)

    def title(self, approval: Approval) -> str:
        return "something slow"

    async def show_now(self, approval: Approval) -> Shown:
        return Shown(approval.payload, approval.effect)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        await step("building")
        await trio.to_thread.run_sync(self._pipe.read_text)
        await step("proving")
        return Done(lambda tx: None, "healthy")

    async def closed(self, approval: Approval) -> None:
        pass


async def ask(hive: Services, pipe: Path) -> None:
    """Three new agents; one that is there gets a commit of 500 files; and a change that takes its time."""
    first = await hive.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader")
    async with gate_open(hive_of(hive)):
        card = await hive.approvals.get(first["approval"])
        await hive.gate.approve(card.id, card.digest, OPERATOR)
    for name in ("argus", "damocles"):
        await hive.gate.spawn.request(MANAGER, AgentName(name), f"You are {name}.", "we need eyes")
    config = Checkout(hive.repos.proposed_dir / IRIS / "config")
    (config.path / "skills").mkdir()
    for number in range(498):
        text = "".join(f"line {line} of skill {number}\n" for line in range(40))
        (config.path / "skills" / f"{number:03}.md").write_text(text)
    toml = 'program = "rehearsal"\nmodel = "opus"\ntools = ["Bash", "WebFetch"]\n'
    sha = config.commit(agent__toml=toml, CLAUDE__md="You read.\nHidden: \u202egnp.exe\n")
    await hive.gate.apply_commit.request(MANAGER, IRIS, sha, "500 files of skills")
    hive.gate.kinds = {**hive.gate.kinds, "slow": Slow(pipe)}
    shown = Shown({}, Effect([Line("inputs", "nixpkgs 1", "nixpkgs 2")], ["closure: not built yet"]).to_wire())
    request = Request("slow", IRIS, MANAGER, "takes its time", shown)
    await hive.store.write(lambda tx: put_request(tx, request, 3600.0))


async def main(folder: Path) -> None:
    async with open_services(folder) as hive:
        await hive.gate.ensure_manager("You manage.")
        await ask(hive, folder / "pipe")
        ours = hive_of(hive)
        async with gate_open(ours), served(ours) as browser:
            ours.dashboard_port = browser.port
            pipe = str(folder / "pipe")
            command = [sys.executable, "-m", "tests.browser.approvals_clicks", ours.sign_in_url(), pipe]
            with trio.fail_after(WITHIN_S):
                await trio.run_process(command, cwd=ROOT)
                await hive.approvals.wait_settled(4)
        states = {row.id: row.state for row in await hive.approvals.recent()}
        assert states == {1: "done", 2: "done", 3: "done", 4: "done", 5: "done"}


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
