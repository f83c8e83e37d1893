"""Commands in the background as the harness runs them: real processes, with the test as bridge and as host."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from hive_agent import background, background_tool
from hive_agent.background import LOGS_KEPT, Background
from hive_agent.reports import Reports
from hive_core.protocol.harness import BACKGROUND_AT_ONCE, BACKGROUND_NOTE_LIMIT, BACKGROUND_TAIL_LIMIT
from hive_core.protocol.refusal import Refusal
from tests.harness_host import a_lease
from tests.processes import PATIENCE_S, PROGRAMS, look_until

PATH = {"PATH": PROGRAMS}


class Told:
    """The host as `Reports` sees it."""

    def __init__(self) -> None:
        self.forms: list[dict[str, Any]] = []
        self.refusals: list[Refusal] = []
        self._came = trio.Event()

    async def tell(self, form: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)
        self.forms.append(form)
        self._came.set()
        return {"ok": True}

    async def of(self, work: str, state: str) -> dict[str, Any]:
        """What is told of a work with that state; waits for it."""
        while True:
            for form in self.forms:
                if (form.get("work"), form["state"]) == (work, state):
                    return form
            self._came = trio.Event()
            await self._came.wait()


class Bench:
    def __init__(self, folder: Path, told: Told, own_network: bool = True) -> None:
        self.folder, self.told = folder / "background", told
        self.reports = Reports()
        self.background = Background(str(folder), self.reports, own_network=own_network)

    def begin_turn(self, number: int = 1, **settings: Any) -> None:
        self.background.begin_turn(cast("Any", a_lease(number, **settings)))

    async def call(self, command: object, **more: object) -> dict[str, Any]:
        """What the bridge gets; its refusal comes as {"error"}."""
        request = {"arguments": {"command": command, **more}, "env": PATH}
        return await trio.to_thread.run_sync(background_tool._ask, self.background.address, request)


@asynccontextmanager
async def a_bench(folder: Path, told: Told | None = None, own_network: bool = True) -> AsyncIterator[Bench]:
    bench = Bench(folder, told or Told(), own_network)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.reports.serve, bench.told)
        await nursery.start(bench.background.serve)
        bench.begin_turn()
        with trio.fail_after(PATIENCE_S):
            yield bench
        nursery.cancel_scope.cancel()


async def test_a_command_is_told_when_it_begins_and_with_its_output_when_it_ends(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        answer = await bench.call("pwd; echo over >&2; exit 7", note="look around")
        begun = await bench.told.of(answer["work"], "running")
        assert (begun["turn"], begun["command"], begun["note"]) == (1, "pwd; echo over >&2; exit 7", "look around")
        ended = await bench.told.of(answer["work"], "ended")
        assert (ended["code"], ended["tail"]) == (7, f"{tmp_path}\nover")
        assert 0 <= ended["took_ms"] < PATIENCE_S * 1000
        assert Path(answer["output"]).read_text() == f"{tmp_path}\nover\n"
        assert Path(answer["output"]).stat().st_mode & 0o777 == 0o600
        await trio.testing.wait_all_tasks_blocked()
        assert list(bench.folder.glob("*.json")) == []


async def test_its_group_can_be_stopped_by_the_number_that_the_tool_gave(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        answer = await bench.call("sleep 600 & sleep 600")
        os.killpg(answer["group"], signal.SIGTERM)
        assert (await bench.told.of(answer["work"], "ended"))["code"] == -signal.SIGTERM


async def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        answer = await bench.call("trap '' TERM; sleep 600 >/dev/null 2>&1 & echo $!")
        ended = await bench.told.of(answer["work"], "ended")
        with pytest.raises(ProcessLookupError):
            os.kill(int(ended["tail"]), 0)


async def test_output_over_its_bound_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "OUTPUT_LIMIT_BYTES", 1000)
    async with a_bench(tmp_path) as bench:
        answer = await bench.call("for i in 1 2 3 4; do head -c 400 /dev/zero | tr '\\0' x; done; exit 2")
        ended = await bench.told.of(answer["work"], "ended")
        text = Path(answer["output"]).read_text()
    assert text == "x" * 1000 + "\n[cut here: the limit is 1,000 bytes]\n"
    assert (ended["code"], len(ended["tail"]) <= BACKGROUND_TAIL_LIMIT) == (2, True)


async def test_one_that_runs_for_too_long_is_ended_politely_then_by_force(
    tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with a_bench(tmp_path) as bench:
        bench.begin_turn(background_s=3)
        answer = await bench.call("trap 'echo asked' TERM; echo on; while :; do sleep 0.1; done")
        await trio.to_thread.run_sync(look_until, lambda: Path(answer["output"]).read_text() == "on\n")
        mock_clock.jump(3)
        await trio.to_thread.run_sync(look_until, lambda: "asked" in Path(answer["output"]).read_text())
        mock_clock.jump(5)
        mock_clock.autojump_threshold = 0.05
        ended = await bench.told.of(answer["work"], "timed_out")
    assert ended["code"] == -signal.SIGKILL
    assert 8000 <= ended["took_ms"] < 20_000


async def test_only_so_many_run_at_once(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        for _ in range(BACKGROUND_AT_ONCE):
            assert "work" in await bench.call("sleep 600")
        refused = await bench.call("true")
        assert refused == {
            "error": f"cannot run in the background: {BACKGROUND_AT_ONCE} commands of yours run, which is the limit; "
            "wait for one, or end one"
        }


async def test_nothing_is_begun_outside_a_turn(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        bench.background.end_turn()
        assert await bench.call("true") == {"error": "cannot run in the background: no turn runs"}
        assert not bench.folder.exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"command": 7}, "`command` must be text"),
        ({"command": "  "}, "`command` must be text"),
        ({"command": "x" * 70_000}, "`command` must be text of at most 65,536 bytes"),
        ({"command": "true", "note": "x" * (BACKGROUND_NOTE_LIMIT + 1)}, "`note` must be text"),
        ({"command": "true", "note": 1}, "`note` must be text"),
        ({"command": "true \0"}, "holds a NUL"),
    ],
)
async def test_a_call_that_makes_no_sense_is_refused_and_leaves_nothing(
    tmp_path: Path, given: dict[str, Any], why: str
) -> None:
    async with a_bench(tmp_path) as bench:
        assert why in (await bench.call(**given))["error"]
        await trio.testing.wait_all_tasks_blocked()
        assert [form["state"] for form in bench.told.forms] == ["none"]


async def test_what_the_harness_before_left_is_told_as_cut_off_and_its_end_if_it_had_one(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        runs = await bench.call("echo so far; sleep 600")
        await trio.to_thread.run_sync(look_until, lambda: Path(runs["output"]).read_text())
        ends = await bench.call("exit 4", note="soon over")
        bench.told.refusals += [Refusal("unavailable", "no room")]
        await trio.to_thread.run_sync(
            look_until, lambda: '"ended"' in (bench.folder / f"{ends['work']}.json").read_text()
        )
    told = Told()
    async with a_bench(tmp_path, told) as bench:
        cut = await told.of(runs["work"], "cut_off")
        assert (cut["tail"], cut["code"], cut["took_ms"]) == ("so far", None, None)
        assert ((await told.of(ends["work"], "ended"))["code"]) == 4
        await trio.testing.wait_all_tasks_blocked()
        assert told.forms[-1] == {"op": "background", "state": "none"}
        assert list(bench.folder.glob("*.json")) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(runs["group"], 0)


async def test_a_record_that_somebody_forged_is_removed_and_harms_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    (folder / "a1.json").write_text("{" * 100_000)
    (folder / "a2.json").write_text('{"turn": 1}')
    (folder / "a3.json").symlink_to("/etc/passwd")
    (folder / "a4.json").mkdir()
    os.mkfifo(folder / "a5.json")
    keys = {
        "turn": "x",
        "command": 7,
        "note": [],
        "pid": -1,
        "started": {},
        "state": "running",
        "code": "",
        "took_ms": 1,
    }
    (folder / "a6.json").write_text(json.dumps(keys))
    told = Told()
    async with a_bench(tmp_path, told):
        assert (await told.of("a6", "cut_off"))["command"] == 7
        await trio.testing.wait_all_tasks_blocked()
        assert [form.get("work") for form in told.forms] == ["a6", None]
    assert Path("/etc/passwd").exists()


async def test_what_the_host_cannot_take_now_is_told_again_and_what_it_refuses_is_not(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    told = Told()
    told.refusals = [Refusal("unavailable", "later"), Refusal("unavailable", "later"), Refusal("usage", "never")]
    reports = Reports()
    done: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reports.serve, cast("Any", told))
        for name in ("one", "two", "never"):
            reports.add({"op": "background", "work": name, "state": name}, lambda name=name: done.append(name))  # type: ignore[misc]
        with trio.fail_after(100):
            await told.of("two", "two")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert done == ["never", "one", "two"]
    assert [form["state"] for form in told.forms] == ["one", "two"]


class FullFor(Told):
    """A host that has no room for one work, ever."""

    async def tell(self, form: dict[str, Any]) -> dict[str, Any]:
        if form.get("work") == "a1":
            raise Refusal("unavailable", "there is no room")
        return await super().tell(form)


async def test_an_end_that_the_host_has_no_room_for_holds_up_no_other(autojump_clock: trio.testing.MockClock) -> None:
    reports, told = Reports(), FullFor()
    for work in ("a1", "b2"):
        reports.add({"op": "background", "work": work, "state": "ended"})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reports.serve, cast("Any", told))
        with trio.fail_after(60):
            await told.of("b2", "ended")
        nursery.cancel_scope.cancel()


async def test_old_logs_go_and_those_of_what_runs_stay(tmp_path: Path) -> None:
    folder = tmp_path / "background"
    folder.mkdir()
    for number in range(LOGS_KEPT + 10):
        (folder / f"{number:03}.log").touch()
        os.utime(folder / f"{number:03}.log", ns=(number, number))
    async with a_bench(tmp_path) as bench:
        answer = await bench.call("sleep 600")
        left = sorted(path.stem for path in folder.glob("*.log"))
        assert left == sorted([*(f"{number:03}" for number in range(10, LOGS_KEPT + 10)), answer["work"]])


async def test_who_shares_a_network_has_no_socket_that_others_see_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:  # a socket's path has no room for a test's own
        monkeypatch.setenv("TMPDIR", folder)
        async with a_bench(tmp_path, own_network=False) as bench:
            (place,) = Path(folder).iterdir()
            assert (bench.background.address, place.stat().st_mode & 0o777) == (f"{place}/socket", 0o700)
            assert f"@{place.name}" not in Path("/proc/net/unix").read_text()
            answer = await bench.call("echo done")
            assert (await bench.told.of(answer["work"], "ended"))["tail"] == "done"
        assert list(Path(folder).iterdir()) == []


ASK_AS_NOBODY = """
import json, os, socket, sys
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as harness:
    harness.connect("\\0" + sys.argv[1])
    harness.sendall(json.dumps({"arguments": {"command": "id"}, "env": {}}).encode() + b"\\n")
    sys.stdout.write(harness.recv(65536).decode())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
async def test_another_user_of_the_machine_runs_nothing_by_the_sockets_name_that_everybody_sees(tmp_path: Path) -> None:
    async with a_bench(tmp_path) as bench:
        command = [sys.executable, "-c", ASK_AS_NOBODY, bench.background.address]
        answer = await trio.run_process(command, capture_stdout=True)
        assert "only for its own user" in json.loads(answer.stdout)["error"]
        assert not bench.folder.exists()
