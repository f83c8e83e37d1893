"""The daemon: opens everything in order, wires it, and serves it in one nursery. An agent's own is in agent_doors."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx2
import trio
import trio_asyncio
from jinja2 import Environment, PackageLoader, StrictUndefined

from dashboard.app import build_app
from hive_core.agent_doors import AgentDoors
from hive_core.config import Config
from hive_core.containers.choice import Choice, choose_sandbox, make_driver
from hive_core.containers.driver import Driver
from hive_core.containers.host_process import HostProcessDriver
from hive_core.credentials import Credentials
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
from hive_core.procedures.walk import Walk
from hive_core.programs import find_claude
from hive_core.protocol.paths import explain, host_socket
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import PERSONA_LIMIT_BYTES, parse_text
from hive_core.services.access import Access
from hive_core.services.agents import Agents
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
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.tcp import listen_dashboard
from hive_core.sockets.unix import listen_unix, serve_unix
from hive_core.store.door import Store, open_store
from hive_core.store.errors import StoreBusy
from hive_core.systemd import notify, serve_watchdog

log = logging.getLogger(__name__)
STOP_WITHIN_S = 4.0
TIED_AGENTS_PATIENCE_S = 1.0
PRUNE_EVERY_S = 3600.0


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
        uids = UidRanges(store, str(config.state_dir))
        driver = make_driver(
            config, choice, claude=claude, life_fd=life_fd, first_uid=uids.first_uid, at_end=stack.callback
        )
        doors = AgentDoors(config)
        hive = await _wire(config, store, choice, driver, claude, doors)
        stack.push_async_callback(hive.ledger.aclose)
        stack.push_async_callback(hive.forges.aclose)
        await _load(hive)
        stack.push_async_callback(hive.connections.flush, sums=True)
        client = await stack.enter_async_context(
            httpx2.AsyncClient(
                limits=httpx2.Limits(max_connections=None),
                timeout=httpx2.Timeout(30.0, read=600.0),
                follow_redirects=False,
                trust_env=True,
            )
        )
        doors.hive, doors.client = hive, client
        await hive.gate.ensure_manager(manager_prompt(config))
        await hive.pinned.load()
        yield hive


async def _wire(
    config: Config, store: Store, choice: Choice, driver: Driver, claude: Path | None, doors: AgentDoors
) -> Hive:
    """Every service, each with those that it asks. Nothing is read from the store yet. Raises Refusal."""
    access = Access(store.bus)
    agents = Agents(
        store,
        manager_port=config.manager_port,
        agent_ports=config.agent_port_range,
        sandbox=choice.sandbox,
        access=access,
    )
    broker = _wire_broker(config, store, choice, access, doors)
    locks = AgentLocks()
    reconciler = Reconciler(
        store, agents, driver, doors.dirs, doors.may_run, doors.serve, broker.put_back, config, locks=locks
    )
    approvals, repos = Approvals(store), Repos(config.state_dir)
    deployments = await make_deployments(config, choice, store, repos, locks, driver)
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
    return Hive(
        config=config,
        store=store,
        broker=broker,
        turns=Turns(store, line_quota_bytes=config.line_quota_bytes),
        agents=agents,
        approvals=approvals,
        gate=gate,
        reconciler=reconciler,
        keeper=Keeper(config.state_dir, doors.run_dir),
        sign_ins=SignIns(store),
        credentials=Credentials(config.state_dir),
        claude=claude,
        pinned=_wire_pinned(config, store, choice, driver),
        sandbox=choice.sandbox,
        sandbox_trouble=choice.trouble,
        sandbox_weakness=choice.weakness,
        bwrap_trouble=choice.bwrap_trouble,
    )


def _wire_broker(config: Config, store: Store, choice: Choice, access: Access, doors: AgentDoors) -> Broker:
    return Broker(
        store,
        config,
        bodies=Bodies(config.state_dir / "bodies", store),
        access=access,
        ledger=Ledger(store, access, load_prices(config.prices), config),
        silent=doors.lost_turn,
        delivery=FileDelivery(store, config.state_dir, bare=choice.sandbox == "none"),
    )


def _wire_pinned(config: Config, store: Store, choice: Choice, driver: Driver) -> PinnedClaude:
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
    return pinned


async def _load(hive: Hive) -> None:
    """What services keep in memory of the store."""
    await hive.agents.load()
    await hive.snapshots.load()
    await hive.freeze.load()
    await hive.breaker.load()
    await hive.ledger.load()
    await hive.connections.load()
    await hive.gate.load()


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
