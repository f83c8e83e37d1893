"""git's own two services for one agent: what it fetches comes from a mirror, what it pushes goes through it.

The connected socket itself is given to git, so the daemon carries no bulk. Of a push git holds the objects back until
its hook, which asks here, is told that the project's repository has them (git/pushes.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import trio

from hive_core.credentials import Credentials
from hive_core.git.mirrors import MEMORY_BYTES, NOTHING, note_pushed
from hive_core.git.pushes import (
    ASK_LIMIT_BYTES,
    Judge,
    Push,
    Update,
    forward,
    known_secrets,
    parse_push,
    place_on_host,
    put_hook,
)
from hive_core.git.sterile_git import GitFailed, GitLimits, Setting, command_of, run_git
from hive_core.limits import Limits
from hive_core.procedures.projects import HOOKS, ProjectMirrors
from hive_core.project_rules import Project
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, ProjectName
from hive_core.services.projects import PROJECTS, Registered, no_such_project
from hive_core.store.door import Store
from hive_core.store.writer import Transaction

log = logging.getLogger(__name__)
IDLE_S = 120  # without a word of a client that fetches
_HIDDEN = {"transfer.hideRefs": "refs/source"}
_PROTOCOLS = ("version=1", "version=2")
ENDED = b"\n.\n"  # of what the hook asks


class GitServices:
    def __init__(
        self, store: Store, mirrors: ProjectMirrors, credentials: Credentials, limits: Limits, state_dir: Path
    ) -> None:
        self._store = store
        self._mirrors = mirrors
        self._credentials = credentials
        self._limits = limits
        self._state_dir = state_dir

    async def find(self, agent: AgentName, name: ProjectName) -> tuple[Project, Registered]:
        """A project as an agent may use it. Raises Refusal when it may not, or it cannot be served now."""
        listed = await self._mirrors.projects.listed_by(agent)
        if (project := next((one for one in listed if one.name == name), None)) is None:
            mine = ", ".join(one.name for one in listed) or "none"
            why = f"it is not in `projects` of your agent.toml ({mine}); ask hm1nd to ask the operator for it"
            raise Refusal("refused", f"cannot serve {name}: {why}")
        if (registered := await self._mirrors.projects.find(name)) is None:
            raise no_such_project(name)
        if not self._mirrors.path(name).is_dir():
            await self._mirrors.fetch(name)  # as behind a backup that was restored
        return project, registered

    async def upload(self, name: ProjectName, sock: socket.socket, protocol: str | None) -> None:
        """Serve one fetch or clone; git reads and writes `sock` until either end has had enough."""
        variables = {"GIT_PROTOCOL": protocol} if protocol in _PROTOCOLS else {}
        words = ["upload-pack", "--strict", f"--timeout={IDLE_S}", str(self._mirrors.path(name))]
        time_s = self._limits.project_fetch_s
        command = command_of(
            self._mirrors.path(name), words, GitLimits(time_s, MEMORY_BYTES), Setting(_HIDDEN, variables)
        )
        await _serve(*command, sock, time_s)

    async def receive(self, agent: AgentName, project: Project, registered: Registered, sock: socket.socket) -> None:
        """Serve one push. What becomes of it is an event, and what git tells the agent."""
        limits, mirror = self._limits, self._mirrors.path(registered.name)
        with _Pipes() as pipes:
            hooks = await trio.to_thread.run_sync(put_hook, mirror.parent / HOOKS)
            config = {
                **_HIDDEN,
                "core.hooksPath": str(hooks),
                "receive.advertisePushOptions": "false",
                "receive.autogc": "false",
                "receive.fsckObjects": "true",
                "receive.maxInputSize": str(limits.push_bytes),
                "receive.unpackLimit": "1",  # all that comes is a pack, which can be linked
            }
            variables = {"HIVE_ASK": str(pipes.hooks_ask), "HIVE_ANSWER": str(pipes.hooks_answer)}
            bounds = GitLimits(limits.push_s, MEMORY_BYTES, 2 * limits.push_bytes)
            command = command_of(mirror, ["receive-pack", str(mirror)], bounds, Setting(config, variables))
            judged, asked = _Judged(), b""
            async with trio.open_nursery() as nursery:

                async def serve() -> None:
                    try:
                        await _serve(*command, sock, limits.push_s, pipes.of_the_hook)
                    finally:
                        judged.served.set()
                        unasked.cancel()

                with trio.CancelScope() as unasked:
                    nursery.start_soon(serve)
                    asked = await _read_question(pipes.ask)
                if not asked:  # nothing was pushed, or git did not take it
                    return
                async with self._mirrors.alone(registered.name):
                    refusal = await self._judge(agent, project, registered, asked, judged)
                    pipes.say(b"ok\n" if refusal is None else f"no\n{refusal.message}\n".encode())
                    with trio.CancelScope(shield=True):
                        await judged.served.wait()
                        await self._note(agent, registered, judged, refusal)
        if judged.moved:
            await self._mirrors.lend(registered.name)

    async def _judge(
        self, agent: AgentName, project: Project, registered: Registered, asked: bytes, judged: _Judged
    ) -> Refusal | None:
        """Judge a push and send it on; None when the project's repository has it now."""
        limits, path = self._limits, self._mirrors.path(registered.name)

        def judge() -> None:
            judged.push = push = parse_push(asked, path)
            look = trio.from_thread.check_cancelled
            judge = Judge(path, project, agent, limits.push_bytes, limits.push_s, look)
            judge.check(push, known_secrets(self._state_dir, self._credentials))
            forward(self._mirrors.mirror(registered), push, agent, limits.push_s, look)

        try:
            await trio.to_thread.run_sync(judge)
        except Refusal as refusal:
            return refusal
        except (GitFailed, OSError) as exc:
            why = explain(exc) if isinstance(exc, OSError) else str(exc)
            log.warning("a push of %s to %s: %s", agent, registered.name, why, extra={"agent": agent})
            return Refusal("unavailable", f"it could not be looked at: {why}")
        return None

    async def _note(self, agent: AgentName, registered: Registered, judged: _Judged, refusal: Refusal | None) -> None:
        """Write down what became of a push, by what the mirror has now."""
        updates = judged.push.updates if judged.push is not None else ()
        path = self._mirrors.path(registered.name)

        on_host = registered.source.startswith("/")

        def look() -> list[Update]:
            moved = [one for one in updates if _has(path, one)] if refusal is None else []
            if moved and not on_host:
                note_pushed(path, {one.ref: one.new for one in moved})
            return moved

        try:
            judged.moved = await trio.to_thread.run_sync(look)
        except (GitFailed, OSError) as exc:
            log.error("what %s pushed to %s could not be noted: %s", agent, registered.name, exc)
        refs = [
            {"ref": one.ref, "old": one.old, "new": one.new}
            | ({"at": place_on_host(one.ref, agent)} if on_host else {})
            for one in updates
        ]
        reason = refusal.message if refusal else None if judged.moved else "git did not move the refs of the mirror"

        def write(tx: Transaction) -> None:
            kind = "project_pushed" if judged.moved else "push_refused"
            tx.emit(kind, agent, agent, None, project=registered.name, refs=refs, reason=reason)
            tx.wake(PROJECTS)

        await self._store.insist(write)


