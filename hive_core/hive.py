"""The hive as its doors see it: every service, opened and wired by the daemon."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from hive_core.config import Config
from hive_core.credentials import DEFAULT, Credential, Credentials
from hive_core.git.hive_secrets import known_secrets
from hive_core.kept import Keeper
from hive_core.procedures.destruction import Destruction
from hive_core.procedures.egress_desk import EgressDesk
from hive_core.procedures.forge_watch import ForgeWatch
from hive_core.procedures.forge_work import ForgeWork
from hive_core.procedures.forges import Forges
from hive_core.procedures.gate import Gate
from hive_core.procedures.kinds.destroy import Destroy
from hive_core.procedures.kinds.raise_budget import RaiseBudget
from hive_core.procedures.kinds.schedule_prompt import SchedulePrompt
from hive_core.procedures.kinds.update_claude import UpdateClaude
from hive_core.procedures.logins import Logins
from hive_core.procedures.pinned_claude import PinnedClaude
from hive_core.procedures.projects import ProjectMirrors
from hive_core.procedures.pushes import GitServices
from hive_core.procedures.reconcile import Reconciler
from hive_core.procedures.snapshotting import Snapshotting
from hive_core.procedures.together import Together
from hive_core.protocol.words import AgentName
from hive_core.services.access import Access
from hive_core.services.agents import Agents
from hive_core.services.approvals import Approvals
from hive_core.services.archive import Archive
from hive_core.services.background import Background
from hive_core.services.breaker import Breaker
from hive_core.services.broker import Broker
from hive_core.services.connections import Connections
from hive_core.services.disk_use import DiskUses
from hive_core.services.freeze import Freeze
from hive_core.services.ledger import Ledger
from hive_core.services.loose_ends import LooseEnds
from hive_core.services.questions import Questions
from hive_core.services.reminders import Reminders
from hive_core.services.retention import Retention
from hive_core.services.schedules import Schedules
from hive_core.services.sign_ins import SignIns
from hive_core.services.steering import Steering
from hive_core.services.tombstones import Tombstones
from hive_core.services.turn_records import TurnRecords
from hive_core.services.turns import Turns
from hive_core.store.door import Store

HOST_NAME = "hive.localhost"


@dataclass
class Hive:
    config: Config
    store: Store
    broker: Broker
    turns: Turns
    agents: Agents
    approvals: Approvals
    gate: Gate
    reconciler: Reconciler
    keeper: Keeper
    sign_ins: SignIns
    credentials: Credentials
    claude: Path | None  # the agent program that agents run
    pinned: PinnedClaude
    sandbox: str  # what agents run in: "bwrap", "nspawn" or "none"
    sandbox_trouble: str | None  # why what is set does not work here, and what would mend it
    sandbox_weakness: str | None = None  # what it does not do here, and what would mend it
    bwrap_trouble: str | None = None  # why there is no bubblewrap, which logins run in
    dashboard_port: int = 0  # the port that is really bound; 0 until it is
    page_ports: dict[str, int] = field(default_factory=dict)  # agent → the port its page is really served on
    stopping: trio.Event = field(default_factory=trio.Event)
    connections: Connections = field(init=False)
    egress: EgressDesk = field(init=False)
    freeze: Freeze = field(init=False)
    breaker: Breaker = field(init=False)
    logins: Logins = field(init=False)
    archive: Archive = field(init=False)
    retention: Retention = field(init=False)
    questions: Questions = field(init=False)
    reminders: Reminders = field(init=False)
    schedules: Schedules = field(init=False)
    background: Background = field(init=False)
    steering: Steering = field(init=False)
    turn_records: TurnRecords = field(init=False)
    loose_ends: LooseEnds = field(init=False)
    disk: DiskUses = field(init=False)
    mirrors: ProjectMirrors = field(init=False)
    git_services: GitServices = field(init=False)
    snapshots: Snapshotting = field(init=False)
    tombstones: Tombstones = field(init=False)
    destruction: Destruction = field(init=False)
    together: Together = field(init=False)
    schedule_prompt: SchedulePrompt = field(init=False)
    raise_budget: RaiseBudget = field(init=False)
    destroy: Destroy = field(init=False)
    update_claude: UpdateClaude = field(init=False)
    forges: Forges = field(init=False)
    forge_work: ForgeWork = field(init=False)
    forge_watch: ForgeWatch = field(init=False)

    def __post_init__(self) -> None:
        self.pinned.when_used(self._use_claude)
        self.freeze = Freeze(self.store, self.access)
        self.connections = Connections(self.store, self.config)
        self.egress = EgressDesk(
            self.store,
            self.access,
            self.connections,
            self.config,
            self.ledger.running,
            self.gate.egress.wish,
            self.own_ports,
        )
        self.breaker = Breaker(self.store, self.credentials, self.access, self.broker.limits)
        self.ledger.windows = self.breaker.windows_used
        self.mirrors = ProjectMirrors(self.store, self.broker.limits, self.config.state_dir)
        self.git_services = GitServices(
            self.store, self.mirrors, self.credentials, self.access, self.broker.limits, self.config.state_dir
        )
        self.disk = DiskUses(self.store, self.broker.limits, self.config.state_dir)
        self.snapshots = Snapshotting(
            self.store, self.agents, self.access, self.reconciler, self.broker.limits, self.config.state_dir
        )
        self.tombstones = Tombstones(self.store)
        self.destruction = Destruction(
            self.store, self.agents, self.reconciler, self.tombstones, self.keeper, self.broker, self.gate.walk
        )
        self.together = Together(self.store, self.approvals, self.gate)
        self.logins = Logins(self.store.bus, self.credentials, self.breaker, self.claude, self.bwrap_trouble)
        self.archive = Archive(self.store, self.config, self.config.bodies_dir)
        self.retention = Retention(self.store, self.config, self.archive.index)
        limits = self.broker.limits
        self.questions = Questions(self.store, limits, self.broker.bodies)
        self.reminders = Reminders(self.store, limits)
        self.schedules = Schedules(self.store, limits)
        self.background = Background(self.store, limits)
        self.steering = Steering(self.store)
        self.schedule_prompt = SchedulePrompt(self.gate.asking, self.schedules)
        self.raise_budget = RaiseBudget(self.gate.asking, self.ledger)
        self.destroy = Destroy(self.gate.asking, self.agents, self.tombstones)
        self.update_claude = UpdateClaude(self.gate.asking, self.agents, self.reconciler, self.pinned)
        self.gate.add(self.schedule_prompt, self.raise_budget, self.destroy, self.update_claude)
        self.turn_records = TurnRecords(self.store)
        self.forges = Forges(self.store, self.config.state_dir, self.config.lane)
        self.forge_work = ForgeWork(
            self.forges,
            self.agents.access,
            limits,
            partial(known_secrets, self.config.state_dir, self.credentials),
        )
        self.forge_watch = ForgeWatch(self.forges, self.config.lane, limits)
        self.loose_ends = LooseEnds(self.store, self.questions, self.reminders, self.schedules, self.background)

    def own_ports(self) -> set[int]:
        """Those that this hive serves on this machine."""
        return {self.dashboard_port, *self.page_ports.values()} - {0}

    def _use_claude(self, path: Path | None, only: AgentName | None = None) -> None:
        if only is None:
            self.claude = self.logins.claude = path

    @property
    def ledger(self) -> Ledger:
        return self.broker.ledger

    @property
    def access(self) -> Access:
        return self.agents.access

    @property
    def credential(self) -> Credential | None:
        """The one that agents use whose settings name no other."""
        return self.credentials.find(DEFAULT)

    @property
    def credential_missing(self) -> str:
        """Why there is none, and how to give one; empty when there is."""
        return self.credentials.missing(DEFAULT)

    @property
    def unsafe(self) -> bool:
        """Whether real programs run without a sandbox: shown in red on every page and in `hive list`."""
        return self.config.unsafe_no_sandbox

    def dashboard_url(self) -> str:
        return f"http://{HOST_NAME}:{self.dashboard_port}"

    def sign_in_url(self) -> str:
        """A link that signs one browser in, once."""
        return f"{self.dashboard_url()}/sign-in?code={self.sign_ins.new_code()}"

    def page_url(self, name: str) -> str:
        """Where an agent's page is: on its own port where that could be bound, else under the dashboard."""
        if port := self.page_ports.get(name):
            return f"http://{HOST_NAME}:{port}"
        return f"{self.dashboard_url()}/agents/{name}"
