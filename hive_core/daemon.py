"""The daemon: opens everything in order, wires it, and serves it in one nursery. Nothing else wires."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import httpx2
import trio
import trio_asyncio
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.types import ASGIApp

from dashboard.app import at_home, build_app
from hive_core.config import Config
from hive_core.containers.choice import choose_sandbox, make_driver
from hive_core.containers.host_process import HostProcessDriver
from hive_core.containers.mounts import AgentDirs, agent_dirs, run_dir
from hive_core.credentials import Credential, Credentials, find_credential, how_to_give_one
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.repos import Repos
from hive_core.hive import Hive
from hive_core.kept import Keeper
from hive_core.lock import take_lock
from hive_core.prices import load_prices
from hive_core.procedures.clock import Timer, serve_clock
from hive_core.procedures.flake_deployments import make_deployments
from hive_core.procedures.gate import Gate
from hive_core.procedures.pinned_claude import PinnedClaude, why_unpinned
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.supervise import Desk
from hive_core.procedures.walk import Walk
from hive_core.programs import find_claude
from hive_core.protocol.paths import explain, host_socket
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, PERSONA_LIMIT_BYTES, AgentName, parse_text
from hive_core.services.access import Access
from hive_core.services.agents import Agent, Agents
from hive_core.services.approvals import Approvals
from hive_core.services.bodies import Bodies
from hive_core.services.broker import Broker
from hive_core.services.file_delivery import FileDelivery
from hive_core.services.ledger import Ledger
from hive_core.services.rests import Rests
from hive_core.services.sign_ins import SignIns
from hive_core.services.tool_calls import forget_old_tool_calls
from hive_core.services.turns import Turns
from hive_core.services.uid_ranges import UidRanges
from hive_core.sockets.admin import AdminDesk
from hive_core.sockets.git import GitDesk
from hive_core.sockets.harness import HarnessDesk
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay
from hive_core.sockets.unix import listen_unix, serve_unix
from hive_core.store.door import open_store
from hive_core.store.schema import StoreBusy
from hive_core.systemd import notify, serve_watchdog

log = logging.getLogger(__name__)
STOP_WITHIN_S = 4.0
SLOW_READER_MS = 20_000
TIED_AGENTS_PATIENCE_S = 1.0
PRUNE_EVERY_S = 3600.0
SOCKETS = ("harness", "mcp", "model", "egress", "git")  # of each agent


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when the port is busy or the host is not this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # hypercorn's writes cannot be cancelled: without this a reader that does not read would hold up a stop.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SLOW_READER_MS)
        sock.bind((host, port))
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def listen_dashboard(config: Config) -> socket.socket:
    try:
        return listen_tcp(config.dashboard_host, config.dashboard_port)
    except OSError as exc:
        where = f"{config.dashboard_host}:{config.dashboard_port}"
        setting = "dashboard_port" if exc.errno in (errno.EADDRINUSE, errno.EACCES) else "dashboard_host"
        raise Refusal("refused", f"cannot serve the dashboard on {where}: {explain(exc, setting)}") from None


def look_for_credential(config: Config) -> tuple[Credential | None, str]:
    """The credential, or why there is none: a hive without one still starts, and says so."""
    try:
        credential = find_credential(config.state_dir)
    except Refusal as refusal:
        return None, refusal.message
    return credential, "" if credential else how_to_give_one(config.state_dir)


def _templates(config: Config) -> Environment:
    templates = Environment(
        loader=PackageLoader("hive_core"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    templates.globals["operator_pronouns"] = config.operator_pronouns
    return templates


def manager_prompt(config: Config) -> str:
    """hm1nd's first CLAUDE.md. Raises Refusal when the one that was chosen cannot be read."""
    path = config.manager_prompt
    if path is None:
        templates = Environment(loader=PackageLoader("hive_mind"), undefined=StrictUndefined)
        return templates.get_template("CLAUDE.md.j2").render(operator_pronouns=config.operator_pronouns)
    try:
        # Checked before it is committed: with one that is no good in hm1nd's repository no start would come through.
        return parse_text(path.read_text("utf-8"), f"manager_prompt {path}", PERSONA_LIMIT_BYTES)
    except Refusal as refusal:
        raise Refusal("usage", f"{refusal.message}; mend it, or set manager_prompt to another") from None
    except OSError as exc:
        why = explain(exc, "manager_prompt")
    except UnicodeDecodeError as exc:
        why = f"byte {exc.start} is not UTF-8; save it as UTF-8, or set manager_prompt to another"
    raise Refusal("usage", f"cannot use {path} as manager_prompt: {why}")


