"""The runner of the groups: what it counts, what it lets pass, and what it calls a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests import needs
from tests.run import (
    TRIES_ALONE,
    UNSTEADY_AT_MOST,
    Counts,
    Group,
    check_home,
    choose,
    load_groups,
    load_homes,
    problems,
    run,
    run_group,
)

EVERY_OUTCOME = """
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("not today")

@pytest.mark.xfail
def test_fails_as_expected(): assert False

@pytest.fixture
def broken(): raise RuntimeError("no set-up")

def test_errors(broken): pass

@pytest.fixture
def untidy():
    yield
    raise RuntimeError("no tear-down")

def test_passes_and_errors_afterwards(untidy): pass
"""


def group(name: str, needs: list[str] | None = None, home: str = "ci") -> Group:
    return Group(name, [name], needs or [], home, share_s=60)


def write_group(root: Path, name: str, text: str) -> None:
    (root / name).mkdir()
    (root / name / f"test_{name}.py").write_text(text)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files written here need no plugin, and loading them is most of the time of such a run."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVE_TEST_ACCOUNT", raising=False)


def test_the_summary_line_is_exactly_three_counts() -> None:
    assert str(Counts(12, 0, 3)) == "12 passed, 0 failed, 3 skipped"


def test_an_expected_failure_counts_as_passed_and_an_error_as_failed(tmp_path: Path) -> None:
    write_group(tmp_path, "outcomes", EVERY_OUTCOME)
    assert run_group(group("outcomes"), tmp_path) == Counts(passed=2, failed=3, skipped=1)


def test_a_file_that_does_not_import_counts_as_a_failure(tmp_path: Path) -> None:
    write_group(tmp_path, "unreadable", "import nothing_of_that_name")
    assert run_group(group("unreadable"), tmp_path) == Counts(failed=1)


def test_a_pytest_that_dies_without_a_report_counts_as_a_failure(tmp_path: Path) -> None:
    write_group(tmp_path, "fatal", "import os\ndef test_dies(): os._exit(3)")
    assert run_group(group("fatal"), tmp_path) == Counts(failed=1)


def test_a_group_of_several_processes_is_counted_as_one_and_a_process_that_dies_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    spread = "import os\ndef test_spread(): assert os.environ['PYTEST_XDIST_WORKER_COUNT'] == '2'"
    write_group(tmp_path, "wide", f"{spread}\ndef test_dies(): os._exit(3)\ndef test_more(): pass")
    assert run_group(replace(group("wide"), processes=2), tmp_path) == Counts(passed=2, failed=1)


def test_files_that_go_to_one_process_each_are_not_torn_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    builds_on = "told = []\ndef test_first(): told.append(1)\n"
    builds_on += "".join(f"def test_{number}(): assert len(told) == 1\n" for number in range(20))
    write_group(tmp_path, "wide", builds_on)
    (tmp_path / "wide" / "test_other.py").write_text(builds_on)
    assert run_group(replace(group("wide"), processes=2, whole_files=True), tmp_path) == Counts(passed=42)


def test_a_run_ends_with_the_sum_of_its_groups(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_group(tmp_path, "one", "def test_a(): pass\ndef test_b(): pass")
    write_group(tmp_path, "two", "import pytest\ndef test_c(): pytest.skip()\ndef test_d(): pass")
    assert run([group("one"), group("two")], tmp_path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "[2/2] two" in lines
    assert lines[-1] == "3 passed, 0 failed, 1 skipped"


# Fails until it has been run as often as its number says.
FAILS_AT_FIRST = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("times", {times})
def test_starved(times):
    ran = Path(__file__).with_name(f"ran-{{times}}")
    ran.write_text(ran.read_text() + "." if ran.exists() else ".")
    assert len(ran.read_text()) > times
"""


