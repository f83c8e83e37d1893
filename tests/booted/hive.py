"""The hive on a machine that booted systemd: what it is told, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.booted_host import BootedHost
from tests.processes import look_until

_RULES = [
    {
        "from": "operator",
        "do": [{"tool": "request_spawn", "args": {"name": "iris", "persona": "You read.", "reason": "A reader."}}],
    }
]

# What agents are started in and by, where nobody says otherwise to the module of NixOS: tests/nix holds the two equal.
BY_DEFAULT = {"sandbox": "bwrap", "helper": "/run/hyperhive-root/helper.sock"}

BUBBLEWRAP = (
    "bwrap --unshare-all --unshare-user --disable-userns --uid 0 --gid 0 --hostname hive"
    " --ro-bind / / --proc /proc --dev /dev true"
)


def write_config(host: BootedHost, *lines: str) -> str:
    """Write how hm1nd behaves; the text of a config.toml with these lines more."""
    host.write("/etc/hyperhive/hm1nd.md", f"You manage.\n\n```rehearsal\n{json.dumps(_RULES)}\n```\n")
    own = ['state_dir = "/var/lib/hyperhive"', 'runtime_dir = "/run/hyperhive"', 'default_program = "rehearsal"']
    return "\n".join([*own, 'manager_prompt = "/etc/hyperhive/hm1nd.md"', *lines, ""])


def ask_for_iris(host: BootedHost, user: str = "") -> None:
    """An agent is asked for and approved, and is ready."""
    look_until(lambda: idle(host, "hm1nd", user=user))
    host.ok("hive", "send", "hm1nd", "I want a reader.", user=user)
    (card,) = look_until(lambda: json.loads(host.ok("hive", "pending", "--json", user=user))["approvals"])
    host.ok("hive", "approve", "1", "--digest", card["digest"], user=user)
    look_until(lambda: idle(host, "hm1nd", "iris", user=user))


def agents(host: BootedHost, user: str = "") -> dict[str, Any]:
    """What `hive list` says of each; nothing while no daemon answers."""
    done = host.run("hive", "list", "--json", user=user)
    return {agent["name"]: agent for agent in json.loads(done.stdout)["agents"]} if done.returncode == 0 else {}


def idle(host: BootedHost, *names: str, user: str = "") -> bool:
    found = agents(host, user)
    return set(names) <= set(found) and all(found[name]["state"] == "idle" for name in names)


def shown(host: BootedHost, unit: str, *properties: str) -> dict[str, str]:
    """What `systemctl show` tells."""
    said = host.ok("systemctl", "show", f"--property={','.join(properties)}", unit)
    return dict(line.split("=", 1) for line in said.splitlines())


def processes_of(host: BootedHost, unit: str) -> set[str]:
    """The processes of a unit, each with what it runs; some may just have ended."""
    group = shown(host, unit, "ControlGroup")["ControlGroup"]
    script = 'cat $(find "$1" -name cgroup.procs) | while read p; do echo $p $(tr "\\0" " " < /proc/$p/cmdline); done'
    return set(host.run("sh", "-c", script, "sh", f"/sys/fs/cgroup/unified{group}").stdout.splitlines())


def lasting(host: BootedHost, *units: str) -> set[str]:
    """Of the processes of agents' units, those that last as long as the agent does: its programs come and go."""
    parts = ("printed.py", "--run /run/hive")
    return {line for unit in units for line in processes_of(host, unit) if any(part in line for part in parts)}


def runs_under(host: BootedHost, unit: Path, command: str, *more: str) -> bool:
    """Whether a command ends well under a unit's own hardening and some lines more."""
    other = (
        "Type",
        "Restart",
        "State",
        "Runtime",
        "WorkingDirectory",
        "Slice",
        "Kill",
        "Exec",
        "Timeout",
        "Notify",
        "OOM",
    )
    service = unit.read_text().split("[Service]\n")[1].split("\n\n")[0].splitlines()
    lines = [line for line in service if not line.startswith(tuple(other))]
    properties = [f"--property={line}" for line in (*lines, *more)]
    return host.run("systemd-run", "--quiet", "--wait", *properties, *command.split()).returncode == 0
