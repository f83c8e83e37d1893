"""What the helper can be asked. A request names a verb and an agent, and a measure where the verb has one; no more.

Each connection is one request and its answer, a line each: {"verb": "start", "name": "iris"} and {"pid": 4711}, or
{"error": {"code": …, "message": …}}. With a pid comes a descriptor (pidfd_open(2)) by which its end can be seen.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from hive_core.config import Config
from hive_core.containers.driver import Switching
from hive_core.containers.host_process import LINES_MOST
from hive_core.containers.mounts import RUN, AgentDirs, agent_dirs
from hive_core.containers.running import Exit
from hive_core.containers.scopes import unit_of
from hive_core.helper.drivers import RootDriver, Watched, check_room
from hive_core.helper.owner import Owner
from hive_core.helper.staging import opened
from hive_core.protocol.lines import encode
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, Network, StorePath, parse_agent_name, parse_store_path, shown
from hive_core.sockets.unix import Connection, Lines

log = logging.getLogger(__name__)
REQUEST_LIMIT_BYTES = 64 << 10
PATIENCE_S = 5.0  # for a request to come and its answer to be taken
END_PATIENCE_S = 20.0  # of `exit`, for an end that was just seen
TURN_PATIENCE_S = 10.0  # for what was asked of the same agent before
PRINT_LIMIT_BYTES = 128 << 10
WORDS_MOST, WORDS_LIMIT_BYTES = 64, 32 << 10  # of a command
EXEC_MOST_S = 600.0

Args = Mapping[str, Any]
Check = Callable[[object], bool]


def whole(least: int, most: int) -> Check:
    return lambda raw: isinstance(raw, int) and not isinstance(raw, bool) and least <= raw <= most


def seconds(raw: object) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool) and 0 < raw <= EXEC_MOST_S


def words(raw: object) -> bool:
    if not isinstance(raw, list) or not 0 < len(raw) <= WORDS_MOST:
        return False
    try:
        return sum(len(_plain(word)) for word in raw) <= WORDS_LIMIT_BYTES
    except ValueError:
        return False


def network(raw: object) -> bool:
    return raw in ("private", "host")


def store_path(raw: object) -> bool:
    try:
        return bool(parse_store_path(raw))
    except Refusal:
        return False


def _plain(word: object) -> bytes:
    if not isinstance(word, str) or "\0" in word:
        raise ValueError("no word of a command")
    return word.encode()


@dataclass(slots=True)
class Entry:
    """An agent that this helper watches."""

    running: Watched
    done: trio.Event = field(default_factory=trio.Event)
    exit: Exit | None = None  # once it is done


@dataclass(slots=True)
class Answer:
    told: dict[str, Any]
    descriptor: int | None = None  # closed when it was sent


class HelperDesk:
    """Answers the daemon's user, and root. `nursery` watches the agents."""

    def __init__(
        self,
        driver: RootDriver,
        config: Config,
        state_dir: Path,
        owner: Owner,
        trouble: str | None,
        nursery: trio.Nursery,
    ) -> None:
        self._driver = driver
        self._config = config
        self._state_dir = state_dir
        self._owner = owner
        self._trouble = trouble
        self._nursery = nursery
        self._entries: dict[AgentName, Entry] = {}  # agents that run
        self._exits: dict[AgentName, Exit] = {}  # how others ended, until that is told
        self._turns: weakref.WeakValueDictionary[AgentName, trio.Lock] = weakref.WeakValueDictionary()
        self._verbs: dict[str, tuple[Callable[..., Awaitable[Answer]], dict[str, Check]]] = {
            "generation": (self._generation, {"network": network}),
            "start": (self._start, {"network": network}),
            "find": (self._find, {}),
            "stop": (self._stop, {}),
            "kill": (self._kill, {}),
            "exit": (self._exit, {}),
            "missed_exit": (self._missed_exit, {}),
            "forget": (self._forget, {}),
            "last_words": (self._last_words, {"limit": whole(1, PRINT_LIMIT_BYTES)}),
            "logs": (self._logs, {"lines": whole(1, LINES_MOST)}),
            "usage": (self._usage, {}),
            "destroy": (self._destroy, {}),
        }
        if isinstance(driver, Switching):
            self._systems: Switching = driver
            self._verbs["switch"] = (self._switch, {"system": store_path})
            self._verbs["roll_back"] = (self._roll_back, {})
            self._verbs["current"] = (self._current, {})

    async def serve(self, stream: Connection) -> None:
        """Answer one request, whatever it is."""
        try:
            answer = await self._answer(stream)
        except Refusal as refusal:
            answer = Answer({"error": refusal.to_wire()})
        except OSError as exc:
            answer = Answer({"error": {"code": "failed", "message": str(exc)}})
        try:
            with trio.move_on_after(PATIENCE_S):
                await stream.send_all(encode(answer.told), answer.descriptor)
        finally:
            if answer.descriptor is not None:
                os.close(answer.descriptor)

    async def _answer(self, stream: Connection) -> Answer:
        if (uid := stream.peer_uid()) not in (0, self._owner.uid):
            log.warning("refused a request of uid %d", uid)
            raise Refusal("refused", f"cannot ask the helper: it answers uid {self._owner.uid} and root, not {uid}")
        request: dict[str, Any] | Refusal | None = None
        with trio.move_on_after(PATIENCE_S) as scope:
            request = await Lines(stream, REQUEST_LIMIT_BYTES).next()
        if scope.cancelled_caught or request is None:
            raise Refusal("usage", f"cannot read the request: no whole line came within {PATIENCE_S:g} s; send one")
        if isinstance(request, Refusal):
            raise request
        verb = request.pop("verb", None)
        if verb == "hello" and not request:
            return self._hello()
        if verb == "list" and not request:
            return Answer({"agents": {name: entry.running.pid for name, entry in self._entries.items()}})
        name = parse_agent_name(request.pop("name", None))
        if verb == "exec":
            return await self._unless_left(stream, self._exec, name, _checked("exec", request, _EXEC))
        answer, checks = self._verbs.get(verb if isinstance(verb, str) else "", (None, {}))
        if answer is None:
            known = ", ".join(("hello", "list", "exec", *self._verbs))
            raise Refusal("usage", f"cannot do {shown(verb)}: there is no such verb; the verbs are {known}")
        args = _checked(str(verb), request, checks)
        if verb in ("stop", "kill") and name in self._entries:
            # Whoever is to end waits for no turn: what is done in it may be a switch, which takes as long as it likes.
            return await answer(name)
        async with self._turn(name):
            # A request that has begun is carried out, also when whoever asked has left.
            with trio.CancelScope(shield=True):
                told = await answer(name, **args)
        return told

    @asynccontextmanager
    async def _turn(self, name: AgentName) -> AsyncIterator[None]:
        """One request of an agent after the other. Who waits too long gives up, and its connection with it."""
        lock = self._turns.setdefault(name, trio.Lock())
        with trio.move_on_after(TURN_PATIENCE_S) as waiting:
            await lock.acquire()
        if waiting.cancelled_caught:
            why = f"what was asked of it before has not been done for {TURN_PATIENCE_S:g} s; look for a disk that hangs"
            raise Refusal("unavailable", f"cannot see to {name}: {why}")
        try:
            yield
        finally:
            lock.release()

    async def _unless_left(
        self, stream: Connection, answer: Callable[..., Awaitable[Answer]], name: AgentName, args: Args
    ) -> Answer:
        """The answer, for as long as somebody waits for it."""
        found: Answer | Refusal | OSError = Answer({})
        async with trio.open_nursery() as nursery:

            async def until_left() -> None:
                await stream.receive_some()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_left)
            try:
                found = await answer(name, **args)
            except (Refusal, OSError) as exc:
                found = exc
            nursery.cancel_scope.cancel()
        if isinstance(found, Exception):
            raise found
        return found

    # -- the verbs ----------------------------------------------------------------------------------------------------

    def _hello(self) -> Answer:
        config = self._config
        folders = {"state_dir": str(config.state_dir), "runtime_dir": str(config.runtime_dir)}
        return Answer({**folders, "sandbox": config.sandbox, "user": self._owner.uid, "trouble": self._trouble})

    async def _generation(self, name: AgentName, network: Network = "private") -> Answer:
        return Answer({"generation": await self._driver.generation(name, self._dirs(name, network))})

    async def _start(self, name: AgentName, network: Network = "private") -> Answer:
        if self._trouble is not None:
            raise Refusal("failed", self._trouble)
        if network == "host" and name not in self._config.host_network:
            fix = f'add "{name}" to host_network there, and start the helper again'
            why = f"the helper's own configuration does not list it; {fix}"
            raise Refusal("refused", f"cannot start {name} in the host's network: {why}")
        if await self._entry(name) is not None:
            raise Refusal("conflict", f"cannot start {name}: it runs already")
        check_room(self._state_dir, name)
        async with opened(self._dirs(name, network), self._owner.uid) as dirs:
            try:
                running = await self._driver.start(name, dirs)
            except BlockingIOError as exc:
                raise Refusal("conflict", f"cannot start {name}: {exc.strerror}") from None
            except Refusal as refusal:
                # "conflict" says that it runs already, and that alone.
                raise Refusal("failed" if refusal.code == "conflict" else refusal.code, refusal.message) from None
        return self._told(self._watch(name, running))

    async def _find(self, name: AgentName) -> Answer:
        run = AgentDirs(tuple(mount for mount in self._dirs(name).mounts if mount.target == RUN))
        if self._driver.former is not None:
            await self._driver.former.end(name, run)
        if (entry := await self._entry(name)) is None:
            return Answer({"pid": None})
        async with opened(run, self._owner.uid) as dirs:
            limiter = trio.CapacityLimiter(1)  # of its own: that disk may hang too
            difference = await trio.to_thread.run_sync(self._driver.difference, name, dirs.run, limiter=limiter)
        if difference is None:
            return self._told(entry)
        log.warning("ended %s (pid %d): it was started %s", name, entry.running.pid, difference)
        entry.running.kill()
        await entry.done.wait()
        await self._forget(name)
        return Answer({"pid": None})

    async def _stop(self, name: AgentName) -> Answer:
        if (entry := await self._entry(name)) is not None:
            entry.running.stop()
        return Answer({})

    async def _kill(self, name: AgentName) -> Answer:
        if (entry := await self._entry(name)) is not None:
            entry.running.kill()
        return Answer({})

    async def _exit(self, name: AgentName) -> Answer:
        """How an agent ended whose end was just seen. It can be asked again until it is forgotten."""
        with trio.move_on_after(END_PATIENCE_S):
            if (entry := await self._entry(name)) is not None:
                await entry.done.wait()
        if entry is not None and entry.exit is None:
            raise Refusal("conflict", f"cannot tell how {name} ended: it runs")
        if name not in self._exits and (missed := await self._driver.missed_exit(name)) is not None:
            self._exits[name] = missed
        exit_ = self._exits.get(name)
        return Answer({"code": None if exit_ is None else exit_.code})

    async def _missed_exit(self, name: AgentName) -> Answer:
        if await self._entry(name) is not None:
            return Answer({"missed": False})
        missed = await self._driver.missed_exit(name)
        missed = self._exits.pop(name, missed)
        if missed is None:
            return Answer({"missed": False})
        return Answer({"missed": True, "code": missed.code, "with_machine": missed.with_machine})

    async def _forget(self, name: AgentName) -> Answer:
        if await self._entry(name) is None:
            self._exits.pop(name, None)
            await self._driver.forget(name)
        return Answer({})

    async def _last_words(self, name: AgentName, limit: int = 600) -> Answer:
        return Answer({"words": await self._driver.last_words(name, limit)})

    async def _logs(self, name: AgentName, lines: int = 50) -> Answer:
        return Answer({"lines": await self._driver.logs(name, lines)})

    async def _usage(self, name: AgentName) -> Answer:
        usage = await self._driver.usage(name)
        return Answer({"processes": usage.processes, "memory_bytes": usage.memory_bytes})

    async def _exec(self, name: AgentName, command: list[str], patience_s: float = 60.0) -> Answer:
        # It enters what the agent has already: the directories are not looked at.
        done = await self._driver.exec(name, self._dirs(name), command, patience_s)
        return Answer({"code": done.code, "output": done.output})

    async def _destroy(self, name: AgentName) -> Answer:
        if await self._entry(name) is not None:
            raise Refusal("conflict", f"cannot destroy {name}: it runs; end it first")
        self._exits.pop(name, None)
        await self._driver.destroy(name)
        return Answer({})

    async def _switch(self, name: AgentName, system: StorePath) -> Answer:
        check_room(self._state_dir, name)
        await self._systems.switch(name, system)
        return Answer({})

    async def _roll_back(self, name: AgentName) -> Answer:
        return Answer({"system": await self._systems.roll_back(name)})

    async def _current(self, name: AgentName) -> Answer:
        return Answer({"system": await self._systems.current(name)})

    # -- agents that run ----------------------------------------------------------------------------------------------

    def _dirs(self, name: AgentName, network: Network = "private") -> AgentDirs:
        return agent_dirs(self._config.state_dir, self._config.runtime_dir, name, network)

    async def _entry(self, name: AgentName) -> Entry | None:
        """The agent, when it runs, also when a helper before started it."""
        if (entry := self._entries.get(name)) is not None:
            if not entry.running.ended:
                return entry
            await entry.done.wait()  # it may be printing its last
            return None
        running = await self._driver.look(name)
        return None if running is None else self._watch(name, running)

    def _watch(self, name: AgentName, running: Watched) -> Entry:
        entry = self._entries[name] = Entry(running)
        self._exits.pop(name, None)
        self._nursery.start_soon(self._until_end, name, entry)
        return entry

    async def _until_end(self, name: AgentName, entry: Entry) -> None:
        self._exits[name] = entry.exit = await entry.running.wait()
        del self._entries[name]
        entry.done.set()

    def _told(self, entry: Entry) -> Answer:
        descriptor = entry.running.copy_descriptor()
        if descriptor is None:
            return Answer({"pid": 0})  # it has ended already
        return Answer({"pid": entry.running.pid, **unit_of(entry.running.pid)}, descriptor)


_EXEC: dict[str, Check] = {"command": words, "patience_s": seconds}


def _checked(verb: str, args: dict[str, Any], checks: Mapping[str, Check]) -> Args:
    for key, value in args.items():
        if key not in checks:
            takes = ", ".join(checks) or "the name alone"
            raise Refusal("usage", f"cannot do {verb}: it has no argument {shown(key)}; it takes {takes}")
        if not checks[key](value):
            raise Refusal("usage", f"cannot do {verb}: {shown(value)} is out of bounds as {key}")
    for needed in ("command", "system"):
        if needed in checks and needed not in args:
            raise Refusal("usage", f"cannot do {verb}: it needs a {needed}")
    return args