@asynccontextmanager
async def open_hive(config: Config, life_fd: int | None = None) -> AsyncIterator[Hive]:
    """Open the state directory and every service on it; nothing listens yet. Raises Refusal or StoreError."""
    claude = find_claude(config.claude)
    async with AsyncExitStack() as stack:
        for folder in (config.state_dir, config.runtime_dir):
            stack.callback(os.close, take_lock(folder))
        choice = await trio.to_thread.run_sync(choose_sandbox, config, claude)
        await stack.enter_async_context(trio_asyncio.open_loop())
        store = await stack.enter_async_context(open_store(config.database, ballast=True))
        access = Access(store.bus)
        agents = Agents(
            store,
            manager_port=config.manager_port,
            agent_ports=config.agent_port_range,
            sandbox=choice.sandbox,
            access=access,
        )
        approvals, repos = Approvals(store), Repos(config.state_dir)
        locks, uids = AgentLocks(), UidRanges(store, str(config.state_dir))
        driver = make_driver(
            config, choice, claude=claude, life_fd=life_fd, first_uid=uids.first_uid, at_end=stack.callback
        )
        deployments = await make_deployments(config, choice, store, repos, locks, driver)
        rooms = _Rooms(config)
        ledger = Ledger(store, access, load_prices(config.prices), config)
        stack.push_async_callback(ledger.aclose)
        bodies = Bodies(config.state_dir / "bodies", store)
        delivery = FileDelivery(store, config.state_dir, bare=choice.sandbox == "none")
        broker = Broker(
            store, config, bodies=bodies, access=access, ledger=ledger, silent=rooms.lost_turn, delivery=delivery
        )
        reconciler = Reconciler(
            store,
            agents,
            driver,
            rooms.dirs,
            rooms.may_run,
            rooms.serve,
            broker.put_back,
            config,
            locks=locks,
        )
        gate = Gate(
            store,
            agents,
            approvals,
            repos,
            deployments,
            Walk(store, repos, deployments, locks, reconciler),
            _templates(config),
            config,
            default_program=config.default_program,
            default_model=config.default_model,
            policy=config.policy,
            host_network=None if config.helper is None else config.host_network,
        )
        pinned = PinnedClaude(
            store,
            config.state_dir,
            config.claude,
            inside=choice.bwrap_trouble is None,
            hindrance=why_unpinned(config),
            is_helpers=config.helper is not None and config.sandbox != "nixos-container",
        )
        if isinstance(driver, HostProcessDriver):
            pinned.when_used(driver.use_claude)
        hive = Hive(
            config=config,
            store=store,
            broker=broker,
            turns=Turns(store, line_quota_bytes=config.line_quota_bytes),
            agents=agents,
            approvals=approvals,
            gate=gate,
            reconciler=reconciler,
            keeper=Keeper(config.state_dir, rooms.run_dir),
            sign_ins=SignIns(store),
            credentials=Credentials(config.state_dir),
            claude=claude,
            pinned=pinned,
            sandbox=choice.sandbox,
            sandbox_trouble=choice.trouble,
            sandbox_weakness=choice.weakness,
            bwrap_trouble=choice.bwrap_trouble,
        )
        stack.push_async_callback(hive.forges.aclose)
        await agents.load()
        await hive.snapshots.load()
        await hive.freeze.load()
        await hive.breaker.load()
        await ledger.load()
        await hive.connections.load()
        stack.push_async_callback(hive.connections.flush, sums=True)
        await gate.load()
        rooms.hive = hive
        rooms.client = await stack.enter_async_context(
            httpx2.AsyncClient(
                limits=httpx2.Limits(max_connections=None),
                timeout=httpx2.Timeout(30.0, read=600.0),
                follow_redirects=False,
                trust_env=True,
            )
        )
        await gate.ensure_manager(manager_prompt(config))
        await pinned.load()
        yield hive


