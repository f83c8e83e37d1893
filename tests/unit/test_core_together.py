"""Several cards approved by one click, on the page and on the command line, each with its own end; and one that takes
its time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from dashboard import approvals
from hive_core.procedures.kinds.kind import Done, Step
from hive_core.procedures.together import TOGETHER_LIMIT, Click
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.services.approvals import Approval, Request, Shown, put_request
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import browse, gate_open, hive_of, served
from tests.hives import PATIENCE_S, Services, approve_by_hash, run_hive, serve, wait_until
from tests.unit.test_dashboard_forms import post


class Slow:
    """A kind of change that takes until it is let go, telling each step; it fails where its agent is damocles."""

    def __init__(self) -> None:
        self.go_on = trio.Event()

    def title(self, approval: Approval) -> str:
        return f"something slow for {approval.agent}"

    async def show_now(self, approval: Approval) -> Shown:
        return Shown(approval.payload, approval.effect)

    async def carry_out(self, approval: Approval, step: Step) -> Done:
        await step("building")
        await self.go_on.wait()
        if approval.agent == "damocles":
            raise Refusal("failed", "cannot build damocles: the disk is full; make room")
        await step("proving")
        return Done(lambda tx: None, "healthy")

    async def closed(self, approval: Approval) -> None:
        pass


@pytest.fixture
async def slow(hive: Services) -> Slow:
    kind = Slow()
    hive.gate.kinds = {**hive.gate.kinds, "slow": kind}
    return kind


async def ask(hive: Services, *names: str, kind: str = "slow") -> list[Click]:
    """A card for each of these agents, as it is shown."""
    clicks = []
    for name in names:
        request = Request(kind, AgentName(name), MANAGER, "because", Shown({"sha": name}, {"lines": [], "unknown": []}))
        number = await hive.store.write(lambda tx, request=request: put_request(tx, request, 60.0))  # type: ignore[misc]
        clicks.append(Click(number, (await hive.approvals.get(number)).digest))
    return clicks


def steps_of(hive: Services, number: int, *steps: str) -> Callable[[], Any]:
    async def look() -> bool:
        return (await hive.approvals.get(number)).step in steps

    return look


async def test_a_click_that_takes_long_is_answered_after_its_patience_and_goes_on(hive: Services, slow: Slow) -> None:
    ((number, digest),) = await ask(hive, "iris")
    async with gate_open(hive_of(hive)):
        now = await hive.gate.approve(number, digest, OPERATOR, patience_s=0.0)
        assert now.state == "approved"
        await wait_until(hive.store, steps_of(hive, number, "building"))
        slow.go_on.set()
        done = await hive.gate.approve(number, digest, OPERATOR)
    assert (done.state, done.proof, done.step) == ("done", "healthy", None)


async def test_the_page_answers_at_once_and_its_row_says_how_far_it_is(
    hive: Services, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "PATIENCE_S", 0.0)
    ((number, digest),) = await ask(hive, "iris")
    ours = hive_of(hive)
    seq = await hive.store.last_seq()
    async with gate_open(ours), browse(ours) as client, served(ours) as browser:
        status, said = await post(client, f"/approvals/{number}/approve", digest=digest)
        assert (status, said["said"]) == (200, "approved, and under way: slow iris")
        async with browser.stream(f"/live?after={hive.at(seq)}") as stream:
            row = (await stream.until(f"decision-{number}"))[-1].data["html"]
            while "building" not in row:
                row = (await stream.until(f"decision-{number}"))[-1].data["html"]
            assert "under way" in row
            slow.go_on.set()
            while "healthy" not in row:
                row = (await stream.until(f"decision-{number}"))[-1].data["html"]
    assert "approved" in row
    assert "by operator, the dashboard" in row


async def test_chosen_cards_are_approved_together_and_each_has_its_own_line(hive: Services, slow: Slow) -> None:
    one, two, three = await ask(hive, "iris", "damocles", "hm1nd")
    slow.go_on.set()
    ours = hive_of(hive)
    chosen = {f"choose-{one.approval_id}": one.digest, f"choose-{two.approval_id}": two.digest}
    async with gate_open(ours), browse(ours) as client:
        status, said = await post(client, "/approvals/together", **chosen, **{f"choose-{three.approval_id}": "0" * 64})
        assert status == 200
        assert said["said"].split("\n") == [
            f"{one.approval_id}: approved: slow iris",
            f"{two.approval_id}: failed: slow damocles: cannot build damocles: the disk is full; make room",
            f"{three.approval_id}: cannot approve {three.approval_id}: it is not what you were shown; look at it again"
            " and approve that",
        ]
        assert (await hive.approvals.get(three.approval_id)).state == "pending"
        status, said = await post(client, "/approvals/together", **{f"choose-{three.approval_id}": "0" * 64})
        assert (status, said["error"]["code"]) == (409, "conflict")
        assert (await post(client, "/approvals/together", other="1"))[0] == 400


async def test_only_cards_of_one_kind_and_each_once_are_approved_together(hive: Services, slow: Slow) -> None:
    (one,), (other,) = await ask(hive, "iris"), await ask(hive, "iris", kind="spawn")
    together = hive_of(hive).together
    for clicks, words in (
        ([], "none is chosen"),
        ([one, one], "one is there twice"),
        ([one, other], f"{one.approval_id} is of the kind slow and {other.approval_id} of the kind spawn"),
        ([one] * (TOGETHER_LIMIT + 1), "100 is the limit"),
    ):
        with pytest.raises(Refusal, match=words):
            await together.approve(clicks, OPERATOR)
    with pytest.raises(Refusal, match="cannot find approval 99"):
        await together.approve([Click(99, "x")], OPERATOR)
    assert len(await hive.approvals.pending()) == 2


async def test_hive_approve_tells_what_it_approves_each_step_and_each_end(
    hive: Services, slow: Slow, tmp_path: Path
) -> None:
    one, two = await ask(hive, "iris", "damocles")
    ours = hive_of(hive)
    done = []
    async with serve(tmp_path / "host.sock", AdminDesk(ours).serve), gate_open(ours), trio.open_nursery() as nursery:

        async def approve() -> None:
            done.append(await approve_by_hash(tmp_path, one.approval_id, two.approval_id))

        nursery.start_soon(approve)
        await wait_until(hive.store, steps_of(hive, one.approval_id, "building"))
        slow.go_on.set()
    (ran,) = done
    said = ran.stdout.decode()
    assert ran.returncode == 1, said + ran.stderr.decode()
    assert said.startswith(f"◆ {one.approval_id} slow iris: because\n  effect\n")
    steps = re.findall(r"\d\d:\d\d:\d\d (approval .*)", said)
    mine = [f"approval {one.approval_id} of iris: building", f"approval {one.approval_id} of iris: proving"]
    # Two agents' are carried out beside each other: the steps of each are told in their order.
    assert [step for step in steps if "iris" in step] == mine
    assert [step for step in steps if "iris" not in step] == [f"approval {two.approval_id} of damocles: building"]
    assert f"approval {one.approval_id} of iris: done (healthy)\n" in said
    assert f"approval {two.approval_id} of damocles: failed: cannot build damocles: the disk is full" in said

    async with serve(tmp_path / "host.sock", AdminDesk(ours).serve), trio.open_nursery():
        ran = await run_hive(tmp_path, "--json", "approve", str(one.approval_id))
        assert (ran.returncode, json.loads(ran.stdout)["state"]) == (0, "done")
        ran = await run_hive(tmp_path, "approve", str(two.approval_id), "--digest", "0" * 64)
        assert (ran.returncode, b"not what you were shown" in ran.stderr) == (4, True)
        ran = await run_hive(tmp_path, "approve", "1", "2", "--digest", "0" * 64)
        assert ran.returncode == 2
        ran = await run_hive(tmp_path, "show", str(one.approval_id))
        assert "proof: healthy" in ran.stdout.decode()
        assert "approved, and done by operator from host.sock, uid" in ran.stdout.decode()


async def test_a_client_that_hangs_up_stops_nothing_that_it_approved(
    hive: Services, slow: Slow, tmp_path: Path
) -> None:
    ((number, digest),) = await ask(hive, "iris")
    ours = hive_of(hive)
    with trio.fail_after(PATIENCE_S):
        async with serve(tmp_path / "host.sock", AdminDesk(ours).serve) as door, gate_open(ours):
            stream = await trio.open_unix_socket(door)
            line = {"v": 1, "verb": "approve_all", "args": {"approvals": [[number, digest]]}}
            await stream.send_all(json.dumps(line).encode() + b"\n")
            await wait_until(hive.store, steps_of(hive, number, "building"))
            await stream.aclose()
            slow.go_on.set()
            assert (await hive.approvals.wait_settled(number)).state == "done"
