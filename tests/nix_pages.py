"""What is made from the Nix files: `python -m tests.nix_pages` writes it anew, and needs nix.

docs/options.md             every option of the NixOS modules
nix/systemd/hyperhive.service  the daemon's unit for systems that are not NixOS

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
`.credential`, `.availableModels` (`available_models`), `.extraMcpServers` (`mcp_servers`), `.allowedRecipients`
(`recipients`), `.autoCompact.atPercent` (`compact_at_percent`) and `.autoCompact.contextWindow` (`context_window`)
are other names of them.
""",
}
UNIT_HEAD = """\
# Made from unit.nix beside this file, where each line has its reason: `python -m tests.nix_pages`.
# For systems that are not NixOS; hyperhive.sysusers.conf beside it makes the user and the group.
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
    """A unit file of systemd."""
    sections = {**sections, "Service": {**sections["Service"], "ExecStart": "/usr/local/bin/hive-core serve"}}
    parts = ["\n".join([f"[{name}]", *_entries(sections[name]), ""]) for name in ("Unit", "Service", "Install")]
    return UNIT_HEAD + "\n" + "\n".join(parts)


def _entries(section: Mapping[str, Any]) -> Iterator[str]:
    for key, value in section.items():
        said = "yes" if value is True else "no" if value is False else value
        yield f"{key}={' '.join(said) if isinstance(said, list) else said}"


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--check"]:
        options = json.loads(Path(arguments[1]).read_text("utf-8"))
        if options_page(options) == OPTIONS_PAGE.read_text("utf-8"):
            return 0
        print("docs/options.md is not what the modules say: write it anew with `python -m tests.nix_pages`")
        return 1
    OPTIONS_PAGE.write_text(options_page(evaluate("(import ./tests/nix/evaluate.nix { }).options")), "utf-8")
    UNIT.write_text(unit_text(evaluate("import ./nix/systemd/unit.nix")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
