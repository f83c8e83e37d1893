"""The doors of one agent: the sockets that its container sees, and its page."""

from __future__ import annotations

import contextlib
import logging
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import httpx2
import trio
from starlette.types import ASGIApp

from dashboard.app import at_home, build_app
from hive_core.config import Config
from hive_core.containers.mounts import AgentDirs, agent_dirs, run_dir
from hive_core.hive import Hive
from hive_core.procedures.desk import Desk
from hive_core.protocol.words import MANAGER, AgentName
from hive_core.services.agents import Agent
from hive_core.sockets.git import GitDesk
from hive_core.sockets.harness import HarnessDesk
from hive_core.sockets.http import serve_asgi
from hive_core.sockets.model import ModelRelay
from hive_core.sockets.tcp import listen_tcp
from hive_core.sockets.unix import listen_unix, serve_unix

log = logging.getLogger(__name__)
SOCKETS = ("harness", "mcp", "model", "egress", "git")  # of each agent


class AgentDoors:
    """Opens what each agent gets of the host. Services are made with it, before there is a hive: it is given later."""

    hive: Hive
    client: httpx2.AsyncClient  # to the model provider

    def __init__(self, config: Config) -> None:
        self._config = config
        self._desks: dict[AgentName, HarnessDesk] = {}

    def dirs(self, name: AgentName) -> AgentDirs:
        return agent_dirs(self._config.state_dir, self._config.runtime_dir, name)

    def run_dir(self, name: AgentName) -> Path:
        return run_dir(self._config.runtime_dir, name)

    def lost_turn(self, name: AgentName, silence_s: float) -> None:
        """The harness of an agent said nothing for so long, and its turn was taken away."""
        if (desk := self._desks.get(name)) is not None:
            desk.lost_turn(silence_s)

    def may_run(self, agent: Agent) -> str | None:
        """The sentence that says why an agent may not be started here, or None."""
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
        harness = self._harness_desk(agent)
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
        relay = self._model_relay(name, harness)
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

    def _harness_desk(self, agent: Agent) -> HarnessDesk:
        hive, name = self.hive, agent.name
        return HarnessDesk(
            name,
            agent.role,
            hive.broker,
            hive.turns,
            hive.agents,
            hive.background,
            partial(hive.breaker.kind_for, name),
            partial(hive.breaker.claimed, name),
            partial(hive.mirrors.of, name),
        )

    def _model_relay(self, name: AgentName, harness: HarnessDesk) -> ModelRelay:
        hive = self.hive
        return ModelRelay(
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

    @cached_property
    def _pages(self) -> ASGIApp:
        return build_app(self.hive)

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
