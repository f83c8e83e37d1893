"""What `hive doctor` looks at. Each check does what the daemon would do, leaves nothing behind, and is one line."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hive_core.cli.check_forges import look_at_forges
from hive_core.cli.check_helper import look_at_helper
from hive_core.cli.check_proxy import look_at_proxy
from hive_core.cli.client import Client
from hive_core.cli.doctor import Finding, Progress, Status
from hive_core.cli.up import SANDBOXES, orphans
from hive_core.config import Config, load_config
from hive_core.containers.choice import Choice, choose_sandbox
from hive_core.containers.groups import bounds_of, choose_groups
from hive_core.containers.nspawn import look_for_nspawn
from hive_core.containers.program_check import check_program
from hive_core.containers.scopes import SLICE, Scopes
from hive_core.containers.seccomp import filter_program
from hive_core.credentials import DEFAULT, Credentials
from hive_core.daemon import manager_prompt
from hive_core.flakes.building import nix_trouble
from hive_core.lock import check_owner
from hive_core.policy_rules import troubles
from hive_core.prices import load_prices
from hive_core.programs import find_claude, how_to_get_claude
from hive_core.protocol.paths import config_files, explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import counted
from hive_core.protocol.words import MANAGER
from hive_core.sockets.tcp import listen_dashboard, listen_tcp
from hive_core.sockets.unix import listen_unix
from hive_core.store.ballast import BALLAST_BYTES, ROOM_BYTES
from hive_core.store.door import open_writer
from hive_core.store.errors import StoreError, cannot_open
from hive_core.store.schema import check_ours
from hive_core.version import __version__

DAEMON_PATIENCE_S = 5.0
LITTLE_SPACE_BYTES = 1024**3
MIB = 1024**2


@dataclass
class Machine:
    """What the checks know of each other."""

    config: Config
    daemon: dict[str, Any] | None = None  # the status of the one that runs
    bwrap_works: bool = False

    def is_kept(self, folder: Path) -> bool:
        """Whether the daemon that runs has a directory of another user's: what we may do there says nothing of it."""
        ours = self.daemon is not None and self.daemon["state_dir"] == str(self.config.state_dir)
        return ours and folder.exists() and folder.stat().st_uid != os.geteuid()

    @property
    def agents_need(self) -> Status:
        """How bad it is to lack what real agents need: a hive of rehearsals runs without."""
        return "trouble" if self.config.default_program == "claude" else "warning"


def look(progress: Progress) -> Iterator[Finding]:
    """Every check in turn. Without a configuration there is nothing to look at."""
    progress("the configuration")
    try:
        machine = Machine(load_config({}))
        manager_prompt(machine.config)
        load_prices(machine.config.prices)
    except Refusal as refusal:
        yield Finding("configuration", "trouble", refusal.message)
        return
    file = next((path for path in config_files() if os.path.exists(path)), None)
    yield Finding("configuration", "ok", file or "no file, so the defaults and HIVE_* variables count")
    for name, check in CHECKS.items():
        progress(name)
        try:
            yield from check(name, machine)
        except (Refusal, StoreError) as exc:
            yield Finding(name, "trouble", str(exc))
        except OSError as exc:
            yield Finding(name, "trouble", explain(exc))


def check_daemon(name: str, machine: Machine) -> Iterator[Finding]:
    try:
        client = Client(str(machine.config.runtime_dir))
    except Refusal as refusal:
        if refusal.code != "not_running":
            raise
        left = orphans()
        yield Finding(name, "warning" if left else "ok", f"none runs. {left}" if left else "none runs")
        return
    client.give_up_after(DAEMON_PATIENCE_S)
    try:
        machine.daemon = status = client.call("status")
    except TimeoutError:
        yield Finding(
            name, "trouble", f"one runs and did not answer within {DAEMON_PATIENCE_S:.0f} s; look at its log, end it"
        )
        return
    finally:
        client.close()
    if status["version"] != __version__:
        differ = f"the one that runs is {status['version']} and this command {__version__}"
        yield Finding(name, "warning", f"{differ}; `hive down; hive up` brings them together")
    elif status["state_dir"] != str(machine.config.state_dir):
        other = f"the one that runs keeps its state in {status['state_dir']}, not in {machine.config.state_dir}"
        yield Finding(name, "warning", f"{other}; set state_dir or runtime_dir to those of one hive")
    else:
        yield Finding(name, "ok", f"{__version__} runs, {status['dashboard']}")
    if outdated := status.get("outdated"):
        told = f"{counted(len(outdated), 'agent')} run as an older release started them ({', '.join(outdated[:6])})"
        why = status["update_trouble"] or "each is replaced at its turn's edge; `hive update NAME` hastens one"
        yield Finding("updates", "warning", f"{told}: {why}")


