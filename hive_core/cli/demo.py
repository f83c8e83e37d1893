"""`hive demo`: a whole hive in a temporary directory, with rehearsed agents, playing one story."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from hive_core.cli import show, show_approvals, story
from hive_core.cli.client import Client
from hive_core.cli.up import start_daemon
from hive_core.protocol.ends import how_ended
from hive_core.protocol.paths import check_socket_room
from hive_core.protocol.refusal import Refusal

ONCE_WITHIN_S = 180.0
STOP_WITHIN_S = 10.0


def demo(*, once: bool, deny: bool, as_json: bool) -> int:
    """Play the story; with `once` approve (or deny) by itself, end, and exit 0 when it came to its end."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="hive-demo-"))
    alive, ours = os.pipe()
    # Ctrl-C and a polite kill end the demo the same way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stage = _Stage(folder, once=once, deny=deny, quiet=as_json)
    daemon: subprocess.Popen[bytes] | None = None
    try:
        _check_room(folder)
        stage.say(f"starting a hive in {folder}")
        daemon = _start(folder, alive)
        result = stage.play()
        result["seconds"] = round(time.monotonic() - began, 2)
        if as_json:
            print(json.dumps(result), flush=True)
        if not once:
            stage.stay()
        return 0 if result["ok"] else 1
    except KeyboardInterrupt:
        return 0 if not once else 130
    finally:
        os.close(ours)
        if daemon is not None:
            with contextlib.suppress(OSError):  # the reader may have gone away
                stage.say("ending the demo and all its agents")
            _end(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _check_room(folder: Path) -> None:
    try:
        check_socket_room(str(folder / "run"))
    except Refusal:
        # The settings that it speaks of are not the demo's to take.
        raise Refusal(
            "usage", f"cannot play in {folder}: the path is too long for sockets; set TMPDIR to a shorter one"
        ) from None


def _environment() -> dict[str, str]:
    """The caller's, without settings meant for a hive of its own."""
    return {key: value for key, value in os.environ.items() if not key.startswith("HIVE_")} | {
        "XDG_CONFIG_HOME": "/nonexistent"
    }


def _start(folder: Path, alive: int) -> subprocess.Popen[bytes]:
    """The daemon, on the usual ports if they are free now and when it takes them."""
    usual = _free(7000) and _free(8000)
    for port in (7000, 0) if usual else (0,):
        try:
            return start_daemon(_flags(folder, alive, port), folder / "daemon.log", _environment(), pass_fds=[alive])
        except Refusal:
            if port == 0:
                raise
    raise AssertionError("the last port is 0")


def _flags(folder: Path, alive: int, port: int) -> list[str]:
    (folder / "hm1nd.md").write_text(story.HM1ND)
    values = {
        "state-dir": folder / "state",
        "runtime-dir": folder / "run",
        "default-program": "rehearsal",
        "manager-prompt": folder / "hm1nd.md",
        "dashboard-port": port,
        "life-fd": alive,
    }
    return ["--end-agents-with-daemon", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def _free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


class _Stage:
    """Speaks the operator's lines and tells what happens."""

    def __init__(self, folder: Path, *, once: bool, deny: bool, quiet: bool) -> None:
        self._runtime = str(folder / "run")
        self._once = once
        self._deny = deny
        self._out = sys.stderr if quiet else sys.stdout
        self._seen: set[int] = set()
        self._walks: set[int] = set()  # of those the commits, whose steps are told
        only = story.DENIED_ENDING if deny else story.ENDING
        self._endings = (only,) if once else (story.ENDING, story.DENIED_ENDING, story.KEPT_ENDING)
        self._operator: Client

    def say(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def play(self) -> dict[str, Any]:
        self._operator = Client(self._runtime)
        self.say(f"sign in: {show.paint(self._operator.call('dashboard')['url'], 'amber')}\n")
        for name, persona in story.SEEDS.items():
            asked = self._operator.call("request_spawn", agent=name, persona=persona, reason="The demo begins with it.")
            self._approve(asked["approval"])
            self._seen.add(asked["approval"])
        self._operator.call("send", to="hm1nd", body=story.OPENING)
        watchdog = threading.Timer(ONCE_WITHIN_S, self._give_up)
        watchdog.daemon = True
        if self._once:
            watchdog.start()
        with contextlib.closing(Client(self._runtime)) as events:
            self._events = events
            try:
                ended = any(self._tell(event) for event in events.stream("events", follow=True, after=0))
            except Refusal:
                ended = False
        watchdog.cancel()
        return self._result(ended)

    def stay(self) -> None:
        self.say(
            "\nthe story is over; the hive stays until Ctrl-C. In another terminal:\n"
            f"  export HIVE_RUNTIME_DIR={self._runtime}\n  hive list; hive send iris 'who are you?'; hive inbox"
        )
        for event in Client(self._runtime).stream("events", follow=True):
            self._tell(event)

    def _give_up(self) -> None:
        self.say(f"the story did not come to its end within {ONCE_WITHIN_S:.0f} s; the log follows")
        self.say((Path(self._runtime).parent / "daemon.log").read_text()[-4000:])
        self._events.shut()

    def _result(self, ended: bool) -> dict[str, Any]:
        agents = self._operator.call("list")["agents"]
        approvals = [self._operator.call("show", approval=n + 1) for n in range(max(self._seen, default=0))]
        return {
            "ok": ended,
            "agents": [agent["name"] for agent in agents],
            "models": {agent["name"]: agent["model"] for agent in agents},
            "messages": len(self._operator.call("messages", limit=1000)["messages"]),
            "approvals": [
                {key: row[key] for key in ("id", "kind", "agent", "state", "proof", "note")} for row in approvals
            ],
        }

    def _tell(self, event: dict[str, Any]) -> bool:
        """Print one event, play the operator's part in it; True when it is the story's end."""
        match event["kind"]:
            case "message_sent":
                return self._tell_message(event["data"]["message"])
            case "approval_requested" if event["data"]["approval"] not in self._seen:
                self._tell_approval(event["data"]["approval"])
            case "approval_step" if event["data"]["approval"] in self._walks:
                self.say(show.paint(f"  ◆ approval {event['data']['approval']}: {event['data']['step']}", "dim"))
            case "approval_denied" | "approval_done" | "approval_failed":
                self._tell_end(event["data"]["approval"])
            case "agent_started":
                self.say(show.paint(f"  ▓ {event['agent']} runs", "green"))
            case "agent_ended" if not event["data"]["expected"]:
                self.say(show.paint(f"  ! {event['agent']} {how_ended(event['data']['code'])}", "red"))
            case _:
                pass
        return False

    def _tell_message(self, message_id: int) -> bool:
        row = self._operator.call("message", message=message_id)
        # Of a notice what happened is enough: its fields are told already, as the card and its end.
        body = row["body"].partition("\n")[0] if row["sender"] == "system" else row["body"]
        self.say(show.message({**row, "body": body}))
        return row["recipient"] == "operator" and any(ending in row["body"] for ending in self._endings)

    def _tell_approval(self, approval_id: int) -> None:
        self._seen.add(approval_id)
        approval = self._operator.call("show", approval=approval_id)
        if approval["kind"] == "apply_commit":
            self._walks.add(approval_id)
            self.say(show_approvals.approval(approval))
        else:
            self.say(show.approval_line(approval))
        if not self._once:
            self.say(
                show.paint("  waiting for your click: ◆ APPR0VE on the dashboard", "amber")
                + f", or HIVE_RUNTIME_DIR={self._runtime} hive approve {approval_id}"
            )
        elif self._deny and approval["kind"] == "spawn":
            self._operator.call("deny", approval=approval_id, reason=story.DENIAL)
        else:
            self._approve(approval_id)

    def _tell_end(self, approval_id: int) -> None:
        row = self._operator.call("show", approval=approval_id)
        why = row["note"] or row["proof"]
        colour = "red" if row["state"] == "failed" else "amber"
        self.say(
            show.paint(f"  ◆ approval {approval_id}: {row['state']}{': ' + show.safe(why) if why else ''}", colour)
        )

    def _approve(self, approval_id: int) -> None:
        digest = self._operator.call("show", approval=approval_id)["digest"]
        self._operator.call("approve", approval=approval_id, digest=digest)