class _Judged:
    """What is known of a push while git serves it."""

    def __init__(self) -> None:
        self.push: Push | None = None
        self.moved: list[Update] = []
        self.served = trio.Event()


def _has(mirror: Path, update: Update) -> bool:
    said = run_git(mirror, "for-each-ref", "--format=%(objectname) %(refname)", update.ref).decode().splitlines()
    is_there = f"{update.new} {update.ref}" in said
    return is_there if update.new != NOTHING else not any(line.endswith(f" {update.ref}") for line in said)


class _Pipes:
    """Two pipes: in one the hook asks, from the other it reads the answer."""

    def __init__(self) -> None:
        self.ask, self.hooks_ask = os.pipe2(os.O_CLOEXEC)
        self.hooks_answer, self._answer = os.pipe2(os.O_CLOEXEC)
        self._open = {self.ask, self.hooks_ask, self.hooks_answer, self._answer}
        os.set_blocking(self.ask, False)

    def __enter__(self) -> _Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.pop())

    @property
    def of_the_hook(self) -> tuple[int, int]:
        return self.hooks_ask, self.hooks_answer

    def say(self, answer: bytes) -> None:
        """Answer; who does not listen any more has gone."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._answer, answer)
        self._open.discard(self._answer)
        os.close(self._answer)


async def _read_question(ask: int) -> bytes:
    """What the hook asks; of more than ASK_LIMIT_BYTES the beginning, and one byte more than that."""
    asked, end = b"", b""
    while end != ENDED:
        await trio.lowlevel.wait_readable(ask)
        data = os.read(ask, ASK_LIMIT_BYTES)
        asked = (asked + data)[: ASK_LIMIT_BYTES + 1]
        end = (end + data)[-len(ENDED) :]  # it is read to its end: else the hook would not come to the answer
    return asked.removesuffix(b".\n")


async def _serve(
    command: Sequence[str],
    environment: dict[str, str],
    sock: socket.socket,
    time_s: float,
    descriptors: Sequence[int] = (),
) -> None:
    """Run git on a connected socket to its end, or for so long."""
    sock.setblocking(True)  # it is one with git's
    process = await trio.lowlevel.open_process(
        command,
        stdin=sock.fileno(),
        stdout=sock.fileno(),
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        start_new_session=True,
        pass_fds=descriptors,
    )
    try:
        with trio.move_on_after(time_s):
            await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
