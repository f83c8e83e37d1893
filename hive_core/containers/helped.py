"""The driver of a daemon without privileges: it asks the helper, a process of root's, which has the real one.

Each request is a connection of its own (hive_core/helper/desk.py tells its form), so a helper that comes back is simply
there again. While it is away, and when it does not answer in time, each call raises Refusal("unavailable"); agents run
on. The end of one is seen here by the descriptor that came with its pid, whatever the helper does.
"""

from __future__ import annotations

import os
import socket
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import trio

from hive_core.containers.host_process import LINES_LIMIT_BYTES, LINES_MOST
from hive_core.containers.mounts import AgentDirs
from hive_core.containers.process import ProcessDriver
from hive_core.containers.run_command import OUTPUT_LIMIT_BYTES
from hive_core.containers.running import Done, Exit, Running, Usage
from hive_core.protocol.lines import decode, encode
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, shown

PATIENCE_S = 30.0
GREETING_PATIENCE_S = 2.0  # of somebody who only wants to know whether it is there
ANSWER_LIMIT_BYTES = 6 * max(OUTPUT_LIMIT_BYTES, LINES_LIMIT_BYTES) + 4096  # JSON may spell each byte with six
_ROOM = socket.CMSG_SPACE(4)
_WAY_OUT = "`systemctl start hyperhive-root`, or `hive-root serve` as root"


