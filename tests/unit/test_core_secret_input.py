"""How `hive` takes a secret from the operator."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from hive_core.cli.secret_input import read_secret
from hive_core.hive import Hive
from hive_core.protocol.refusal import Refusal
from hive_core.sockets.admin import AdminDesk
from tests.dashboards import hive_of
from tests.hives import PATIENCE_S, Services, serve
from tests.needs import ROOT

SECRET = "a-token-of-the-project-0123456789"


@pytest.fixture
def house(hive: Services) -> Hive:
    return hive_of(hive)


@pytest.mark.parametrize(
    "words",
    [
        ("project", "add", "site", "http://127.0.0.1:1/site.git", "--token", "-"),
        ("forge", "add", "site", "http://127.0.0.1:1", "ada/site", "--token", "-"),
        ("login", "--token"),
    ],
)
async def test_a_secret_that_is_typed_at_a_terminal_is_asked_for_and_not_shown(
    house: Hive, tmp_path: Path, words: tuple[str, ...]
) -> None:
    async with serve(tmp_path / "host.sock", AdminDesk(house).serve):
        asked, shown = await trio.to_thread.run_sync(type_at, tmp_path, words)
    assert asked == "token: "
    assert SECRET not in shown


def type_at(runtime: Path, words: tuple[str, ...]) -> tuple[str, str]:
    """What `hive` asks before anything is typed, and all that its terminal shows of what is typed then."""
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "hive_core.cli", *words],
        env={**os.environ, "HIVE_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)},
        stdin=its,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # without a terminal of its own, which would be asked instead
    )
    assert process.stderr is not None
    try:
        is_asked, _, _ = select.select([process.stderr], [], [], PATIENCE_S)
        asked = os.read(process.stderr.fileno(), 1000).decode() if is_asked else "nothing"
        os.write(ours, f"{SECRET}\n\x04".encode())
        process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        process.communicate()
        os.close(its)
    shown = b""
    try:
        while data := os.read(ours, 1000):
            shown += data
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    return asked, shown.decode()


def test_a_secret_of_a_file_is_read_and_one_that_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    assert read_secret("token", str(tmp_path / "token")) == f"{SECRET}\n"
    with pytest.raises(Refusal, match=r"cannot read the token: .*/nowhere: there is no such file"):
        read_secret("token", str(tmp_path / "nowhere"))
    with pytest.raises(Refusal, match="cannot read the key: "):
        read_secret("key", str(tmp_path))
