"""What is made from the Nix files: `python -m tests.nix_pages` writes it anew, and needs nix.

docs/options.md                     every option of the NixOS modules
nix/systemd/hyperhive.service       the daemon's unit for systems that are not NixOS
nix/systemd/hyperhive-root.service  the helper's
nix/systemd/helper.conf             a drop-in for the daemon's, where the helper starts its agents

With --check FILE it says whether docs/options.md is what the options in FILE, as JSON, make of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONS_PAGE = ROOT / "docs" / "options.md"
UNIT = ROOT / "nix" / "systemd" / "hyperhive.service"
HELPER_UNIT = UNIT.with_name("hyperhive-root.service")
DROP_IN = UNIT.with_name("helper.conf")

HEAD = """\
# Options of the NixOS modules

Made from the modules by `python -m tests.nix_pages`; a test holds the two equal.
"""
PARTS = {
    "host": """
## The host: `nixosModules.default`

`services.hive-c0re.…` are other names of the same options, and `hyperhive.enable` of the first.
""",
    "agent": """
## An agent: `nixosModules.agent`

`hyperhive.settings` are the keys of `agent.toml`. `hyperhive.model`, `.effort`, `.env`, `.tools`, `.description`,
`.credential`, `.egress`, `.projects`, `.availableModels` (`available_models`), `.extraMcpServers` (`mcp_servers`),
`.allowedRecipients` (`recipients`), `.autoCompact.atPercent` (`compact_at_percent`) and `.autoCompact.contextWindow`
(`context_window`) are other names of them.
""",
}
UNIT_HEAD = """\
# Made from unit.nix beside this file, where each line has its reason: `python -m tests.nix_pages`.
# For systems that are not NixOS; hyperhive.sysusers.conf beside it makes the user and the group.
"""
HELPER_HEAD = """\
# Made from helper.nix beside this file, where each line has its reason: `python -m tests.nix_pages`.
# For systems that are not NixOS.
"""
DROP_IN_HEAD = f"""\
{HELPER_HEAD}# Goes to /etc/systemd/system/hyperhive.service.d/ where hyperhive-root.service starts the agents.
"""


def evaluate(expression: str, environment: Mapping[str, str] | None = None) -> Any:
    """A Nix expression's value. Raises CalledProcessError, with what nix said."""
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-E", expression]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def options_page(options: Mapping[str, list[dict[str, Any]]]) -> str:
    return HEAD + "".join(f"{intro}{''.join(map(_option, options[part]))}" for part, intro in PARTS.items())


def _option(option: Mapping[str, Any]) -> str:
    lines = [f"\n### `{option['name']}`\n", option["description"].strip(), ""]
    told = [("Type", option["type"]), ("Default", option["default"]), ("Example", option["example"])]
    return "\n".join([*lines, *(f"- {what}: `{value}`" for what, value in told if value is not None), ""])


def unit_text(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """The daemon's unit as a file of systemd's."""
    return _file(UNIT_HEAD, _starting(sections, "/usr/local/bin/hive-core serve"))


def helper_texts(source: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[Path, str]:
    """The helper's unit, and the drop-in of the daemon's. There a list begins anew, each of it on a line of its own."""
    daemon = {name: {**section} for name, section in source["Daemon"].items()}
    fresh = {key: ["", *value] for key, value in daemon["Service"].items() if isinstance(value, list)}
    return {
        HELPER_UNIT: _file(HELPER_HEAD, _starting(source["Helper"], "/usr/local/bin/hive-root serve")),
        DROP_IN: _file(DROP_IN_HEAD, {**daemon, "Service": {**daemon["Service"], **fresh}}),
    }


def drop_in_text(service: Mapping[str, Any]) -> str:
    """Lines for a service that there is, as a drop-in of its unit."""
    return _file("", {"Service": service})


def _starting(sections: Mapping[str, Mapping[str, Any]], command: str) -> Mapping[str, Mapping[str, Any]]:
    return {**sections, "Service": {**sections["Service"], "ExecStart": command}}


def _file(head: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    names = [name for name in ("Unit", "Service", "Install") if name in sections]
    return head + "\n" + "\n".join("\n".join([f"[{name}]", *_entries(sections[name]), ""]) for name in names)


def _entries(section: Mapping[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        for said in value if isinstance(value, list) and "" in value else [value]:
            yield f"{key}={_said(said)}"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) if isinstance(value, list) else str(value)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check"]:
        options = json.loads(Path(arguments[1]).read_text("utf-8"))
        if options_page(options) == OPTIONS_PAGE.read_text("utf-8"):
            return 0
        print("docs/options.md is not what the modules say: write it anew with `python -m tests.nix_pages`")
        return 1
    OPTIONS_PAGE.write_text(options_page(evaluate("(import ./tests/nix/evaluate.nix { }).options")), "utf-8")
    UNIT.write_text(unit_text(evaluate("import ./nix/systemd/unit.nix")), "utf-8")
    for path, text in helper_texts(evaluate("import ./nix/systemd/helper.nix")).items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