class Helper:
    """Asks the helper, and holds it to the same hive.

    sandbox: what it has to start agents in; None: whatever it has
    patience_s: of verbs that may take longer than others
    """

    def __init__(
        self,
        path: Path,
        state_dir: Path,
        runtime_dir: Path,
        sandbox: str | None = None,
        patience_s: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.path = path
        self._patience_s = patience_s
        self._same = {"state_dir": str(state_dir), "runtime_dir": str(runtime_dir)}
        self._same |= {"sandbox": sandbox} if sandbox else {}
        self._greeted = False

    async def greet(self, patience_s: float = PATIENCE_S) -> dict[str, Any]:
        """What the helper says of itself. Raises Refusal when it is away, or serves another hive."""
        told, _ = await self._ask({"verb": "hello"}, patience_s)
        for key, ours in self._same.items():
            if told.get(key) != ours:
                fix = "give both the same config.toml, and start both again"
                why = f"its {key} is {told.get(key)}, and the daemon's {ours}"
                raise Refusal("refused", f"cannot use the helper on {self.path}: {why}; {fix}")
        self._greeted = True
        return told

    async def ask(self, verb: str, name: AgentName, **measure: int | str) -> dict[str, Any]:
        """The answer. Raises Refusal: the helper's, or one that says why there is no answer."""
        return (await self.ask_for(verb, name, measure))[0]

    async def ask_for(
        self,
        verb: str,
        name: AgentName,
        measure: Mapping[str, Any] = MappingProxyType({}),
        patience_s: float | None = None,
    ) -> tuple[dict[str, Any], int | None]:
        """The same, with the descriptor that comes with a pid."""
        patience_s = patience_s or self._patience_s.get(verb, PATIENCE_S)
        if not self._greeted:
            await self.greet()
        try:
            return await self._ask({"verb": verb, "name": name, **measure}, patience_s)
        except Refusal as refusal:
            # The next one may be another.
            self._greeted = self._greeted and refusal.code != "unavailable"
            raise

    async def _ask(self, request: dict[str, Any], patience_s: float) -> tuple[dict[str, Any], int | None]:
        descriptors: list[int] = []
        try:
            with trio.fail_after(patience_s), trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                await sock.connect(str(self.path))
                line = await _converse(sock, encode(request), descriptors)
            answer = decode(line)
            if (error := answer.get("error")) is not None:
                raise Refusal.from_wire(error)
            return answer, descriptors.pop() if descriptors else None
        except OSError as exc:
            raise self._away(explain(OSError(exc.errno, exc.strerror)).partition(";")[0]) from None
        except trio.TooSlowError:
            raise self._away(f"it did not answer within {patience_s:g} s") from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _away(self, why: str) -> Refusal:
        return Refusal("unavailable", f"cannot reach the helper on {self.path}: {why}; {_WAY_OUT}")


async def helper_trouble(helper: Helper) -> str | None:
    """Why it starts no agents now, and what would mend that; None when it does."""
    try:
        told = await helper.greet(GREETING_PATIENCE_S)
    except Refusal as refusal:
        return refusal.message
    return None if told.get("trouble") is None else str(told["trouble"])


async def _converse(sock: trio.socket.SocketType, request: bytes, descriptors: list[int]) -> bytes:
    """Send a line and take one; what came with it is added to `descriptors`. Raises OSError."""
    while request:
        request = request[await sock.send(request) :]
    line = bytearray()
    while not line.endswith(b"\n"):
        piece, control, _, _ = await sock.recvmsg(64 << 10, _ROOM, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.append(int.from_bytes(data[:4], sys.byteorder))
        if not piece or len(line) > ANSWER_LIMIT_BYTES:
            raise ConnectionResetError(0, "it hung up")
        line += piece
    return bytes(line)


class RunningElsewhere(Running):
    """An agent whose wrapper is the helper's. What is asked of it is carried out by whoever waits for its end.

    descriptor: None for one that had ended before it could be shown
    """

    def __init__(
        self, helper: Helper, name: AgentName, pid: int, descriptor: int | None, unit: Mapping[str, str]
    ) -> None:
        self._helper = helper
        self._unit = unit
        self._name = name
        self._pid = pid
        self._descriptor = descriptor
        self._close = (lambda: None) if descriptor is None else weakref.finalize(self, os.close, descriptor)
        self._wanted: list[str] = []
        self._asked = trio.Event()
        self._ended = False

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def ended(self) -> bool:
        return self._ended

    def unit(self) -> Mapping[str, str]:
        return self._unit  # its wrapper is root's, of which a daemon without rights may see nothing

    async def wait(self) -> Exit:
        """Also raises Refusal, while the helper is away and something is to be asked of it; then wait again."""
        if not self._ended and self._descriptor is not None:
            async with trio.open_nursery() as nursery:
                refused: list[Refusal] = []
                descriptor = self._descriptor

                async def carry_out() -> None:
                    try:
                        await self._carry_out()
                    except Refusal as refusal:
                        refused.append(refusal)
                        nursery.cancel_scope.cancel()

                nursery.start_soon(carry_out)
                await trio.lowlevel.wait_readable(descriptor)
                nursery.cancel_scope.cancel()
            if refused:
                raise refused[0]
        code = (await self._helper.ask("exit", self._name)).get("code")
        if not self._ended:
            self._ended = True
            self._close()
        return Exit(code if isinstance(code, int) else None)

    async def _carry_out(self) -> None:
        while True:
            while self._wanted:
                await self._helper.ask(self._wanted[0], self._name)
                self._wanted.pop(0)
            self._asked = trio.Event()
            await self._asked.wait()

    def stop(self) -> None:
        self._want("stop")

    def kill(self) -> None:
        self._want("kill")

    def _want(self, verb: str) -> None:
        if not self._ended and verb not in self._wanted:
            self._wanted.append(verb)
            self._asked.set()


class HelpedDriver:
    """See the module. `leftover` finds what this daemon started when it had no helper."""

    def __init__(self, helper: Helper, sandbox: str, leftover: ProcessDriver) -> None:
        self.sandbox = sandbox
        self._helper = helper
        self._leftover = leftover

    async def generation(self, name: AgentName, dirs: AgentDirs) -> str:
        return str((await self._helper.ask("generation", name, **_network(dirs))).get("generation"))

    async def start(self, name: AgentName, dirs: AgentDirs) -> Running:
        """Start the agent's harness. Raises OSError when it cannot be started, or the agent runs already."""
        # A directory of the agent's may be on a disk that hangs: that holds up nobody else.
        await trio.to_thread.run_sync(dirs.make, limiter=trio.CapacityLimiter(1))
        try:
            answer, descriptor = await self._helper.ask_for("start", name, _network(dirs))
        except Refusal as refusal:
            if refusal.code == "unavailable":
                raise  # nobody knows whether it was started: whoever looks for it finds it
            if refusal.code == "conflict":
                raise BlockingIOError(refusal.message) from None
            raise OSError(refusal.message) from None
        # Nothing runs of what this daemon started itself. What it wrote down of that would tell the next one without
        # a helper that whatever runs of the agent is known.
        await self._leftover.destroy(name)
        return self._running(name, answer, descriptor)

    async def find(self, name: AgentName, dirs: AgentDirs) -> Running | None:
        await self._leftover.find(name, dirs)  # is of another sandbox than any: it is ended
        answer, descriptor = await self._helper.ask_for("find", name)
        return None if answer.get("pid") is None else self._running(name, answer, descriptor)

    def _running(self, name: AgentName, answer: dict[str, Any], descriptor: int | None) -> Running:
        pid = answer.get("pid")
        if not isinstance(pid, int) or (pid and descriptor is None):
            raise Refusal("unavailable", f"cannot watch {name}: the helper gave no descriptor of it; look at its log")
        unit: dict[str, str] = {key: str(answer[key]) for key in ("unit", "invocation") if key in answer}
        return RunningElsewhere(self._helper, name, pid, descriptor, unit)

    async def missed_exit(self, name: AgentName) -> Exit | None:
        answer = await self._helper.ask("missed_exit", name)
        if not answer.get("missed"):
            return None
        return Exit(_told(answer, "code", int, type(None)), with_machine=answer.get("with_machine") is True)

    async def forget(self, name: AgentName) -> None:
        await self._helper.ask("forget", name)

    async def last_words(self, name: AgentName, limit: int = 600) -> str:
        return str((await self._helper.ask("last_words", name, limit=limit)).get("words"))

    async def logs(self, name: AgentName, lines: int = 50) -> list[str]:
        answer = await self._helper.ask("logs", name, lines=max(1, min(lines, LINES_MOST)))
        return [str(line) for line in _told(answer, "lines", list)]

    async def usage(self, name: AgentName) -> Usage:
        answer = await self._helper.ask("usage", name)
        return Usage(_told(answer, "processes", int), _told(answer, "memory_bytes", int))

    async def exec(self, name: AgentName, dirs: AgentDirs, command: Sequence[str], patience_s: float = 60.0) -> Done:
        measure = {"command": list(command), "patience_s": patience_s}
        answer, _ = await self._helper.ask_for("exec", name, measure, patience_s + PATIENCE_S)
        return Done(_told(answer, "code", int), _told(answer, "output", str))

    async def destroy(self, name: AgentName) -> None:
        await self._helper.ask("destroy", name)


def _network(dirs: AgentDirs) -> dict[str, str]:
    """The measure of a start in the host's network; none without, so that a helper of before understands it too."""
    return {"network": "host"} if dirs.network == "host" else {}


def _told(answer: dict[str, Any], key: str, *kinds: type) -> Any:
    """What an answer has for a key. Raises Refusal when that is of none of the kinds: the helper is not what it was."""
    if not isinstance(value := answer.get(key), kinds):
        fix = "run a helper and a daemon of the same version"
        raise Refusal("failed", f"cannot use the helper's answer: its {key} is {shown(value)}; {fix}")
    return value