class _Rooms:
    """What each agent gets of the host: its directories, its sockets, its page."""

    hive: Hive
    client: httpx2.AsyncClient

    def __init__(self, config: Config) -> None:
        self._config = config
        self._desks: dict[AgentName, HarnessDesk] = {}

    def dirs(self, name: AgentName) -> AgentDirs:
        return agent_dirs(self._config.state_dir, self._config.runtime_dir, name)

    @cached_property
    def _pages(self) -> ASGIApp:
        return build_app(self.hive)

    def run_dir(self, name: AgentName) -> Path:
        return run_dir(self._config.runtime_dir, name)

    def lost_turn(self, name: AgentName, silence_s: float) -> None:
        """The harness of an agent said nothing for so long, and its turn was taken away."""
        if (desk := self._desks.get(name)) is not None:
            desk.lost_turn(silence_s)

    def may_run(self, agent: Agent) -> str | None:
        program = (agent.settings or {}).get("program")
        if program == "claude" and self.hive.sandbox == "none" and not self.hive.unsafe:
            return f"{self.hive.sandbox_trouble}; or start with --unsafe-no-sandbox"
        if program == "claude" and self.hive.pinned.missing:
            return self.hive.pinned.missing
        if program == "claude" and self.hive.claude is None:
            return "claude is not installed: `npm install -g @anthropic-ai/claude-code`, then start the hive again"
        return self.hive.gate.hindrance(agent.name)

    async def serve(self, agent: Agent, task_status: trio.TaskStatus[Desk]) -> None:
        """Listen on an agent's sockets and its page until cancelled."""
        # Imported when the first agent is served: it takes half a second that a start need not wait for.
        agent_socket, manager_tools, forge_tools = await trio.to_thread.run_sync(_import_agent_sockets)
        hive, name, run = self.hive, agent.name, self.run_dir(agent.name)
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        kind = partial(hive.breaker.kind_for, name)
        limited = partial(hive.breaker.claimed, name)
        projects = partial(hive.mirrors.of, name)
        harness = HarnessDesk(
            name, agent.role, hive.broker, hive.turns, hive.agents, hive.background, kind, limited, projects
        )
        self._desks[name] = harness
        tools = agent_socket.AgentDesk(
            name,
            hive.broker,
            hive.agents,
            hive.archive,
            hive.loose_ends,
            manager_tools.ManagerTools(hive) if name == MANAGER else None,
            forge_tools.ForgeTools(name, hive.forge_work),
        )
        relay = ModelRelay(
            name,
            self.client,
            self._config.provider_base_url,
            hive.access,
            partial(hive.breaker.credential_for, name),
            partial(hive.breaker.answered, name),
            hive.ledger.call_ended,
            hive.ledger.call_begins,
            hive.ledger.call_moved,
            lambda: 0 if harness.checks.calls_model else hive.ledger.running(name),
            partial(hive.turns.note_unleased_call, name),
        )
        with contextlib.ExitStack() as opened:
            harness_sock, mcp_sock, model_sock, egress_sock, git_sock = (
                opened.enter_context(listen_unix(run / f"{each}.sock")) for each in SOCKETS
            )
            opened.pop_all()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_unix, harness_sock, harness.serve)
                nursery.start_soon(serve_unix, mcp_sock, partial(agent_socket.serve_agent, tools))
                nursery.start_soon(serve_asgi, relay, model_sock)
                nursery.start_soon(serve_unix, git_sock, GitDesk(name, hive.git_services).serve)
                self._serve_page(agent, nursery)
                nursery.start_soon(hive.egress.hold, name, egress_sock)
                task_status.started(harness)
        finally:
            self._desks.pop(name, None)
            hive.page_ports.pop(name, None)

    def _serve_page(self, agent: Agent, nursery: trio.Nursery) -> None:
        # With any-port dashboards (the demo, tests) the pages take any port too.
        anywhere = self._config.dashboard_port == 0
        try:
            sock = listen_tcp(self._config.dashboard_host, 0 if anywhere else agent.page_port)
        except OSError as exc:
            log.warning(
                "the page of %s has no port of its own (%d: %s); it is under %s",
                agent.name,
                agent.page_port,
                exc.strerror,
                self.hive.page_url(agent.name),
            )
            return
        self.hive.page_ports[agent.name] = sock.getsockname()[1]
        page = at_home(self._pages, agent.name)
        nursery.start_soon(partial(serve_asgi, page, sock, stopping=self.hive.stopping))


def _import_agent_sockets() -> list[ModuleType]:
    return [import_module(f"hive_core.sockets.{name}") for name in ("agent", "manager_tools", "forge_tools")]


