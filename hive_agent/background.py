"""Work that outlives a turn: commands that the harness runs for its agent, and of whose end it tells the host.

    the program ── run_in_background ──▶ bridge ── its socket ──▶ here ── begun, ended ──▶ host ── a message ──▶ a turn

In the folder `background` of the agent's state each has its output, ID.log, and until the host knows of its end a
record, ID.json: with that the next harness says what was cut off when this one died. The agent can write there: what
is read of it is a claim, as all that a harness says.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from hive_agent.background_record import Record, cut_off_works
from hive_agent.background_tool import socket_name
from hive_agent.descendants import end_session, spare
from hive_agent.reports import Reports
from hive_core.protocol.harness import BACKGROUND_AT_ONCE, BACKGROUND_NOTE_LIMIT, BACKGROUND_S
from hive_core.protocol.lines import LineSplitter, decode, encode
from hive_core.protocol.refusal import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Lease

SHELL = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024
LOGS_KEPT = 50
READ_BYTES = 64 * 1024
POLITE_S = 5.0  # from SIGTERM to SIGKILL
DRAIN_S = 1.0
ASK_WITHIN_S = 10.0
COMMAND_LIMIT_BYTES = 64 * 1024
PEER = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid


class Background:
    """Whoever makes one serves it: then it ends, and with it all that runs."""

    def __init__(self, state_dir: str, reports: Reports, *, own_network: bool = True) -> None:
        """own_network: else others see abstract sockets, and may connect to one: it is in a folder of its own then."""
        name = f"hive-{secrets.token_hex(16)}"
        self._place = None if own_network else Path(os.environ.get("TMPDIR", "/tmp"), name)
        self.address = name if self._place is None else str(self._place / "socket")
        self._state_dir = state_dir
        self._folder = Path(state_dir) / "background"
        self._reports = reports
        self._running: set[str] = set()
        self._turn: int | None = None
        self._limit_s = float(BACKGROUND_S)
        self._nursery: trio.Nursery

    def begin_turn(self, lease: Lease) -> None:
        """What is begun from now on belongs to that turn."""
        self._turn = lease["turn"]
        self._limit_s = float(lease["settings"].get("background_s", BACKGROUND_S))

    def end_turn(self) -> None:
        self._turn = None

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take commands until cancelled."""
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock, self._made_place():
            await sock.bind(socket_name(self.address))
            sock.listen()
            self._tell_what_was_cut_off()
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                while True:
                    peer, _ = await sock.accept()
                    self._nursery.start_soon(self._answer, trio.SocketStream(peer))

    @contextlib.contextmanager
    def _made_place(self) -> Iterator[None]:
        if self._place is None:
            yield
            return
        self._place.mkdir(mode=0o700)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                Path(self.address).unlink()
                self._place.rmdir()

    def _tell_what_was_cut_off(self) -> None:
        for record in cut_off_works(self._folder):
            self._reports.add(record.as_form(), record.remove)
        # What has no record any more: the host knows of it, and nothing runs now.
        self._reports.add({"op": "background", "state": "none"})

    async def _answer(self, stream: trio.SocketStream) -> None:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            async with stream:
                with trio.move_on_after(ASK_WITHIN_S):
                    try:
                        request = await _read_request(stream)
                        _check_user(stream)
                        answer = await self._begin(request.get("arguments"), request.get("env"))
                    except Refusal as refusal:
                        answer = {"error": refusal.message}
                    await stream.send_all(encode(answer))

    async def _begin(self, arguments: object, env: object) -> dict[str, Any]:
        """Start a command. Raises Refusal."""
        command, note = _parsed(arguments)
        if (turn := self._turn) is None:
            raise Refusal("refused", "cannot run in the background: no turn runs")
        if len(self._running) >= BACKGROUND_AT_ONCE:
            most = f"{BACKGROUND_AT_ONCE} commands of yours run, which is the limit"
            raise Refusal("refused", f"cannot run in the background: {most}; wait for one, or end one")
        work = secrets.token_hex(4)
        output = self._folder / f"{work}.log"
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            self._forget_old_logs()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            log = os.open(output, flags, 0o600)
            self._running.add(work)
            try:
                process = await self._start(command, env)
            except BaseException:
                self._running.discard(work)
                os.close(log)
                raise
        except OSError as exc:
            raise Refusal("failed", f"cannot run in the background: {exc}") from None
        record = Record(self._folder, work, turn, command, note, process.pid)
        record.write()
        self._reports.add(record.as_form())
        self._nursery.start_soon(self._run, record, process, log, self._limit_s)
        return {"work": work, "output": str(output), "group": process.pid}

    async def _start(self, command: str, env: object) -> trio.Process:
        given = {str(key): str(value) for key, value in env.items()} if isinstance(env, dict) else {}
        try:
            process = await trio.lowlevel.open_process(
                [SHELL, "-c", command],
                env=given,
                cwd=self._state_dir,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except ValueError:
            raise Refusal("usage", "cannot run in the background: the command or its environment holds a NUL") from None
        spare(process.pid)
        return process

    async def _run(self, record: Record, process: trio.Process, log: int, limit_s: float) -> None:
        """Keep what a command prints until it has ended, or has to; then tell of its end."""
        timed_out, began = False, trio.current_time()
        try:
            with trio.move_on_after(limit_s) as limit:
                await _listen(process, log)
            if timed_out := limit.cancelled_caught:
                _signal_group(process, signal.SIGTERM)
                with trio.move_on_after(POLITE_S):
                    await _listen(process, log)
        finally:
            _signal_group(process, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
                await end_session(process.pid)  # what the command left running ends with it
                assert process.stdout is not None
                await process.stdout.aclose()
            os.close(log)
            self._running.discard(record.work)
        record.end("timed_out" if timed_out else "ended", process.returncode, trio.current_time() - began)
        self._reports.add(record.as_form(), record.remove)

    def _forget_old_logs(self) -> None:
        logs = [path for path in self._folder.glob("*.log") if path.stem not in self._running]
        with contextlib.suppress(OSError):
            logs.sort(key=lambda path: path.lstat().st_mtime_ns)
            for path in logs[: max(0, len(logs) - LOGS_KEPT)]:
                path.unlink(missing_ok=True)


async def _listen(process: trio.Process, log: int) -> None:
    """Copy what a command prints into its log, up to the bound, until it has ended."""
    assert process.stdout is not None
    write = _bounded(log)
    with trio.CancelScope() as pipe:

        async def copy(stdout: trio.abc.ReceiveStream) -> None:
            while data := await stdout.receive_some(READ_BYTES):
                write(bytes(data))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, process.stdout)
            await process.wait()
            # What it left running may hold the pipe open for ever.
            pipe.deadline = trio.current_time() + DRAIN_S


def _bounded(log: int) -> Callable[[bytes], None]:
    """Write to a log as far as its bound and its disk go. The last line says where it was cut."""
    room = OUTPUT_LIMIT_BYTES - os.fstat(log).st_size

    def write(data: bytes) -> None:
        nonlocal room
        if room <= 0:
            return
        over, data = len(data) > room, data[:room]
        room -= len(data)
        if over:
            room = 0
            data += f"\n[cut here: the limit is {OUTPUT_LIMIT_BYTES:,} bytes]\n".encode()
        try:
            os.write(log, data)
        except OSError:
            room = 0  # a full disk: what comes later would stand behind a gap

    return write


def _signal_group(process: trio.Process, number: int) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _parsed(arguments: object) -> tuple[str, str]:
    given = arguments if isinstance(arguments, dict) else {}
    command, note = given.get("command"), given.get("note", "")
    if (
        not isinstance(command, str)
        or not command.strip()
        or len(command.encode("utf-8", "replace")) > (COMMAND_LIMIT_BYTES)
    ):
        what = f"`command` must be text of at most {COMMAND_LIMIT_BYTES:,} bytes"
        raise Refusal("usage", f"cannot run in the background: {what}")
    if not isinstance(note, str) or len(note) > BACKGROUND_NOTE_LIMIT:
        what = f"`note` must be text of at most {BACKGROUND_NOTE_LIMIT} characters"
        raise Refusal("usage", f"cannot run in the background: {what}")
    return command, note


def _check_user(stream: trio.SocketStream) -> None:
    """Where no sandbox is around us, every user of the machine sees the socket's name, and may connect."""
    told = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    if PEER.unpack(told)[1] != os.getuid():
        raise Refusal("refused", "cannot run in the background: this is only for its own user")


async def _read_request(stream: trio.SocketStream) -> dict[str, Any]:
    splitter = LineSplitter()
    while data := await stream.receive_some(READ_BYTES):
        for line in splitter.feed(bytes(data)):
            if isinstance(line, Refusal):
                raise line
            return decode(line)
    raise Refusal("usage", "cannot run in the background: the request has no end")
