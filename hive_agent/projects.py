"""The agent's clones of projects: made before a turn where they are missing, fetched where the hive has something new.

A clone borrows the objects of the hive's mirror (/mirrors/PROJECT, read-only), so it takes as long as its files. It is
the agent's: what stands in its place is left alone, and nothing in here fails a turn. What went otherwise is a note, a
line for the prompt.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from hive_agent.git_variables import git_variables
from hive_agent.runner import Seat
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_core.protocol.harness import Project, ProjectState, Settings

HOST_S = 20.0  # that the host has for the state of the projects; it fetches them for 10 s at most
CLONE_S, FETCH_S = 900.0, 60.0
AT_ONCE = 2
SAID_LIMIT_BYTES = 16 * 1024
NOTE_LIMIT = 300  # characters of what git or the host say
# A push without words goes to the branch of the same name, and the next pull comes from there.
_CONFIG = ("push.default=current", "push.autoSetupRemote=true")
# Nothing is left to run behind it, and a repository within this one is the agent's to fetch.
_FETCH = ("-c", "gc.auto=0", "-c", "maintenance.auto=false", "fetch", "--quiet", "--prune", "--no-recurse-submodules")

Ask = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]


class GitFailed(Exception):
    """One line of what git said."""


class Projects:
    """ask: asks the host, and raises Refusal when it says no."""

    def __init__(self, seat: Seat, ask: Ask) -> None:
        self._seat = seat
        self._ask = ask
        self._seen: dict[str, object] = {}  # the mirror as it was when its clone was fetched

    async def prepare(self, settings: Settings, show: Callable[[str], None] = lambda _: None) -> list[str]:
        """Make and fetch the clones; what is to be said of that, a line each. Cancelled, nothing runs on.

        show: hears of what takes its time, when that begins.
        """
        if not settings.get("projects"):
            return []
        if not _is_there(self._seat.projects_dir):
            return ["this container has no /projects yet: it is replaced at its next start"]
        states: list[ProjectState] | None = None
        with trio.move_on_after(HOST_S):
            try:
                states = (await self._ask({"op": "projects"}))["projects"]
            except Refusal as refusal:
                return [f"the hive did not say how its projects are: {_said(refusal.message)}"]
        if states is None:
            return [f"the hive did not say within {HOST_S:g} s how its projects are; your clones are as they were"]
        notes: dict[str, list[str]] = {state["name"]: [] for state in states}
        turns = trio.Semaphore(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for state in states:
                nursery.start_soon(self._prepare, state, notes[state["name"]], turns, show)
        return [f"{name}: {note}" for name, told in notes.items() for note in told]

    async def _prepare(
        self, state: ProjectState, notes: list[str], turns: trio.Semaphore, show: Callable[[str], None]
    ) -> None:
        name, place = state["name"], _place(self._seat, state["path"])
        if state["trouble"]:
            notes.append(_said(state["trouble"]))
        async with turns:
            is_new = not _is_there(place)
            try:
                if is_new:
                    show(f"git clone hive://{name}")
                    await self._clone(state, place)
                    notes.append(f"it was cloned to {place} just now")
                else:
                    await self._fetch(name, place)
            except (GitFailed, OSError) as exc:
                what = "cloned" if is_new else "brought up to date"
                notes.append(f"{place} could not be {what}: {_said(str(exc))}")

    async def _clone(self, state: ProjectState, place: str) -> None:
        """Under its own name there is a whole clone, or none."""
        name, fresh = state["name"], f"{place}.new"
        seen = self._mirror(name)
        await trio.to_thread.run_sync(_remove, fresh)
        words = ["clone", "--quiet", "--reference-if-able", os.path.join(self._seat.mirrors_dir, name)]
        own = (f"user.name={self._seat.agent}", f"user.email={self._seat.agent}@hive")
        words += [word for setting in (*_CONFIG, *own) for word in ("--config", setting)]
        words += ["--branch", state["branch"]] if state["branch"] else []
        try:
            await self._git(CLONE_S, *words, "--", f"hive://{name}", fresh)
            os.rename(fresh, place)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_remove, fresh)
            raise
        self._seen[place] = seen

    async def _fetch(self, name: str, place: str) -> None:
        if not _is_there(os.path.join(place, ".git")):
            raise GitFailed(f"what is there is no clone; move it away, and hive://{name} is cloned at the next turn")
        seen = self._mirror(name)
        if seen is None or self._seen.get(place) != seen:
            await self._git(FETCH_S, "-C", place, *_FETCH, "origin")
            self._seen[place] = seen

    def _mirror(self, name: str) -> object:
        """Tells apart what the hive has of a project at two moments; None where that cannot be seen."""
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(self._seat.mirrors_dir, name, "packed-refs"))
            return found.st_ino, found.st_mtime_ns
        return None

    async def _git(self, within_s: float, *words: str) -> None:
        """Run git as the agent's program would. Raises GitFailed, OSError."""
        variables = {
            **git_variables(self._seat),
            "HOME": self._seat.home,
            "LC_ALL": "C.UTF-8",
            "GIT_TERMINAL_PROMPT": "0",
            # What lies around a clone is none of git's business.
            "GIT_CEILING_DIRECTORIES": self._seat.projects_dir,
        }
        process = await trio.lowlevel.open_process(
            ["git", *words],
            env=variables,
            cwd=self._seat.projects_dir,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stderr is not None
        said = b""
        try:
            with trio.move_on_after(within_s):
                async for data in process.stderr:
                    said = (said + data)[-SAID_LIMIT_BYTES:]
                await process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.stderr.aclose()
        if process.returncode == -signal.SIGKILL:
            raise GitFailed(f"git took longer than {within_s:g} s")
        if process.returncode:
            raise GitFailed(_reason(said.decode("utf-8", "replace")) or f"git ended with {process.returncode}")


def _reason(said: str) -> str:
    """The line that says most: our own, or git's; never one that a server sent along."""
    lines = [line.strip() for line in said.splitlines()]
    for start in ("hive:", "fatal:", "error:"):
        if found := next((line for line in lines if line.startswith(start)), ""):
            return found
    return ""


def _said(text: str) -> str:
    return quoted(text[:NOTE_LIMIT])


def _place(seat: Seat, path: str) -> str:
    """Where the clone is that the settings have at /projects/WORD."""
    return os.path.join(seat.projects_dir, os.path.basename(path))


def _is_there(path: str) -> bool:
    return os.path.lexists(path)


def _remove(folder: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if os.path.islink(folder) or not os.path.isdir(folder):
            os.unlink(folder)
        else:
            shutil.rmtree(folder)


def told_of(projects: list[Project], seat: Seat) -> str:
    """What an agent is told of its projects, each time the same: for its system prompt."""
    lines = []
    for project in projects:
        name, push = project["name"], project.get("push", f"{seat.agent}/*")
        may = f"push to {push}" if push else "not push"
        lines.append(f"- {_place(seat, project.get('path', name))}, a clone of hive://{name}: you may {may}")
    return "Your repositories, fetched before each turn:\n" + "\n".join(lines) if lines else ""