async def serve_hive(hive: Hive, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Serve every door until hive.stopping is set. Agents are not ended by it."""
    config = hive.config
    page = listen_dashboard(config)
    hive.dashboard_port = page.getsockname()[1]
    admin = listen_unix(Path(host_socket(str(config.runtime_dir))), 0o660)
    timers: list[Timer] = [Rests(hive.broker.limits), hive.questions, hive.reminders, hive.schedules, hive.approvals]
    async with trio.open_nursery() as nursery:
        await nursery.start(hive.mirrors.serve)  # first: it clears up what is nobody's
        nursery.start_soon(serve_unix, admin, AdminDesk(hive).serve)
        nursery.start_soon(partial(serve_asgi, build_app(hive), page, stopping=hive.stopping))
        nursery.start_soon(hive.store.serve_backstop)
        nursery.start_soon(hive.store.wait_failed)
        await nursery.start(hive.reconciler.serve)  # which the gate waits for
        nursery.start_soon(hive.gate.serve)
        nursery.start_soon(hive.gate.upkeep.serve)
        nursery.start_soon(hive.pinned.serve)
        nursery.start_soon(hive.update_claude.look)
        nursery.start_soon(hive.broker.serve_leases)
        nursery.start_soon(hive.access.serve, hive.store)
        nursery.start_soon(hive.agents.serve)
        nursery.start_soon(hive.breaker.serve)
        nursery.start_soon(hive.ledger.serve)
        nursery.start_soon(hive.connections.serve)
        nursery.start_soon(hive.egress.serve)
        nursery.start_soon(hive.logins.serve)
        nursery.start_soon(hive.archive.index.serve)
        nursery.start_soon(serve_clock, hive.store, timers)
        nursery.start_soon(_serve_pruning, hive)
        nursery.start_soon(hive.destruction.serve)
        nursery.start_soon(hive.disk.serve)
        nursery.start_soon(hive.snapshots.serve)
        nursery.start_soon(hive.forge_watch.serve)
        nursery.start_soon(serve_watchdog)
        gc.freeze()  # what was loaded stays: to look through it at each collection is a tenth of a busy daemon's work
        task_status.started()
        notify("READY=1")
        log.info("ready: %s, state in %s", hive.dashboard_url(), config.state_dir)
        await hive.stopping.wait()
        notify("STOPPING=1")
        if config.end_agents_with_daemon:
            await hive.reconciler.drain(TIED_AGENTS_PATIENCE_S)
        nursery.cancel_scope.deadline = trio.current_time() + 0.5  # answers under way get this long
        await trio.sleep_forever()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(host_socket(str(config.runtime_dir)))


async def _serve_pruning(hive: Hive) -> None:
    while True:
        try:
            await keep_house(hive)
        except StoreBusy as busy:  # a full disk, say: what is old can go an hour later
            log.warning("cannot forget what is old: %s", busy.message)
        await trio.sleep(PRUNE_EVERY_S)


async def keep_house(hive: Hive) -> None:
    """Remove what is old: all of it by the clock that does not leap."""
    now_ms = await hive.retention.now_ms()
    await hive.turns.prune(now_ms)
    await hive.turn_records.prune(now_ms)
    await hive.background.prune(now_ms)
    await forget_old_tool_calls(hive.store, now_ms)
    await hive.connections.prune(now_ms)
    await hive.retention.forget_old()
    await hive.broker.sweep_bodies()


async def run_daemon(config: Config, life_fd: int | None = None) -> None:
    """Serve until SIGTERM, SIGINT or the end of the pipe `life_fd`; then stop within 5 s and interrupt no turn."""
    # Ours stays open until this process ends, whichever way: agents watch theirs. A pipe could be opened again
    # through /proc, and its watchers kept waiting by one of them; a socket cannot.
    theirs, ours = socket.socketpair()
    agents_life_fd = theirs.fileno() if config.end_agents_with_daemon else None
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with open_hive(config, agents_life_fd) as hive, trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, hive)
            nursery.start_soon(_insist, hive)
            if life_fd is not None:
                nursery.start_soon(_stop_on_end_of, life_fd, hive)
            await serve_hive(hive)
            nursery.cancel_scope.cancel()
    ours.close()


async def _stop_on_signal(signals: AsyncIterator[int], hive: Hive) -> None:
    async for number in signals:
        log.info("stopping on %s", signal.Signals(number).name)
        hive.stopping.set()


async def _insist(hive: Hive) -> None:
    """A stop takes at most so long, whoever does not read or answer."""
    await hive.stopping.wait()
    await trio.sleep(STOP_WITHIN_S)
    log.error("did not stop within %.0f s; ending all the same", STOP_WITHIN_S)
    sys.stderr.flush()
    os._exit(1)


async def _stop_on_end_of(life_fd: int, hive: Hive) -> None:
    await trio.lowlevel.wait_readable(life_fd)
    log.info("stopping: whoever started this daemon is gone")
    hive.stopping.set()


def run(config: Config, life_fd: int | None = None) -> None:
    """Run the daemon to its end."""
    trio.run(run_daemon, config, life_fd)
