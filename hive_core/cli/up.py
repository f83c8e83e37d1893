"""`hive up` and `hive down`: a daemon in the background, without a service manager."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hive_core.cli import show
from hive_core.cli.client import Client
from hive_core.programs import how_to_get_claude
from hive_core.protocol.paths import explain, runtime_dir, state_dir
from hive_core.protocol.refusal import EXIT_CODES, Refusal

READY_WITHIN_S = 60.0
NAMED_MOST = 5  # agents in one sentence

SANDBOXES = {"bwrap": "bubblewrap", "nspawn": "systemd-nspawn", "nixos-container": "NixOS containers"}


def start_daemon(
    flags: list[str],
    log: Path,
    environment: dict[str, str] | None = None,
    start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start `hive-core serve` and return once it says that it is ready. Raises Refusal with its own last words."""
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log.touch(mode=0o600)
        output = log.open("ab")
    except OSError as exc:
        why = explain(exc, "state_dir (HIVE_STATE_DIR)")
        raise Refusal("failed", f"cannot write the daemon's log {log}: {why}") from None
    with (
        output,
        tempfile.TemporaryDirectory(prefix="hive-") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear,
    ):
        try:
            ear.bind(f"{folder}/notify")
        except OSError as exc:
            why = explain(exc, "TMPDIR")
            raise Refusal("failed", f"cannot listen for the daemon's start in {folder}: {why}") from None
        begin = output.tell()
        process = start(
            [sys.executable, "-P", "-m", "hive_core", "serve", *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**(os.environ if environment is None else environment), "NOTIFY_SOCKET": f"{folder}/notify"},
            start_new_session=True,
            **popen,
        )
        try:
            ready = _wait_ready(process, ear)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if not ready:
            process.kill()
            raise _last_words(process.wait(), log.read_bytes()[begin:].decode("utf-8", "replace").strip())
    return process


def _wait_ready(process: subprocess.Popen[bytes], ear: socket.socket) -> bool:
    """Whether the daemon said READY, rather than ended or kept silent for too long."""
    exited = os.pidfd_open(process.pid)
    try:
        ready, _, _ = select.select([ear.fileno(), exited], [], [], READY_WITHIN_S)
    finally:
        os.close(exited)
    return ear.fileno() in ready


def _last_words(code: int, log: str) -> Refusal:
    """Why the daemon did not start: its own sentence, or the end of what it printed."""
    kind = next((name for name, exit_code in EXIT_CODES.items() if exit_code == code), "failed")
    last = log.splitlines()[-1] if log else f"it ended with code {code}"
    if last.startswith("hive-core: "):
        return Refusal(kind, last.removeprefix("hive-core: "))
    return Refusal(kind, f"cannot start the hive: {log[-2000:] or last}")


def up(*, as_json: bool, unsafe_no_sandbox: bool) -> int:
    """Start the daemon unless one answers; say what it found, what is missing, and how to sign in."""
    started = False
    try:
        client = Client()
    except Refusal as refusal:
        if refusal.code != "not_running":
            raise
        flags = ["--unsafe-no-sandbox"] if unsafe_no_sandbox else []
        try:
            start_daemon(flags, Path(state_dir()) / "daemon.log")
            client, started = Client(), True
        except Refusal as refused:
            # Somebody else's `hive up` may have been quicker.
            try:
                client = Client()
            except Refusal:
                raise refused from None
    status = client.call("status")
    link = client.call("dashboard")["url"]
    if as_json:
        print(json.dumps({**status, "started": started, "url": link}))
        return 0
    print(f"the hive {'is up' if started else 'was up already'}, state in {status['state_dir']}")
    if unsafe_no_sandbox and not started and not status["unsafe"]:
        print(show.paint("--unsafe-no-sandbox counts only when the daemon starts: `hive down` first", "amber"))
    for line in findings(status):
        print(line)
    print(f"sign in: {link}")
    return 0


def findings(status: dict[str, Any]) -> list[str]:
    """What the daemon found to run agents with, a line each; what is missing says how to get it."""
    lines = []
    if status["sandbox"] != "none" and status["sandbox_trouble"]:
        why = f"{SANDBOXES[status['sandbox']]}, and no agent can be started now: {status['sandbox_trouble']}"
        lines.append(show.paint(f"sandbox: {why}", "amber"))
    elif status["sandbox"] != "none":
        lines.append(f"sandbox: {SANDBOXES[status['sandbox']]}")
        if status["sandbox_weakness"]:
            lines.append(show.paint(f"sandbox: {status['sandbox_weakness']}", "amber"))
    elif status["unsafe"]:
        lines.append(show.paint("sandbox: none (--unsafe-no-sandbox)", "red"))
    else:
        lines.append(show.paint(f"sandbox: {status['sandbox_trouble']}", "amber"))
    if status["claude"]:
        lines.append(f"claude: {status['claude']}")
    else:
        lines.append(show.paint(f"claude: {how_to_get_claude(status['claude_chosen'])}", "amber"))
    if status["credential"]:
        lines.append(f"credential: {status['credential']}")
    else:
        lines.append(show.paint(f"credential: {status['credential_missing']}", "amber"))
    return lines


def _wait_unlocked(runtime: str) -> None:
    """Return when no daemon holds the runtime directory: its lock ends with its process."""
    with contextlib.suppress(FileNotFoundError), open(f"{runtime}/daemon.lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)


def orphans() -> str:
    """What to say of agents that a killed daemon left; "" when none of them runs.

    Of an agent that runs, the status file is locked. A shared lock, taken for a moment, finds that out.
    """
    folder, names = Path(state_dir()) / "processes", []
    try:
        for entry in sorted(os.listdir(folder)):
            if entry.endswith(".status"):
                with (folder / entry).open("rb") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        names.append(entry.removesuffix(".status"))
    except FileNotFoundError:
        return ""
    except OSError:
        who = "agents of it may still run"
    else:
        if not names:
            return ""
        more = f" and {len(names) - NAMED_MOST} more" if len(names) > NAMED_MOST else ""
        who = f"agents of it still run ({', '.join(names[:NAMED_MOST])}{more})"
    return (
        f"But {who}: each ends its turn, and itself when no daemon came back for orphan_grace_s (600 s unless set "
        "otherwise); `hive up`, then `hive down`, ends them at once"
    )


def down(*, as_json: bool, patience_s: float | None) -> int:
    """Drain and end everything; return when the daemon is gone."""
    try:
        client = Client()
    except Refusal as refusal:
        if refusal.code == "not_running" and (more := orphans()):
            raise Refusal(refusal.code, f"{refusal.message}. {more}") from None
        raise
    ends: dict[str, str] = {}
    waiting: list[str] = []
    for step in client.stream("down", patience_s=patience_s):
        if "ends" in step:
            ends = step["ends"]
        elif step["waiting"] != waiting and not as_json:
            waiting = step["waiting"]
            if waiting:
                print(
                    f"waiting for {', '.join(waiting)} to finish {'its turn' if len(waiting) == 1 else 'their turns'}"
                )
    _wait_unlocked(runtime_dir())
    if as_json:
        print(json.dumps({"ok": True, "ends": ends}))
    else:
        forced = [name for name, end in ends.items() if end == "killed"]
        print("the hive is down" + (f"; ended by force: {', '.join(forced)}" if forced else ""))
    return 0
