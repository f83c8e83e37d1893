"""Runs the groups of tests/groups.toml that this machine can run: `python -m tests.run [GROUP ...]`.

One pytest per group, in as many processes as the table says. The last line is `N passed, N failed, N skipped`; the
exit code is 1 if a test failed, a group collected nothing, or, with HIVE_REQUIRE=ci, a group whose home is ci was left
out or skipped every test.

Tests run beside others on a machine that may be busy with more. Up to UNSTEADY_AT_MOST failures of a whole run are
therefore tried again, alone, TRIES_ALONE times: those that pass each time are named as unsteady at the end, below the
full report of their failure, and do not fail the run. They want to be understood like any other failure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from tests import needs
from tests.compiled import compile_packages

UNSTEADY_AT_MOST = 2
TRIES_ALONE = 3


@dataclass(frozen=True)
class Group:
    name: str
    paths: list[str]
    needs: list[str]
    home: str
    share_s: float
    processes: int = 1
    whole_files: bool = False


@dataclass(frozen=True)
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    unsteady: tuple[str, ...] = ()
    """Node ids of tests that failed and then passed alone; they are among the passed."""

    def __add__(self, other: Counts) -> Counts:
        sums = (self.passed + other.passed, self.failed + other.failed, self.skipped + other.skipped)
        return Counts(*sums, self.unsteady + other.unsteady)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"

    @property
    def total(self) -> int:
        return self.passed + self.failed + self.skipped


def load_groups(table: Path) -> list[Group]:
    return [Group(**entry) for entry in tomllib.loads(table.read_text())["group"]]


def load_homes(table: Path) -> dict[str, str]:
    """Where groups have to run, and what each such place is."""
    homes: dict[str, str] = tomllib.loads(table.read_text())["homes"]
    return homes


def read_counts(report: Path) -> Counts:
    """The counts of a pytest report in JUnit form: an expected failure passed, an error failed."""
    passed = failed = skipped = 0
    for case in ET.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif skip is not None and skip.get("type") != "pytest.xfail":
            skipped += 1
        else:
            passed += 1
    return Counts(passed, failed, skipped)


def _environment(group: Group) -> dict[str, str]:
    """Only the group that is meant to spend money sees the keys, and no test is told how make was called.

    What is compiled is kept, wherever we run: else each of many hundred processes compiles our modules anew.
    """
    hidden = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHONDONTWRITEBYTECODE"}
    if "account" not in group.needs:
        hidden.update(needs.ACCOUNT_KEYS)
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _run_pytest(group: Group, root: Path, scratch: Path, what: Sequence[str]) -> tuple[int, Counts]:
    """One pytest whose output is ours: its exit code, and what it reported."""
    report = scratch / "report.xml"
    report.unlink(missing_ok=True)
    # A test that hangs shows where, instead of nothing. Not one that is long by intent: the stacks are read while they
    # move, and a month in virtual time was ended by that (a fault of CPython 3.11).
    hangs_after_s = 0 if os.environ.get("HIVE_LONG") == "1" else 300
    options = [
        "-o",
        f"faulthandler_timeout={hangs_after_s}",
        "-o",
        f"cache_dir={scratch / 'cache'}",
        f"--junitxml={report}",
    ]
    pytest = subprocess.Popen([sys.executable, "-m", "pytest", *options, *what], cwd=root, env=_environment(group))
    try:
        code = pytest.wait()
    except BaseException as stop:
        # Interrupted, not killed: the fixtures have daemons to take down. A Ctrl-C has reached pytest by itself,
        # and a second one would cut that short.
        if not isinstance(stop, KeyboardInterrupt):
            pytest.send_signal(signal.SIGINT)
        try:
            pytest.wait(60)
        except subprocess.TimeoutExpired:
            pytest.kill()
        raise
    return code, read_counts(report) if report.exists() else Counts()


def _pass_alone(group: Group, root: Path, scratch: Path, tests: Sequence[str]) -> bool:
    print(f"{group.name}: once more, alone: {', '.join(tests)}", flush=True)
    every_one = (0, Counts(passed=len(tests)))
    return all(_run_pytest(group, root, scratch, tests) == every_one for _ in range(TRIES_ALONE))


def run_group(group: Group, root: Path, may_be_unsteady: int = 0) -> Counts:
    """One pytest, in as many processes as the group wants; up to `may_be_unsteady` failures are tried again alone."""
    paths = [path for path in group.paths if (root / path).exists()]
    if not paths:
        return Counts()
    spread = []
    if group.processes > 1:
        spread = [f"--numprocesses={group.processes}", f"--dist={'loadfile' if group.whole_files else 'worksteal'}"]
    with tempfile.TemporaryDirectory(prefix="hive-tests-") as folder:
        scratch = Path(folder)
        code, counts = _run_pytest(group, root, scratch, [*spread, *paths])
        if code == 1 and counts.failed <= may_be_unsteady:
            failed = sorted(json.loads((scratch / "cache" / "v" / "cache" / "lastfailed").read_text()))
            if len(failed) == counts.failed and _pass_alone(group, root, scratch, failed):
                return Counts(counts.passed + counts.failed, 0, counts.skipped, tuple(failed))
    # 0: all well; 1: tests failed; 5: nothing collected. Anything else is pytest itself in trouble.
    if code not in (0, 1, 5) and not counts.failed:
        counts += Counts(failed=1)
    return counts


def problems(ran: Sequence[tuple[Group, Counts]], left_out: Sequence[Group], require: str) -> list[str]:
    """What makes the run fail, a sentence each."""
    found = []
    for group, counts in ran:
        if counts.failed:
            found.append(f"{group.name} failed")
        if not counts.total:
            found.append(f"{group.name} collected nothing: no test in {', '.join(group.paths)}")
        elif require and group.home == require and counts.skipped == counts.total:
            found.append(
                f"{group.name} skipped every test, and HIVE_REQUIRE={require} wants every group of {require} to run"
            )
    found += [
        f"{group.name} was left out, and HIVE_REQUIRE={require} wants every group of {require} to run"
        for group in left_out
        if require and group.home == require
    ]
    return found


def check_home(require: str, homes: Mapping[str, str]) -> None:
    """A run that requires what no group has for a home would require nothing."""
    if require and require not in homes:
        sys.exit(f"no such home: {require}; HIVE_REQUIRE is one of {', '.join(homes)}, or empty")


def choose(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    known = [group.name for group in groups]
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no such group: {', '.join(unknown)}; there are {', '.join(known)}")
    return [group for group in groups if not names or group.name in names]


def run(groups: Sequence[Group], root: Path, require: str = "", homes: Mapping[str, str] | None = None) -> int:
    reasons = {group.name: [why for need in group.needs if (why := needs.missing(need))] for group in groups}
    can_run = [group for group in groups if not reasons[group.name]]
    left_out = [group for group in groups if reasons[group.name]]
    ran: list[tuple[Group, Counts]] = []
    for position, group in enumerate(can_run, 1):
        # Flushed, because pytest writes to the same place on its own.
        print(f"\n[{position}/{len(can_run)}] {group.name}", flush=True)
        begun = time.monotonic()
        counts = run_group(group, root, UNSTEADY_AT_MOST - sum(len(each.unsteady) for _, each in ran))
        took_s = time.monotonic() - begun
        over = ", over it" if took_s > group.share_s else ""
        print(f"{group.name}: {counts}; {took_s:.1f} s, its share is {group.share_s:g} s{over}", flush=True)
        ran.append((group, counts))
    print()
    for group in left_out:
        home = (homes or {}).get(group.home, group.home)
        print(f"left out: {group.name} (home: {home}): {'; '.join(reasons[group.name])}")
    found = problems(ran, left_out, require)
    for problem in found:
        print(f"not well: {problem}")
    total = sum((counts for _, counts in ran), Counts())
    for test in total.unsteady:
        print(f"unsteady: {test} failed beside others and passed {TRIES_ALONE} times alone; its report is above")
    print(total, flush=True)
    return 1 if found else 0


def _stop(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(names: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, _stop)
    # Who starts us in the background may have had SIGINT ignored, and pytest would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    table = needs.ROOT / "tests" / "groups.toml"
    groups, homes = load_groups(table), load_homes(table)
    require = os.environ.get("HIVE_REQUIRE", "")
    check_home(require, homes)
    chosen = choose(groups, names)
    compile_packages()
    try:
        return run(chosen, needs.ROOT, require, homes)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