def check_state(name: str, machine: Machine) -> Iterator[Finding]:
    folder = machine.config.state_dir
    kept = machine.is_kept(folder)
    if not kept:
        with _trial_folder(folder, "state_dir"):
            pass
    database = machine.config.database
    if machine.daemon is None and database.exists():
        _check_database(database)
    disk = os.statvfs(_existing(folder))
    free = disk.f_bavail * disk.f_frsize
    needed = ROOM_BYTES + (0 if kept or machine.config.database.with_suffix(".ballast").exists() else BALLAST_BYTES)
    told = f"{folder}, {free // MIB:,} MiB free"
    if free < needed:
        yield Finding(
            name, "trouble", f"{told}, and {needed // MIB} are needed; make room, or set state_dir to another"
        )
    elif free < LITTLE_SPACE_BYTES:
        yield Finding(name, "warning", f"{told}, which will not last; make room, or set state_dir to another")
    else:
        yield Finding(name, "ok", told if folder.exists() else f"{told}; it will be made")


def _check_database(path: Path) -> None:
    """Raise StoreError for one that the daemon would refuse. It is only read, and no file is made beside it."""
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)
        try:
            check_ours(connection, str(path))
        finally:
            connection.close()
    except sqlite3.Error as exc:
        raise cannot_open(path, exc) from None


def check_runtime(name: str, machine: Machine) -> Iterator[Finding]:
    folder = machine.config.runtime_dir
    if not machine.is_kept(folder):
        with _trial_folder(folder, "runtime_dir") as trial:
            listen_unix(trial / "x.sock").close()
    yield Finding(name, "ok", f"{folder}" if folder.exists() else f"{folder}; it will be made")


def check_sqlite(name: str, machine: Machine) -> Iterator[Finding]:
    if machine.is_kept(machine.config.state_dir):
        yield Finding(name, "ok", f"{sqlite3.sqlite_version}; the daemon that runs has its database open")
        return
    with _trial_folder(machine.config.state_dir, "state_dir") as trial:
        open_writer(trial / "hive.sqlite").close()
    yield Finding(name, "ok", f"{sqlite3.sqlite_version}, with a write-ahead log where the state is kept")


def check_ports(name: str, machine: Machine) -> Iterator[Finding]:
    config = machine.config
    if machine.daemon is not None:
        yield Finding(name, "ok", f"the daemon that runs has {machine.daemon['dashboard']}")
        return
    listen_dashboard(config).close()
    if config.dashboard_port == 0:
        yield Finding(name, "ok", "any that is free")
        return
    taken = [port for port in (config.manager_port, *config.agent_port_range) if not _is_free(config, port)]
    where = f"{config.dashboard_host}:{config.dashboard_port} is free"
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        yield Finding(
            name,
            "warning",
            f"{where}; {taken[0]}{more} of the agents' pages are taken, and their pages stay below the dashboard; "
            "set manager_port or agent_ports to others",
        )
    else:
        yield Finding(name, "ok", f"{where}; so are {config.manager_port} and {config.agent_ports} for agents' pages")


def _is_free(config: Config, port: int) -> bool:
    try:
        listen_tcp(config.dashboard_host, port).close()
    except OSError:
        return False
    return True


