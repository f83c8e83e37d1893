"""A real daemon in a process of its own, for tests and benchmarks; it and its agents end with the caller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hive_core.cli.client import Client
from hive_core.cli.up import start_daemon
from tests.control_groups import remove_groups
from tests.processes import children_of, pids_naming, wait_gone

WITHIN_S = 60.0
# With both, agents whose program is claude have their sockets and no harness: a client may speak for them.
KEY = "sk-ant-api03-of-a-test"
NO_CLAUDE = "--claude=/dev/null"


class Daemon:
    """`hive-core serve` on directories of its own. `client` is the operator.

    begin: what starts its process, as subprocess.Popen does.
    """

    begin: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen

    def __init__(self, folder: Path, *flags: str, **environment: str) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.runtime = folder / "run"
        self.log = folder / "daemon.log"
        self._flags = flags
        self._environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if not key.startswith(("HIVE_", "ANTHROPIC_", "CLAUDE_"))
            },
            "XDG_CONFIG_HOME": str(folder),
            **environment,
        }
        self.process: subprocess.Popen[bytes]
        self._clients: list[Client] = []
        self._alive, self._ours = os.pipe()

    def start(self, **environment: str) -> Client:
        """Start it, or start it again, this time with that besides; return once it is ready."""
        given = {**self._environment, **environment}
        self.process = start_daemon(self.flags(), self.log, given, self.begin, pass_fds=self.kept_fds())
        return self.client()

    def flags(self) -> list[str]:
        return [
            *("--state-dir", str(self.state), "--runtime-dir", str(self.runtime)),
            *("--dashboard-port", "0", "--life-fd", str(self._alive)),
            *self._flags,
        ]

    def kept_fds(self) -> list[int]:
        """Descriptors that `flags` speak of."""
        return [self._alive]

    def client(self) -> Client:
        client = Client(str(self.runtime))
        self._clients.append(client)
        return client

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(WITHIN_S)

    def events(self, client: Client, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> dict[str, Any]:
        """The first event after number `after` that is wanted; waits for it."""
        with contextlib.closing(self.client()) as stream:
            stream.give_up_after(WITHIN_S)
            for event in stream.stream("events", follow=True, after=after):
                if wanted(event):
                    return event
        raise AssertionError("the daemon ended its events")

    def wait_live(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first agent, as `list` shows it, that is as wanted; waits for it."""
        with contextlib.closing(self.client()) as stream:
            stream.give_up_after(WITHIN_S)
            for result in stream.stream("watch"):
                for agent in result["agents"]:
                    if wanted(agent):
                        return dict(agent)
        raise AssertionError("the daemon ended its watch")

    def wait_message(self, client: Client, text: str, recipient: str = "operator") -> dict[str, Any]:
        """The first message to `recipient` that contains `text`; waits for it."""

        def wanted(event: dict[str, Any]) -> bool:
            if event["kind"] != "message_sent" or event["agent"] != recipient:
                return False
            return text in client.call("message", message=event["data"]["message"])["body"]

        event = self.events(client, wanted)
        message: dict[str, Any] = client.call("message", message=event["data"]["message"])
        return message

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if getattr(self, "process", None) is not None and self.process.poll() is None:
            self.kill()
        # Agents may outlive their daemon, and so may a command that it had just run: what is left is ended by pid, and
        # with bwrap what it watched.
        left = [each for pid in pids_naming(str(self.folder)) for each in (*children_of(pid), pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_gone(*left)
        remove_groups(self.state)
        os.close(self._ours)
        os.close(self._alive)


@contextlib.contextmanager
def open_daemon(*flags: str, **environment: str) -> Iterator[Daemon]:
    """A daemon that is not started yet, in a short temporary directory (socket paths are limited)."""
    with tempfile.TemporaryDirectory(prefix="hive-t-") as folder:
        daemon = Daemon(Path(folder), *flags, **environment)
        try:
            yield daemon
        except BaseException:
            if daemon.log.exists():
                print(daemon.log.read_text()[-8000:])
            raise
        finally:
            daemon.close()
