from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hive_core.lock import take_lock
from hive_core.protocol.refusal import Refusal
from tests.needs import ROOT

HOLDER = """
import sys, time
from pathlib import Path
from hive_core.lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_daemon_is_refused_and_the_first_is_named_until_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refusal, match=rf"a daemon \(pid {holder.pid}\) runs on it; `hive down` ends it") as caught:
            take_lock(folder)
        assert caught.value.code == "conflict"
        holder.send_signal(signal.SIGKILL)
    os.close(take_lock(folder))


def test_a_state_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    os.close(take_lock(tmp_path / "new" / "state"))
    assert (tmp_path / "new" / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "state" / "daemon.lock").stat().st_mode & 0o777 == 0o600


def test_a_lock_is_not_handed_on_to_children(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
        os.close(lock)
        os.close(take_lock(tmp_path))
        assert child.stdin is not None
        child.stdin.close()
