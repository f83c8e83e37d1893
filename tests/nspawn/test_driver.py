"""What is the nspawn driver's own: where it works, and the uids of its agents."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hive_core.containers.mounts import AgentDirs
from hive_core.containers.nspawn import HOST_UIDS, UIDS, Found, NspawnDriver, look_for_nspawn
from hive_core.containers.ranges import pick_range
from hive_core.containers.running import Exit
from hive_core.protocol.words import AgentName
from tests.containers.drivers import IRIS, PATIENCE_S, base_of, dirs_in, end_all, run, started


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    end_all(tmp_path)


def test_it_works_here_and_a_look_leaves_nothing(tmp_path: Path) -> None:
    assert look_for_nspawn(tmp_path / "not" / "made", tmp_path, Path(sys.executable)) == Found()
    assert list(tmp_path.iterdir()) == []


def test_it_is_refused_to_a_daemon_that_is_not_root(tmp_path: Path) -> None:
    program = (
        f"import os, sys; sys.path = {sys.path!r}; from pathlib import Path\n"
        "from hive_core.containers.nspawn import look_for_nspawn\n"
        f"os.setuid(65534); print(look_for_nspawn(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), None).trouble)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "systemd-nspawn needs root: run the daemon as root, or set sandbox to bwrap\n"


def test_one_that_is_not_there_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    trouble = look_for_nspawn(tmp_path, tmp_path, None).trouble or ""
    assert trouble.startswith("systemd-nspawn is not installed: `apt-get install systemd-container`")


def write_program(folder: Path, script: str) -> None:
    (folder / "bin").mkdir()
    (folder / "bin" / "systemd-nspawn").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / "systemd-nspawn").chmod(0o755)


def test_one_that_fails_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_program(tmp_path, "echo 'Failed to move root directory: Operation not permitted' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    trouble = look_for_nspawn(tmp_path, tmp_path, None).trouble or ""
    assert "Failed to move root directory: Operation not permitted" in trouble
    assert trouble.endswith("set sandbox to bwrap")


def test_where_a_file_system_cannot_be_mounted_with_other_uids_agents_have_those_of_the_host_and_it_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = "Failed to change bind mount attributes: Invalid argument"
    refuse = f"case \"$*\" in *rootidmap*) echo '{said}' >&2; exit 1; esac"
    write_program(tmp_path, f'{refuse}\nexec {shutil.which("systemd-nspawn")} "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    found = look_for_nspawn(tmp_path, tmp_path, None)
    assert found.trouble is None
    assert said in (found.weakness or "")
    assert "ext4" in (found.weakness or "")


async def test_each_agent_has_a_range_of_uids_of_its_own_on_the_host(tmp_path: Path) -> None:
    async with started(tmp_path, "nspawn", "echo > STATE/ready; exec sleep 1000") as (_, running):
        first = running.ways.first_inside()
        assert os.stat(f"/proc/{first}").st_uid == pick_range("iris", ())
        assert Path(f"/proc/{first}/uid_map").read_text().split() == ["0", str(pick_range("iris", ())), str(UIDS)]


@pytest.mark.parametrize("kind", ["nspawn", HOST_UIDS])
async def test_no_process_of_an_agents_can_make_a_namespace_in_which_it_is_root(tmp_path: Path, kind: str) -> None:
    code, said = await run(tmp_path, kind, "unshare --user true; unshare --mount true")
    assert code != 0
    assert said.count("unshare failed") == 2


@pytest.mark.parametrize("kind", ["nspawn", HOST_UIDS])
async def test_nothing_tells_an_agent_of_the_hosts_devices_groups_and_names(tmp_path: Path, kind: str) -> None:
    look = "ls -A /sys /run/host /dev/net; cat /sys/fs/cgroup/memory/memory.limit_in_bytes; cat /proc/kmsg; ls /run"
    _, said = await run(tmp_path, kind, look)
    lines = said.splitlines()
    assert lines[:5] == ["/dev/net:", "", "/run/host:", "", "/sys:"]
    assert [line.rpartition(": ")[2] for line in lines[5:7]] == ["No such file or directory", "Permission denied"]
    assert lines[7:] == ["hive", "host"]


@pytest.fixture
def other_root(tmp_path: Path) -> Iterator[Path]:
    """A root directory whose /usr has what the host's has, and a file more."""
    usr, more = tmp_path / "root" / "usr", tmp_path / "more"
    usr.mkdir(parents=True)
    more.mkdir()
    (more / "of-this-root").touch()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={more}:/usr", usr], check=True)
    yield usr.parent
    subprocess.run(["umount", usr], check=True)


async def test_what_agents_see_of_usr_is_that_of_a_given_root_directory(tmp_path: Path, other_root: Path) -> None:
    driver = _Look(tmp_path, base_of=base_of, root=other_root, claude=None, orphan_grace_s=600)
    with trio.fail_after(PATIENCE_S):
        running = await driver.start(IRIS, dirs_in(tmp_path))
        assert await running.wait() == Exit(0)
    assert await driver.last_words(IRIS) == "/usr/of-this-root"
    assert look_for_nspawn(tmp_path, tmp_path, None, other_root) == Found()


class _Look(NspawnDriver):
    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        return ["/bin/sh", "-c", "ls /usr/of-this-root"]


class _Module(NspawnDriver):
    """In the place of the harness, another module: it prints how it was started."""

    def _command(self, name: AgentName, dirs: AgentDirs) -> list[str]:
        told = "import os, sys; print(*sorted(os.environ), sys.argv[1:3], os.getpid(), __name__, sys.flags.safe_path)"
        return [sys.executable, "-P", "-m", "timeit", "-n1", "-r1", told]


async def test_a_module_runs_in_the_interpreter_that_took_its_rights_away_as_in_one_of_its_own(tmp_path: Path) -> None:
    driver = _Module(tmp_path, base_of=base_of, claude=None, orphan_grace_s=600)
    with trio.fail_after(PATIENCE_S):
        running = await driver.start(IRIS, dirs_in(tmp_path))
        assert await running.wait() == Exit(0)
    said = (await driver.last_words(IRIS)).splitlines()[0]
    assert said == "HOME LANG PATH PYTHONPATH ['-n1', '-r1'] 1 __main__ True"
