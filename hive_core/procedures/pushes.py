"""git's own two services for one agent: what it fetches comes from a mirror, what it pushes goes through it.

The connected socket itself is given to git, so the daemon carries no bulk. Of a push git holds the objects back until
its hook, which asks here, is told that the project's repository has them (git/pushes.py).
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from hive_core.credentials import Credentials
from hive_core.git.hive_secrets import known_secrets
from hive_core.git.mirrors import MEMORY_BYTES, NOTHING, PUSH_MEMORY_BYTES, clear_locks, note_pushed, refs_of
from hive_core.git.pushes import (
    REF_TOLD,
    Judge,
    Push,
    Update,
    check_names,
    check_room,
    forward,
    parse_push,
    place_on_host,
    put_hook,
)
from hive_core.git.sterile_git import GitFailed, GitLimits, Setting, command_of
from hive_core.limits import Limits
from hive_core.procedures.git_processes import TRACED, Pipes, Seats, serve_git
from hive_core.procedures.projects import HOOKS, ProjectMirrors
from hive_core.project_rules import Project
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, ProjectName
from hive_core.services.access import ACCESS, Access
from hive_core.services.forges import no_such_project
from hive_core.services.projects import PROJECTS, Registered
from hive_core.store.bus import DEPLOYED, WANTED
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
IDLE_S = 120  # without a word of a client that fetches
_HIDDEN = {"transfer.hideRefs": "refs/source"}
_PROTOCOLS = ("version=1", "version=2")
PUSHES_AT_ONCE = 8  # that are judged or sent on
REFUSALS_TOLD = 10  # in a minute, of one agent: an event each
REFS_TOLD, REASON_TOLD = 10, 500  # of one refusal: refs, and characters
NOT_TAKEN = "git did not take what came: it is over push_bytes, not whole, signed, or holds what git refuses (fsck)"
ALONE_WAIT_S = 60.0  # for whoever else moves the refs of a mirror
BUSY = f"it is fetched, or others push to it, for more than {ALONE_WAIT_S:g} s now; push again in a moment"
MOVE_S = 30.0  # that git has to move the refs, and its client to read what it says of that


class GitServices:
    def __init__(
        self,
        store: Store,
        mirrors: ProjectMirrors,
        credentials: Credentials,
        access: Access,
        limits: Limits,
        state_dir: Path,
    ) -> None:
        self._store = store
        self._access = access
        self._mirrors = mirrors
        self._credentials = credentials
        self._limits = limits
        self._state_dir = state_dir
        # A slow server can take all its time: not on every thread that others need.
        self._threads = trio.CapacityLimiter(PUSHES_AT_ONCE)
        self._refused: dict[AgentName, deque[float]] = {}  # when refusals of late were written down
        self._untold: Counter[AgentName] = Counter()  # refusals since then that were not
        self.seats = Seats()

    async def check(self, agent: AgentName, name: ProjectName) -> None:
        """Raises Refusal when an agent may not use a project, or it cannot be served now."""
        await self._find(agent, name)
        if not self._mirrors.path(name).is_dir():
            await self._mirrors.fetch(name)  # as behind a backup that was restored

    @asynccontextmanager
    async def while_allowed(self, agent: AgentName, name: ProjectName) -> AsyncIterator[None]:
        """Cut what is within when the agent may not use the project any more: stopped, destroyed, or it was taken off
        its list."""
        topics = (ACCESS, DEPLOYED, WANTED, PROJECTS)
        async with trio.open_nursery() as nursery:

            async def cut() -> None:
                with self._store.bus.listen(*topics) as listener, contextlib.suppress(Refusal):
                    while True:
                        await self._find(agent, name)
                        await listener.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(cut)
            yield
            nursery.cancel_scope.cancel()

    async def _find(self, agent: AgentName, name: ProjectName) -> tuple[Project, Registered]:
        """A project as an agent may use it now. Raises Refusal when it may not."""
        if (halted := self._access.halted(agent)) is not None:
            raise Refusal("unavailable", f"cannot serve {name}: {halted.sentence}")
        listed = await self._mirrors.projects.listed_by(agent)
        if (project := next((one for one in listed if one.name == name), None)) is None:
            mine = ", ".join(one.name for one in listed) or "none"
            why = f"it is not in `projects` of your agent.toml ({mine}); ask hm1nd to ask the operator for it"
            raise Refusal("refused", f"cannot serve {name}: {why}")
        if (registered := await self._mirrors.projects.find(name)) is None:
            raise no_such_project(name)
        return project, registered

    async def upload(self, name: ProjectName, sock: socket.socket, protocol: str | None) -> None:
        """Serve one fetch or clone; git reads and writes `sock` until either end has had enough."""
        variables = {"GIT_PROTOCOL": protocol} if protocol in _PROTOCOLS else {}
        words = ["upload-pack", "--strict", f"--timeout={IDLE_S}", str(self._mirrors.path(name))]
        time_s = self._limits.project_fetch_s
        command = command_of(
            self._mirrors.path(name), words, GitLimits(time_s, MEMORY_BYTES), Setting(_HIDDEN, variables)
        )
        await serve_git(*command, sock, time_s)

    async def receive(self, agent: AgentName, name: ProjectName, sock: socket.socket) -> None:
        """Serve one push. What becomes of it is an event, and what git tells the agent."""
        limits, mirror = self._limits, self._mirrors.path(name)
        with Pipes() as pipes:
            hooks = await trio.to_thread.run_sync(put_hook, mirror.parent / HOOKS)
            config = {
                **_HIDDEN,
                "core.hooksPath": str(hooks),
                # What an agent has signed is given to no program, also where git takes a signature unasked.
                **dict.fromkeys(("gpg.program", "gpg.x509.program", "gpg.ssh.program"), "false"),
                "receive.advertisePushOptions": "false",
                "receive.autogc": "false",
                "receive.fsckObjects": "true",
                "receive.maxInputSize": str(limits.push_bytes),
                "receive.unpackLimit": "1",  # all that comes is a pack, which can be linked
            }
            variables = {
                "HIVE_ASK": str(pipes.hooks_ask),
                "HIVE_ANSWER": str(pipes.hooks_answer),
                "GIT_TRACE2_EVENT": f"/dev/fd/{pipes.gits_trace}",
                **TRACED,
            }
            bounds = GitLimits(limits.push_s, PUSH_MEMORY_BYTES, 2 * limits.push_bytes)
            command = command_of(mirror, ["receive-pack", str(mirror)], bounds, Setting(config, variables))
            judged = _Judged()
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._serve, command, sock, pipes, judged)
                    if asked := await pipes.read_question():
                        await self._settle(agent, name, asked, judged, pipes)
            finally:
                with trio.CancelScope(shield=True):
                    await pipes.clear(mirror)
            if not asked and pipes.quarantine is not None:
                await self._note(agent, name, judged, Refusal("refused", NOT_TAKEN))
        if judged.moved:
            await self._mirrors.lend(name)

    async def _serve(
        self,
        command: tuple[list[str], dict[str, str]],
        sock: socket.socket,
        pipes: Pipes,
        judged: _Judged,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            with judged.serving:
                async with trio.open_nursery() as nursery:
                    await nursery.start(serve_git, *command, sock, self._limits.push_s, pipes.of_git)
                    pipes.hand_over()
                    task_status.started()
                    await pipes.watch()
        finally:
            judged.served.set()

    async def _settle(self, agent: AgentName, name: ProjectName, asked: bytes, judged: _Judged, pipes: Pipes) -> None:
        """Answer the hook, and write down what became of the push, alone with the mirror's refs."""
        async with self._mirrors.alone(name, ALONE_WAIT_S) as alone:
            refusal = await self._judge(agent, name, asked, judged) if alone else Refusal("unavailable", BUSY)
            pipes.say(b"ok\n" if refusal is None else f"no\n{refusal.message}\n".encode())
            with trio.CancelScope(shield=True):
                with trio.move_on_after(MOVE_S):
                    await judged.served.wait()
                judged.serving.cancel()  # its client does not read what git says, and others wait
                await judged.served.wait()
                await self._note(agent, name, judged, refusal)

    async def _judge(self, agent: AgentName, name: ProjectName, asked: bytes, judged: _Judged) -> Refusal | None:
        """Judge a push by what holds now, and send it on; None when the project's repository has it."""
        limits, path, look = self._limits, self._mirrors.path(name), trio.from_thread.check_cancelled

        def judge() -> Push:
            push = parse_push(asked, path)
            secrets = self._secrets()
            check_names(push, secrets)  # before they can be told
            judged.push = push
            check_room(path, push, limits.project_bytes)
            Judge(path, project, agent, limits.push_bytes, limits.push_s, look).check(push, secrets)
            return push

        def send_on() -> None:
            forward(self._mirrors.mirror(registered), push, agent, limits.push_s, look, self._secrets())

        try:
            project, registered = await self._find(agent, name)
            judged.registered = registered
            push = await trio.to_thread.run_sync(judge, limiter=self._threads)
            await self._find(agent, name)  # it may have been stopped meanwhile
            await trio.to_thread.run_sync(send_on, limiter=self._threads)
        except Refusal as refusal:
            return refusal
        except (GitFailed, OSError) as exc:
            why = explain(exc) if isinstance(exc, OSError) else str(exc)
            log.warning("a push of %s to %s: %s", agent, name, why, extra={"agent": agent})
            return Refusal("unavailable", f"it could not be looked at: {why}")
        return None

    def _secrets(self) -> dict[str, bytes]:
        return known_secrets(self._state_dir, self._credentials)

    async def _note(self, agent: AgentName, name: ProjectName, judged: _Judged, refusal: Refusal | None) -> None:
        """Write down what became of a push, by what the mirror has now."""
        updates = judged.push.updates if judged.push is not None else ()
        path = self._mirrors.path(name)
        on_host = judged.registered is not None and judged.registered.source.startswith("/")

        def look() -> list[Update]:
            moved = [one for one in updates if _has(path, one)] if refusal is None else []
            if refusal is None and (judged.serving.cancelled_caught or len(moved) < len(updates)):  # git was killed
                clear_locks(path)
            if moved and not on_host:
                note_pushed(path, {one.ref: one.new for one in moved})
            return moved

        try:
            judged.moved = await trio.to_thread.run_sync(look)
        except (GitFailed, OSError) as exc:
            log.error("what %s pushed to %s could not be noted: %s", agent, name, exc)
        refs = [
            {"ref": one.ref[:REF_TOLD], "old": one.old, "new": one.new}
            | ({"at": place_on_host(one.ref, agent)} if on_host and judged.moved else {})
            for one in updates[: None if judged.moved else REFS_TOLD]
        ]
        reason = refusal.message[:REASON_TOLD] if refusal else None
        if not judged.moved and self._is_one_too_many(agent):
            self._untold[agent] += 1
            return
        untold = self._untold.pop(agent, 0) or None

        def write(tx: Transaction) -> None:
            if judged.moved:
                tx.emit("project_pushed", agent, agent, None, project=name, refs=refs)
                tx.wake(PROJECTS)
            else:
                why = reason or "git did not move the refs of the mirror"
                tx.emit("push_refused", agent, agent, None, project=name, refs=refs, reason=why, untold=untold)

        await self._store.insist(write)

    def untold(self, agent: AgentName) -> int:
        """How many refusals of late are not told by an event of their own; the next one tells how many."""
        return self._untold[agent]

    def _is_one_too_many(self, agent: AgentName) -> bool:
        """Whether so many refusals were written down in the last minute that this one is only counted."""
        told, now_s = self._refused.setdefault(agent, deque(maxlen=REFUSALS_TOLD)), trio.current_time()
        if len(told) == REFUSALS_TOLD and now_s - told[0] < 60:
            return True
        told.append(now_s)
        return False


class _Judged:
    """What is known of a push while git serves it."""

    def __init__(self) -> None:
        self.push: Push | None = None
        self.registered: Registered | None = None
        self.moved: list[Update] = []
        self.serving = trio.CancelScope()  # within which git runs, until `served`
        self.served = trio.Event()


def _has(mirror: Path, update: Update) -> bool:
    return refs_of(mirror, update.ref).get(update.ref, NOTHING) == update.new