def check_sandbox(name: str, machine: Machine) -> Iterator[Finding]:
    config = machine.config
    choice = choose_sandbox(config, find_claude(config.claude))
    machine.bwrap_works = choice.bwrap_trouble is None
    called = SANDBOXES[config.sandbox]
    if config.unsafe_no_sandbox:
        yield Finding(name, "warning", "none (unsafe_no_sandbox): agents can do all that you can; unset it")
    elif choice.trouble:
        yield Finding(name, machine.agents_need, choice.trouble)
    elif config.helper is not None:
        yield Finding(name, "ok", f"{called}, which the helper starts")
    elif choice.weakness:
        yield Finding(name, "warning", f"{called}; {choice.weakness}")
    elif filter_program() is None:
        yield Finding(name, "warning", f"{called}, without a filter of system calls: there is none for this processor")
    else:
        yield Finding(name, "ok", f"{called}, with a filter of system calls; {_other_sandbox(config, choice)}")


def check_helper(name: str, machine: Machine) -> Iterator[Finding]:
    yield from look_at_helper(name, machine.config)


def check_proxy(name: str, machine: Machine) -> Iterator[Finding]:
    yield from look_at_proxy(name)


def check_bounds(name: str, machine: Machine) -> Iterator[Finding]:
    cgroups = choose_groups(machine.config.state_dir / "doctor", bounds_of(machine.config))
    bounds = cgroups.bounds
    told = f"{bounds.memory_bytes // MIB:,} MiB of memory, {bounds.cpu_percent} % of cpu, {bounds.tasks:,} tasks"
    if machine.config.helper is not None and os.geteuid() != 0:
        yield Finding(name, "ok", f"each agent has at most {told}, where the helper can see to it; root is told more")
    elif cgroups.trouble:
        yield Finding(name, "warning", cgroups.trouble)
    else:
        where = f"; each a unit in {SLICE}" if isinstance(cgroups, Scopes) else ""
        yield Finding(name, "ok", f"each agent has at most {told}{where}")


def _other_sandbox(config: Config, choice: Choice) -> str:
    """Whether the one that is not set would work here, and why not."""
    if config.sandbox == "nspawn":
        return choice.bwrap_trouble or "bubblewrap works too"
    found = look_for_nspawn(config.state_dir, config.runtime_dir, None)
    if found.trouble or found.weakness:
        return f'sandbox = "nspawn" would not do all here: {found.trouble or found.weakness}'
    return 'sandbox = "nspawn" works too'


def check_nix(name: str, machine: Machine) -> Iterator[Finding]:
    """Nothing where containers are not built."""
    config = machine.config
    if config.sandbox == "nixos-container":
        trouble = nix_trouble(config)
        within = f"{config.evaluation_s:g} s and {config.evaluation_memory_bytes // MIB:,} MiB"
        working = f"agent.nix is evaluated in a sandbox without a network, within {within}"
        yield Finding(name, machine.agents_need if trouble else "ok", trouble or working)


def check_policy(name: str, machine: Machine) -> Iterator[Finding]:
    """Nothing where no rule lets anything pass."""
    config = machine.config
    if not config.policy:
        return
    agents = _agents(machine)
    said = [f"{rule.name}: {why}" for rule in config.policy for why in troubles(rule, agents)]
    told = f"{counted(len(config.policy), 'rule')} let changes pass without a click; `hive policy` lists them"
    for text in said:
        yield Finding(name, "warning", f"{text}; mend it in the configuration, or take it out")
    if not said:
        yield Finding(name, "ok", told)


def check_forges(name: str, machine: Machine) -> Iterator[Finding]:
    agents = _agents(machine) if machine.config.lane else []
    forges = None if machine.daemon is None else machine.daemon.get("forges", [])
    yield from look_at_forges(name, machine.config.lane, forges, agents)