def test_a_test_that_fails_beside_others_and_passes_three_times_alone_is_named_as_unsteady(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_group(tmp_path, "starved", FAILS_AT_FIRST.format(times=[0, 1]))
    write_group(tmp_path, "plain", "def test_a(): pass")
    assert run([group("starved"), group("plain")], tmp_path) == 0
    said = capfd.readouterr().out
    assert "assert 1 > 1" in said, "the report of its failure"
    assert len((tmp_path / "starved" / "ran-1").read_text()) == 1 + TRIES_ALONE
    assert len((tmp_path / "starved" / "ran-0").read_text()) == 1, "what passed is not run again"
    unsteady = "unsteady: starved/test_starved.py::test_starved[1] failed beside others and passed 3 times alone"
    assert unsteady in said
    assert said.splitlines()[-1] == "3 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("times", [2, TRIES_ALONE])
def test_a_test_that_fails_once_more_alone_has_failed(tmp_path: Path, times: int) -> None:
    write_group(tmp_path, "starved", FAILS_AT_FIRST.format(times=[times]))
    assert run_group(group("starved"), tmp_path, UNSTEADY_AT_MOST) == Counts(failed=1)


def test_one_more_than_may_be_unsteady_in_a_whole_run_fails_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_group(tmp_path, "first", FAILS_AT_FIRST.format(times=[1]))
    write_group(tmp_path, "second", FAILS_AT_FIRST.format(times=[*range(1, UNSTEADY_AT_MOST + 1)]))
    assert run([group("first"), group("second")], tmp_path) == 1
    assert (tmp_path / "second" / "ran-1").read_text() == ".", "nothing is tried again"
    said = capfd.readouterr().out
    assert "not well: second failed" in said
    assert said.count("unsteady: ") == 1


def test_a_group_that_collects_nothing_fails_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run([group("empty"), group("absent")], tmp_path) == 1
    said = capfd.readouterr().out
    assert "empty collected nothing" in said
    assert "absent collected nothing" in said
    assert said.splitlines()[-1] == "0 passed, 0 failed, 0 skipped"


@pytest.mark.usefixtures("no_account")
def test_a_group_is_left_out_with_the_reason_and_the_way_to_get_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_group(tmp_path, "plain", "def test_a(): pass")
    homes = {"ci": "the first machine"}
    assert run([group("plain"), group("paid", ["account"])], tmp_path, homes=homes) == 0
    said = capfd.readouterr().out
    assert "left out: paid (home: the first machine): it spends money" in said
    assert "HIVE_TEST_ACCOUNT=1" in said
    assert "[1/1] plain" in said


@pytest.mark.usefixtures("no_account")
def test_a_left_out_ci_group_fails_a_run_that_requires_ci(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_group(tmp_path, "plain", "def test_a(): pass")
    assert run([group("plain"), group("paid", ["account"])], tmp_path, require="ci") == 1
    lines = capfd.readouterr().out.splitlines()
    assert any("paid was left out" in line for line in lines)
    assert lines[-1] == "1 passed, 0 failed, 0 skipped"


def test_a_left_out_group_that_waits_for_another_host_fails_nothing() -> None:
    assert problems([], [group("paid", ["account"], home="account")], "ci") == []


def test_a_required_group_whose_tests_were_all_skipped_fails_the_run() -> None:
    skipped, some = Counts(skipped=3), Counts(passed=1, skipped=2)
    (said,) = problems([(group("plain"), skipped), (group("other"), some)], [], "ci")
    assert said == "plain skipped every test, and HIVE_REQUIRE=ci wants every group of ci to run"
    assert problems([(group("plain"), skipped)], [], "") == []
    assert problems([(group("paid", home="account"), skipped)], [], "ci") == []


def test_what_a_run_requires_is_a_home_of_the_table() -> None:
    homes = load_homes(TABLE)
    for require in ("", *homes):
        check_home(require, homes)
    with pytest.raises(SystemExit, match="no such home: CI; HIVE_REQUIRE is one of ci, nixos, nixpkgs"):
        check_home("CI", homes)


def test_a_run_that_requires_no_home_of_the_table_begins_nothing() -> None:
    command = [sys.executable, "-m", "tests.run", "lint"]
    environment = {**os.environ, "HIVE_REQUIRE": "yes"}
    done = subprocess.run(command, cwd=needs.ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("no such home: yes; ")


def test_only_the_group_that_spends_money_sees_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not a key")
    write_group(tmp_path, "looks", "import os\ndef test_key(): assert 'ANTHROPIC_API_KEY' not in os.environ")
    assert run_group(group("looks"), tmp_path) == Counts(passed=1)
    assert run_group(group("looks", ["account"]), tmp_path) == Counts(failed=1)


@pytest.mark.parametrize(("long", "hangs_after_s"), [("1", 0), ("", 300)])
def test_the_stacks_of_a_test_are_shown_when_it_hangs_and_not_of_one_that_is_meant_to_be_long(
    long: str, hangs_after_s: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_LONG", long)
    looks = f"def test_it(pytestconfig): assert float(pytestconfig.getini('faulthandler_timeout')) == {hangs_after_s}"
    write_group(tmp_path, "looks", looks)
    assert run_group(group("looks"), tmp_path) == Counts(passed=1)


def test_the_processes_of_a_group_keep_what_they_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    write_group(tmp_path, "looks", "import sys\ndef test_kept(): assert not sys.dont_write_bytecode")
    assert run_group(group("looks"), tmp_path) == Counts(passed=1)


def test_groups_are_chosen_by_name_in_the_order_of_the_table() -> None:
    table = [group("a"), group("b"), group("c")]
    assert [chosen.name for chosen in choose(table, ["c", "a"])] == ["a", "c"]
    with pytest.raises(SystemExit, match="no such group: d; there are a, b, c"):
        choose(table, ["d"])


TABLE = needs.ROOT / "tests" / "groups.toml"


def test_every_need_of_the_table_can_be_tried_and_what_no_group_needs_yet_is_a_home() -> None:
    needed = {need for entry in load_groups(TABLE) for need in entry.needs}
    assert needed <= set(needs.PROBES)
    assert set(needs.PROBES) - needed <= set(load_homes(TABLE))


def test_the_homes_are_ci_and_the_hosts_that_groups_wait_for() -> None:
    assert list(load_homes(TABLE)) == ["ci", "nixos", "nixpkgs", "cgroup2", "account", "forgejo"]


def test_a_group_lives_in_ci_or_waits_for_one_host_that_it_needs() -> None:
    homes = load_homes(TABLE)
    for entry in load_groups(TABLE):
        assert entry.home in homes, entry.name
        assert set(entry.needs) & set(homes) == ({entry.home} - {"ci"}), entry.name


def test_every_group_of_the_table_has_tests() -> None:
    for entry in load_groups(TABLE):
        assert all(list((needs.ROOT / path).rglob("test_*.py")) for path in entry.paths), entry.name


@pytest.mark.parametrize("home", ["nixos", "nixpkgs", "cgroup2", "account", "forgejo"])
def test_a_host_that_is_missing_is_told_in_one_line(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HIVE_TEST_ACCOUNT", "HIVE_TEST_NIXPKGS", "HIVE_TEST_FORGEJO"):
        monkeypatch.delenv(name, raising=False)
    why = needs.missing(home)
    assert why is None or ("\n" not in why and why)


def test_a_nixpkgs_is_given_by_its_path_and_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HIVE_TEST_NIXPKGS", raising=False)
    assert "HIVE_TEST_NIXPKGS=/path/to/nixpkgs" in (needs.missing("nixpkgs") or "")
    monkeypatch.setenv("HIVE_TEST_NIXPKGS", str(tmp_path))
    assert f"HIVE_TEST_NIXPKGS is {tmp_path}, and that is no nixpkgs" in (needs.missing("nixpkgs") or "")


def test_the_try_of_cgroup_v2_leaves_nothing_behind() -> None:
    def left() -> list[str]:
        # Other groups come and go meanwhile: os.walk passes over one that has just gone.
        names = (f"{path}/{name}" for path, folders, _ in os.walk("/sys/fs/cgroup") for name in folders)
        return [name for name in names if "/hive-test-" in name]

    before = left()
    needs.missing("cgroup2")
    assert left() == before
