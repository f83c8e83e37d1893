"""Claude Code: its process. How that is started stands in claude_command, what its stream says in claude_stream.

One process takes many turns: a line of stdin begins one, a `result`
ends it, in a hundredth of a second where a new process takes half of one. The rehearsal takes the same flags and speaks
the same stream.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import trio

from hive_agent.claude_command import (
    environment,
    flags,
    make_own_folders,
    passing_session_flags,
    session_flags,
    user_line,
)
from hive_agent.claude_stream import DENIED, NO_TOOLS, Report, begins_turn
from hive_agent.claude_usage import added
from hive_agent.errands import GO_ON, SHOW_COST, compact, run_errand
from hive_agent.program import Command, Line, Program
from hive_agent.refusals import ASK_BEHIND_CALLS
from hive_agent.runner import Activity, Checked, Ending, Runner, Seat
from hive_agent.turn_lines import hive_line
from hive_agent.wake import wake_prompt
from hive_agent.watch import Stuck, Watch, cpu_of_descendants_s
from hive_core.protocol.harness import TURN_SILENCE_S, WARM_IDLE_S, WARM_MEMORY_MIB, WARM_TURNS
from hive_core.protocol.lines import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hive_agent.errands import Attempt
    from hive_core.protocol.harness import Check, Lease, Outcome, Settings

INTERRUPT_S = 5.0  # that a program which is asked to end its turn has for it
LATE_S = 3.0  # that a program which has told its result may take to end, before it is shown as one that does not
NEVER_STARTED_TWICE = 2  # turns in a row: the session that they were to go on with is given up
BETWEEN_LIMIT = 100  # lines that are kept of what is printed between two turns
INTERRUPT = encode({"type": "control_request", "request_id": "interrupt", "request": {"subtype": "interrupt"}})


class Claude(Runner):
    name = "claude"

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        self._program: Program | None = None
        self._command: Command | None = None  # of the one that runs, but for its session
        self._session: str | None = None
        self._turns = 0
        self._last: dict[str, Any] | None = None  # the result of its last turn
        self._idle_until = 0.0
        self._between: list[str] = []  # what was printed since
        self._unwanted = trio.Event()
        self._never_started = 0  # turns in a row

    def executable(self) -> list[str] | None:
        return [self.seat.claude] if self.seat.claude else None

    def interrupt(self) -> None:
        self._unwanted.set()

    async def take_turn(self, lease: Lease, pass_on: Callable[[str], None]) -> Ending:
        self._unwanted, self.asked = trio.Event(), None
        usage: dict[str, Any] | None = None
        lost = False

        async def attempt(session: str | None, prompt: str) -> tuple[Report, Ending]:
            nonlocal usage, lost
            report, ending = await self._persist(lease, session, prompt, pass_on)
            usage, lost = added(usage, ending.usage), lost or ending.session_lost
            return report, ending

        ending = await self._play(lease, attempt, pass_on)
        return replace(ending, usage=usage, session_lost=lost)

    async def check(self, check: Check) -> Checked:
        await self.close()
        try:
            prompt = check.get("prompt")
            report, ending = await self._attempt(check, None, prompt or SHOW_COST, lambda line: None)
            if not report.began:
                return Checked(ending.error or "it said nothing of itself", ending.reason)
            if not report.has_tools:
                return Checked(NO_TOOLS, "no_tools")
            without = tuple(check["settings"].get("mcp_servers", {}).keys() - report.connected)
            return Checked("" if prompt is None else ending.error or "", ending.reason, without)
        finally:
            await self.close()
            self._never_started = 0

    async def _play(self, lease: Lease, attempt: Attempt, pass_on: Callable[[str], None]) -> Ending:
        """All prompts of a turn: one, unless it is an errand or too long."""
        if lease["message"] is None:
            return await run_errand(lease, attempt)
        prompt = wake_prompt(lease["message"], lease["waiting"], lease["refused"], lease.get("notes", ()))
        for note in lease.get("notes", ()):
            self._note(hive_line("project", text=note))
        report, ending = await attempt(lease["session"], prompt)
        if ending.reason != "prompt_too_long" or ending.session is None:
            return ending
        pass_on(hive_line("too_long", error=ending.error, then="compact, and try once more"))
        compacted = await compact(ending.session, attempt)
        if compacted.outcome == "failed":
            return ending
        if compacted.outcome != "done":
            return compacted
        return (await attempt(ending.session, prompt + (GO_ON if report.worked else "")))[1]

    async def _persist(
        self, lease: Lease, session: str | None, prompt: str, pass_on: Callable[[str], None]
    ) -> tuple[Report, Ending]:
        """One prompt, whatever became meanwhile of the process and the session that it is for."""
        if session is not None and self._never_started >= NEVER_STARTED_TWICE:
            return await self._without(session, lease, prompt, pass_on)
        kept = self._program is not None
        report, ending = await self._attempt(lease, session, prompt, pass_on)
        if kept and not report.began and not self._unwanted.is_set() and self._program is None:
            # It had ended since its last turn, and nobody had seen it yet.
            report, ending = await self._attempt(lease, session, prompt, pass_on)
        if session is not None and report.session_lost:
            return await self._without(session, lease, prompt, pass_on)
        return report, ending

    async def _without(
        self, session: str, lease: Lease, prompt: str, pass_on: Callable[[str], None]
    ) -> tuple[Report, Ending]:
        """The prompt in a session of its own, where the one to go on with is lost."""
        pass_on(hive_line("session_lost", session=session))
        report, ending = await self._attempt(lease, None, prompt, pass_on)
        return report, replace(ending, session_lost=True)

    async def rest(self) -> bool:
        """Keep the process until it was idle for long enough; end one that begins a turn which nobody asked for."""
        if self._program is None:
            return False
        began = False
        stray = Report()

        def read_stdout(line: Line) -> bool:
            self._note(stray.read_stdout(line))
            return begins_turn(line)

        with trio.CancelScope(deadline=self._idle_until):
            began = await self._program.read(read_stdout, lambda line: self._note(stray.read_stderr(line)))
        if began:
            self._note(hive_line("unasked_turn", error="the program began a turn by itself, and was ended"))
            await self._kill()
        await self.close()
        return began

    async def close(self) -> None:
        await self._finish()

    async def _attempt(
        self, lease: Lease | Check, session: str | None, prompt: str, pass_on: Callable[[str], None]
    ) -> tuple[Report, Ending]:
        """One prompt to a process, which may be a new one."""
        settings, executable = lease["settings"], self.executable()
        if executable is None:
            why = f"cannot start {self.name}: this host has no {self.name} program; install it"
            return Report(), Ending("waiting", session, why, reason="no_program")
        try:
            program = await self._ready(executable, lease, session)
        except OSError as exc:
            why = f"cannot start {executable[0]}: {exc.strerror}"
            return Report(), Ending("waiting", session, why, reason="no_program")
        for line in self._between:
            pass_on(line)
        self._between.clear()
        report = Report(self._last, settings.get("context_window"))
        if self.asked is None:
            self.asked = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()
        try:
            ended, stuck = await self._listen(program, user_line(prompt), report, pass_on, silence_s(settings))
            self._turns += 1
            self._session, self._last = report.session, report.result
            self._never_started = self._never_started + 1 if stuck and stuck.kind == "never_started" else 0
            if stuck is not None:
                # Who has not begun has nothing to finish.
                await (self._kill() if stuck.kind == "never_started" else self._finish())
                return report, self._cut(report, session, "failed", "stuck", f"the turn was stuck: {stuck.sentence}")
            if self._unwanted.is_set():
                await self._finish()
                return report, self._cut(report, session, "cancelled", "cancelled", "the host has taken this turn away")
            if ended and report.began and report.has_tools and self._stays(program, settings):
                self._idle_until = trio.current_time() + settings.get("warm_idle_s", WARM_IDLE_S)
                return report, report.ending(None)
            return report, report.ending(await self._end(report, pass_on))
        except BaseException:
            await self._kill()
            raise

    def _cut(self, report: Report, session: str | None, outcome: Outcome, reason: str, error: str) -> Ending:
        """How a turn ended that was not let go on."""
        told = report.usage(), reason, None, report.context()
        return Ending(outcome, report.session or session, error, *told)

    async def _ready(self, executable: list[str], lease: Lease | Check, session: str | None) -> Program:
        """The process for a turn: the one that runs, if it is still the right one. Raises OSError."""
        seat, settings = self.seat, lease["settings"]
        variables = environment(seat, lease["credential"], settings.get("env"))
        command = Command([*executable, *flags(seat, settings)], variables, seat.state_dir)
        program = self._program
        if program is not None and not (program.runs and (command, session) == (self._command, self._session)):
            await self._finish()
        if self._program is None:
            make_own_folders(seat)
            argv = [*command.argv, *(passing_session_flags() if "check" in lease else session_flags(session))]
            self._program, self._command = await Program.start(replace(command, argv=argv)), command
            self._turns, self._last = 0, None
            if seat.egress_port:
                await self._program.tell(ASK_BEHIND_CALLS)
        return self._program

    async def _listen(
        self, program: Program, line: bytes, report: Report, pass_on: Callable[[str], None], silence_s: float
    ) -> tuple[bool, Stuck | None]:
        """Give the program its prompt and read until the turn has ended.

        False when the program ended instead, or had to; and why the turn was stuck, if it was.
        """
        ended, stuck = False, None
        self.seat.refusals.take()  # what was refused before this is not of its calls
        watch = Watch(report, silence_s, cpu_of_descendants_s)
        say, said = trio.open_memory_channel[bytes](math.inf)
        say.send_nowait(line)
        self.activity = report.activity

        def read_stdout(line: Line) -> bool:
            if (told := self.seat.refusals.answer(line)) is not None:
                say.send_nowait(told)
                watch.heard()
                return False
            passed = report.read_stdout(line)
            self.activity = report.activity if stuck is None else self.activity
            pass_on(passed)
            while report.replies:
                say.send_nowait(report.replies.pop())
                pass_on(hive_line("denied", error=DENIED))
            watch.heard()
            return report.result is not None

        with trio.CancelScope() as patience:

            async def tell() -> None:
                async for order in said:
                    await program.tell(order)

            async def obey() -> None:
                await self._unwanted.wait()
                patience.deadline = trio.current_time() + INTERRUPT_S
                say.send_nowait(INTERRUPT)

            async def look() -> None:
                nonlocal stuck
                stuck = await watch.stuck()
                self._show_stuck(stuck, pass_on)
                if stuck.kind == "never_started":
                    patience.cancel()
                self.interrupt()

            async with trio.open_nursery() as nursery:
                for task in (tell, obey, look):
                    nursery.start_soon(task)
                ended = await program.read(read_stdout, lambda line: pass_on(report.read_stderr(line)))
                nursery.cancel_scope.cancel()
        return ended, stuck

    def _show_stuck(self, stuck: Stuck, pass_on: Callable[[str], None]) -> None:
        self.activity = Activity("stuck", stuck.kind)
        pass_on(hive_line("stuck", kind=stuck.kind, error=stuck.sentence))

    def _stays(self, program: Program, settings: Settings) -> bool:
        """Whether the process is kept for the next turn."""
        return (
            settings.get("turns", "warm") == "warm"
            and self._turns < settings.get("warm_turns", WARM_TURNS)
            and program.memory_bytes() < settings.get("warm_memory_mib", WARM_MEMORY_MIB) * 1024 * 1024
        )

    def _note(self, line: str) -> None:
        if len(self._between) < BETWEEN_LIMIT:
            self._between.append(line)

    async def _end(self, report: Report, pass_on: Callable[[str], None]) -> int | None:
        """Let the process end behind its last turn, and show one that does not.

        Its exit code, None when it was killed.
        """
        program, self._program = self._program, None
        if program is None:
            return None

        async def show_late() -> None:
            await trio.sleep(LATE_S)
            told = "it has told its result and does not end" if report.result else "its output ended and it goes on"
            self._show_stuck(Stuck("not_ending", told), pass_on)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(show_late)
            code = await program.finish(
                lambda line: pass_on(report.read_stdout(line)), lambda line: pass_on(report.read_stderr(line))
            )
            nursery.cancel_scope.cancel()
        return code

    async def _finish(self) -> None:
        """End the process politely, if one runs."""
        program, self._program = self._program, None
        if program is not None:
            await program.finish()

    async def _kill(self) -> None:
        program, self._program = self._program, None
        if program is not None:
            await program.kill()


def silence_s(settings: Settings) -> float:
    return float(settings.get("turn_silence_s", TURN_SILENCE_S))
