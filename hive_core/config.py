"""The daemon's configuration: a file, then HIVE_* variables, then flags; each wins over the one before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from hive_core.lanes import Lanes
from hive_core.limits import Limits
from hive_core.policy_rules import Rules, cannot_use_rules
from hive_core.protocol.harness import RENEW_EVERY_S
from hive_core.protocol.paths import (
    PATH_FORM,
    absolute,
    cannot_use,
    check_socket_room,
    config_files,
    default_runtime_dir,
    default_state_dir,
    read_config,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named
from hive_core.settings import Recipient, Word

# Variables of ours that are not settings of the daemon.
_OTHER_VARIABLES = ("HIVE_REQUIRE", "HIVE_LONG", "HIVE_TEST_")


@dataclass(frozen=True)
class Allowed:
    """What a text may be, for a sentence that begins with "it must be". Of a number or a choice its type says it."""

    sentence: str


Port = Annotated[int, Field(ge=0, le=65535)]
Host = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9._:%-]{1,253}\z"),  # an empty one would be every network of the machine
    Allowed("an address or a name of this machine, such as 127.0.0.1"),
]
Ports = Annotated[str, Field(max_length=11), Allowed("FIRST-LAST, two port numbers from 1 to 65535, such as 8100-8999")]
Url = Annotated[
    str,
    Field(pattern=r"^https?://[^\s/@]+(/\S*)?\z"),
    Allowed("an http:// or https:// address without a user name and spaces"),
]
Model = Annotated[Word, Allowed("a model's name: 1 to 80 of A-Z, a-z, 0-9 and ._:[]-, and the first a letter or digit")]
Pronouns = Annotated[
    str | None,
    Field(pattern=r"^[^\W\d_]+(/[^\W\d_]+){0,5}\z", max_length=40),
    Allowed("up to 40 letters, words with / between, such as they/them"),
]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PATHS = (
    "helper",
    "helper_state_dir",
    "state_dir",
    "runtime_dir",
    "claude",
    "manager_prompt",
    "prices",
    "nspawn_root",
    "nixpkgs",
    "hyperhive_source",
)
DRAIN_MOST_S = 24 * 3600  # the daemon waits no longer for whoever asks it to: PATIENCE_MOST_S in sockets/admin.py


LEASE_SILENCE_LEAST_S = 2 * RENEW_EVERY_S


class Config(Limits):
    """Every setting, with its default. Times are in seconds. Port 0 means any free one (the demo and the tests)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state_dir: Path = Field(default_factory=lambda: Path(default_state_dir()))
    runtime_dir: Path = Field(default_factory=lambda: Path(default_runtime_dir()))
    dashboard_host: Host = "127.0.0.1"
    dashboard_port: Port = 7000
    manager_port: Port = 8000
    agent_ports: Ports = "8100-8999"
    provider_base_url: Url = "https://api.anthropic.com"
    claude: Path | None = None  # the agent program; None looks on PATH, npm's and ~/.local/bin
    manager_prompt: Path | None = None  # the first CLAUDE.md of hm1nd, in the place of ours
    prices: Path | None = None  # a list of what models cost, before ours
    default_program: Literal["claude", "rehearsal"] = "claude"
    default_model: Model = "sonnet"
    operator_pronouns: Pronouns = None  # in the prompt of each agent that is created from then on
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    orphan_grace_s: Seconds = 600.0
    drain_s: Annotated[Seconds, Field(le=DRAIN_MOST_S)] = 30.0  # how long `hive down` waits for turns to end
    end_agents_with_daemon: bool = False
    lease_silence_s: Annotated[
        Seconds,
        Field(ge=LEASE_SILENCE_LEAST_S, lt=2**31, description=Limits.model_fields["lease_silence_s"].description),
        Allowed(
            f"a number of seconds from {LEASE_SILENCE_LEAST_S:.0f}: the harness of a quiet turn says that it lives "
            f"every {RENEW_EVERY_S:.0f} s, and would lose it"
        ),
    ] = Limits.model_fields["lease_silence_s"].default
    sandbox: Literal["bwrap", "nspawn", "nixos-container"] = "bwrap"  # what agents run in
    nspawn_root: Path = Path("/")  # whose /usr agents see, with sandbox = "nspawn"
    nixpkgs: Path | None = None  # what they are built from, with sandbox = "nixos-container": a flake's folder
    hyperhive_source: Path | None = None  # and our own modules
    unsafe_no_sandbox: bool = False
    policy: Annotated[
        Rules,
        Allowed(
            "tables [[policy]], each with name, kind, agents, requested_by and only (docs/changes.md tells of them)"
        ),
    ] = Field(default_factory=list)  # what may pass without a click; nothing
    lane: Annotated[
        Lanes, Allowed("tables [[lane]], each with name and agents (docs/forge.md tells of them and of the others)")
    ] = Field(default_factory=list)  # who hears of what happens on forges; nobody
    helper: Path | None = None  # the socket of `hive-root serve`, which then starts and ends agents
    helper_user: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\z"), Allowed("a user of this host")
    ] = "hyperhive"  # whom the helper serves: the daemon's
    helper_state_dir: Path = Path("/var/lib/hyperhive-root")  # the helper's own; root's
    host_network: Annotated[
        list[Recipient], Field(max_length=1_000), Allowed('a list of names of agents, such as ["iris"]')
    ] = Field(default_factory=list)  # whom the helper may give the host's network; nobody

    @field_validator(*PATHS, mode="before")
    @classmethod
    def _absolute(cls, raw: object) -> str | None:
        return None if raw is None else absolute(str(raw) if isinstance(raw, Path) else raw)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, raw: object, info: ValidationInfo) -> object:
        if isinstance(raw, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true is no number")
        return raw

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

    @property
    def bodies_dir(self) -> Path:
        return self.state_dir / "bodies"


def _from_file() -> tuple[str, dict[str, Any]]:
    for path in config_files():
        if os.path.exists(path):
            return path, read_config(path)
    return "the configuration file", {}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """Our variables. An empty one is none, as it is for the clients."""
    found = {}
    for variable, value in environment.items():
        if value and variable.startswith("HIVE_") and not variable.startswith(_OTHER_VARIABLES):
            found[variable.removeprefix("HIVE_").lower()] = value
    return found


def _allowed(key: str) -> str:
    """What a setting may be, as its type has it."""
    field = Config.model_fields[key]
    for mark in field.metadata:
        if isinstance(mark, Allowed):
            return mark.sentence
    if field.annotation is bool:
        return "true or false"
    if get_origin(field.annotation) is Literal:
        *others, last = get_args(field.annotation)
        return f"{', '.join(others)} or {last}"
    if field.annotation in (int, float):
        noun = "a whole number" if field.annotation is int else "a number"
        return " ".join([noun + (" of seconds" if key.endswith("_s") else ""), *_bounds(field.metadata)])
    return PATH_FORM


def _bounds(marks: Sequence[object]) -> Iterator[str]:
    bound = {name: getattr(mark, name) for mark in marks for name in ("ge", "gt", "le", "lt") if hasattr(mark, name)}
    if "ge" in bound:
        yield f"from {bound['ge']}"
    if "gt" in bound:
        yield f"above {bound['gt']}"
    if "le" in bound:
        yield f"to {bound['le']}" if "ge" in bound else f"and at most {bound['le']}"
    if "lt" in bound:
        yield f"and below {bound['lt']}"


def load_config(
    flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: str | None = None
) -> Config:
    """The configuration that counts. Raises Refusal("usage") naming the key, what it may be and where it stands.

    file     the configuration file; None is the first that exists of those of the system and the user
    """
    path, from_file = _from_file() if file is None else (file, read_config(file))
    from_environment = _from_environment(environment)
    for where, values in ((path, from_file), ("the environment", from_environment), ("the flags", flags)):
        unknown = sorted(set(values) - set(Config.model_fields))
        if unknown:
            key = f"HIVE_{unknown[0].upper()}" if where == "the environment" else unknown[0]
            known = ", ".join(Config.model_fields)
            raise Refusal(
                "usage", f"cannot use {where}: there is no setting {named(key)[:60]}; the settings are {known}"
            )
    given = {**from_file, **from_environment, **flags}
    try:
        config = Config.model_validate(given)
    except ValidationError as exc:
        key = str(exc.errors(include_url=False, include_context=False)[0]["loc"][0])
        if key in ("policy", "lane") and _are_tables(given[key]):
            raise cannot_use_rules(exc, path, _text_of(path), key) from None
        if key in flags:
            place = f"--{key.replace('_', '-')}"
        else:
            place = f"HIVE_{key.upper()}" if key in from_environment else f"it in {path}"
        raise cannot_use(given[key], key, _allowed(key), place) from None
    check_socket_room(str(config.runtime_dir))
    return config


def _are_tables(given: object) -> bool:
    return isinstance(given, list) and all(isinstance(one, dict) for one in given)


def _text_of(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text("utf-8", "replace")
    return ""
