"""The daemon's configuration: a file, then HIVE_* variables, then flags; each wins over the one before."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hive_core.protocol.paths import check_socket_room, config_files, default_runtime_dir, default_state_dir
from hive_core.protocol.refusal import Refusal
from hive_core.settings import Word, describe

# Variables of ours that are not settings of the daemon.
_OTHER_VARIABLES = ("HIVE_REQUIRE", "HIVE_LONG", "HIVE_TEST_")
Port = Annotated[int, Field(ge=0, le=65535)]


class Config(BaseModel):
    """Every setting, with its default. Times are in seconds. Port 0 means any free one (the demo and the tests)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path = Field(default_factory=lambda: Path(default_state_dir()))
    runtime_dir: Path = Field(default_factory=lambda: Path(default_runtime_dir()))
    dashboard_host: str = "127.0.0.1"
    dashboard_port: Port = 7000
    manager_port: Port = 8000
    agent_ports: str = "8100-8999"
    provider_base_url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")] = "https://api.anthropic.com"
    claude: Path | None = None  # the agent program; None looks on PATH, npm's and ~/.local/bin
    manager_prompt: Path | None = None  # the first CLAUDE.md of hm1nd, in the place of ours
    default_program: Literal["claude", "rehearsal"] = "claude"
    default_model: Word = "sonnet"
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    orphan_grace_s: Annotated[float, Field(gt=0)] = 600.0
    drain_s: Annotated[float, Field(gt=0)] = 30.0  # how long `hive down` waits for turns to end
    end_agents_with_daemon: bool = False
    unsafe_no_sandbox: bool = False

    @field_validator("state_dir", "runtime_dir", "claude", "manager_prompt")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().absolute() if path is not None else None

    @field_validator("agent_ports")
    @classmethod
    def _port_range(cls, text: str) -> str:
        first, _, last = text.partition("-")
        if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) <= 65535):
            raise ValueError("must be FIRST-LAST, two port numbers")
        return text

    @property
    def agent_port_range(self) -> range:
        first, _, last = self.agent_ports.partition("-")
        return range(int(first), int(last) + 1)

    @property
    def database(self) -> Path:
        return self.state_dir / "hive.sqlite"


def _from_file(environment: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    for path in config_files():
        if os.path.exists(path):
            try:
                return path, tomllib.loads(Path(path).read_text("utf-8"))
            except (OSError, ValueError) as exc:
                raise Refusal("usage", f"cannot read {path}: {exc}") from None
    return "the configuration file", {}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for variable, value in environment.items():
        if variable.startswith("HIVE_") and not variable.startswith(_OTHER_VARIABLES):
            found[variable.removeprefix("HIVE_").lower()] = value
    return found


def load_config(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration that counts. Raises Refusal("usage") naming the key and where it stands."""
    path, from_file = _from_file(environment)
    from_environment = _from_environment(environment)
    for where, values in ((path, from_file), ("the environment", from_environment), ("the flags", flags)):
        unknown = sorted(set(values) - set(Config.model_fields))
        if unknown:
            shown = f"HIVE_{unknown[0].upper()}" if where == "the environment" else unknown[0]
            known = ", ".join(Config.model_fields)
            raise Refusal("usage", f"cannot use {where}: there is no setting {shown}; the settings are {known}")
    try:
        config = Config.model_validate({**from_file, **from_environment, **flags})
    except ValidationError as exc:
        raise Refusal("usage", f"cannot use the configuration: {describe(exc)}") from None
    check_socket_room(str(config.runtime_dir))
    return config