def _agents(machine: Machine) -> list[str]:
    """Who is an agent now; only hm1nd in a hive that never ran."""
    database = machine.config.database
    if machine.daemon is not None:
        with closing(Client(str(machine.config.runtime_dir))) as client:
            client.give_up_after(DAEMON_PATIENCE_S)
            return [agent["name"] for agent in client.call("list")["agents"]]
    if not database.exists():
        return [MANAGER]
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?immutable=1", uri=True)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM agents")]
    except sqlite3.Error as exc:
        raise cannot_open(database, exc) from None


def check_credential(name: str, machine: Machine) -> Iterator[Finding]:
    credentials = Credentials(machine.config.state_dir)
    if machine.daemon is not None:
        source, missing = machine.daemon["credential"], machine.daemon["credential_missing"]
    else:
        found, missing = credentials.find(DEFAULT), credentials.missing(DEFAULT)
        source = found.source if found else None
    if source is None:
        yield Finding(name, machine.agents_need, missing)
    elif os.path.isabs(source) and os.path.exists(source) and stat.S_IMODE(os.stat(source).st_mode) & 0o077:
        yield Finding(name, "warning", f"{source}, which others may read; `chmod 600 {source}`")
    else:
        yield Finding(name, "ok", source)
    for other in credentials.names():
        if other != DEFAULT and (missing := credentials.missing(other)):
            yield Finding(name, "warning", missing)


def check_claude(name: str, machine: Machine) -> Iterator[Finding]:
    daemon, chosen = machine.daemon, machine.config.claude
    claude = find_claude(chosen) if daemon is None else daemon["claude"] and Path(daemon["claude"])
    if claude is None:
        chosen = chosen if daemon is None else daemon["claude_chosen"]
        yield Finding(name, machine.agents_need, how_to_get_claude(chosen))
        return
    if not os.access(claude, os.X_OK):
        yield Finding(name, "warning", f"{claude}, at which only the daemon's own user can look; run it as that")
        return
    for told in check_program(claude, inside=machine.bwrap_works and not machine.config.unsafe_no_sandbox):
        status = machine.agents_need if told["status"] == "trouble" else told["status"]
        yield Finding(told["check"], cast("Status", status), told["message"])
    if daemon is not None and (pin := daemon.get("claude_pin")):
        yield _about_pin(pin, [each["id"] for each in daemon["pending"] if each["kind"] == "claude"])


def _about_pin(pin: dict[str, Any], waiting: list[int]) -> Finding:
    if not pin["kept"]:
        told = f"{pin['version']} of {pin['source']} (sha256 {pin['sha256'][:12]}…); what names it there decides"
        return Finding("claude's pin", "ok", told)
    how = f"by approval {pin['approval']}" if pin["approval"] else "as the first one that was found"
    told = f"{pin['version']} of {pin['source']}, {how}; the hive keeps its own copy (sha256 {pin['sha256'][:12]}…)"
    if waiting:
        return Finding("claude's pin", "warning", f"{told}; another one is installed: `hive show {waiting[0]}`")
    return Finding("claude's pin", "ok", told)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if os.path.lexists(path))


@contextmanager
def _trial_folder(folder: Path, setting: str) -> Iterator[Path]:
    """A folder for a moment where the daemon would write: in `folder`, or where that would be made. Raises Refusal."""
    place = _existing(folder)
    try:
        if place == folder:
            check_owner(folder)
        with tempfile.TemporaryDirectory(prefix=".hive-doctor-", dir=place) as trial:
            yield Path(trial)
    except OSError as exc:
        # Of the setting, and not of a name that nobody gave.
        why = explain(OSError(exc.errno, exc.strerror), setting)
        raise Refusal("failed", f"cannot use {folder}: {why}") from None


CHECKS: dict[str, Callable[[str, Machine], Iterator[Finding]]] = {
    "daemon": check_daemon,
    "state directory": check_state,
    "runtime directory": check_runtime,
    "sqlite": check_sqlite,
    "ports": check_ports,
    "sandbox": check_sandbox,
    "helper": check_helper,
    "nix": check_nix,
    "bounds": check_bounds,
    "proxy": check_proxy,
    "policy": check_policy,
    "forges": check_forges,
    "credential": check_credential,
    "claude": check_claude,
}
