"""agent.toml: an agent's settings as data, read from a commit and checked before anything trusts them."""

from __future__ import annotations

import re
import tomllib
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hive_core import credentials
from hive_core.egress_rules import Entries
from hive_core.extras import RESERVED
from hive_core.project_rules import PROJECTS_LIMIT, Project
from hive_core.protocol.harness import (
    BACKGROUND_S,
    COMPACT_AT_PERCENT,
    OWN_PLUGIN,
    TURN_SILENCE_S,
    WARM_IDLE_S,
    WARM_MEMORY_MIB,
    WARM_TURNS,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import named
from hive_core.protocol.words import NAME_LIMIT, shown

# The agent program's own tools that are on unless agent.toml lists others. Messaging, scheduling, sub-agents and the
# web are the hive's to give, so they are not here.
DEFAULT_TOOLS = ["Bash", "Read", "Edit", "Write", "Glob", "Grep"]

Recipient = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*\z", max_length=NAME_LIMIT)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:\[\]-]*\z", max_length=80)]

CredentialName = Annotated[
    str, StringConstraints(pattern=rf"^{credentials.NAME_PATTERN}\z", max_length=credentials.NAME_LIMIT)
]

# What the hive sets for the agent's program itself, or what decides how any program runs.
_OURS = "HIVE|ANTHROPIC|CLAUDE|MCP|GIT|DISABLE|LD|IS"
# What leads its programs to the hive's proxy, in any letters, where it has no other way out.
_PROXY = {"http_proxy", "https_proxy", "no_proxy", "node_use_env_proxy"}
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\z", max_length=80)]
Value = Annotated[str, StringConstraints(pattern=r"^[^\x00]*\z", max_length=4096)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*\z", max_length=128)]
# In a tool's name, mcp__SERVER__TOOL, two of _ end it: hive__x would read as the hive's own.
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*([_-][a-z0-9]+)*\z", max_length=30)]


def _only_theirs(names: dict[str, str]) -> dict[str, str]:
    for name in names:
        if re.match(rf"({_OURS})_|(PATH|HOME|LANG|TERM)\Z", name):
            raise PydanticCustomError("ours", "{name} is the hive's own to set; choose another name", {"name": name})
    return names


Variables = Annotated[dict[VariableName, Value], Field(max_length=64), AfterValidator(_only_theirs)]

# What the host enforces of the settings, whatever goes on in the container.
POLICY = {"recipients", "pair_rate_per_hour", "credential", "available_models", "projects", "egress", "network"}
# And what of it the harness is told as well.
TOLD = {"projects"}


# A folder's name that means the same everywhere.
ExtraName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*\z", max_length=63)]


def _distinct(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PydanticCustomError("twice", "{name} is there twice; take one out", {"name": twice})
    return names


ExtraNames = Annotated[list[ExtraName], Field(max_length=32), AfterValidator(_distinct)]


class McpServer(BaseModel):
    """A server of tools beside the hive's own, started by the agent's program inside its sandbox."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: Annotated[Value, Field(min_length=1)]
    args: Annotated[list[Value], Field(max_length=64)] = []
    env: Variables = {}
    allowed_tools: Annotated[list[ToolName], Field(min_length=1, max_length=200)] | None = None  # None: all of them


class AgentSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    program: Literal["claude", "rehearsal"] = "claude"
    model: Word = "sonnet"
    available_models: Annotated[list[Word], Field(max_length=64)] = []  # that may be chosen as the model; none: any
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    tools: Annotated[list[Word], Field(max_length=64)] = DEFAULT_TOOLS
    turns: Literal["warm", "cold"] = "warm"  # warm: one process takes many; cold: each turn has its own
    warm_idle_s: Annotated[int, Field(ge=1, le=86_400)] = WARM_IDLE_S
    warm_turns: Annotated[int, Field(ge=1, le=100_000)] = WARM_TURNS
    warm_memory_mib: Annotated[int, Field(ge=64, le=1_048_576)] = WARM_MEMORY_MIB
    background_s: Annotated[int, Field(ge=1, le=7 * 86_400)] = BACKGROUND_S
    turn_silence_s: Annotated[int, Field(ge=10, le=86_400)] = TURN_SILENCE_S
    context_window: Annotated[int, Field(ge=1_000, le=100_000_000)] | None = None
    compact_at_percent: Annotated[int, Field(ge=0, le=100)] = COMPACT_AT_PERCENT
    description: Annotated[str, StringConstraints(max_length=200)] = ""
    credential: CredentialName = credentials.DEFAULT  # of the host's, by its name
    recipients: Annotated[list[Recipient], Field(max_length=200)] | None = None  # whom it may write to; None: everybody
    pair_rate_per_hour: Annotated[int, Field(ge=1, le=100_000)] | None = None  # to one recipient; None: the hive's
    network: Literal["private", "host"] = "private"  # host: that of the machine, with its loopback
    env: Variables = {}  # more of its program's environment
    mcp_servers: Annotated[dict[ServerName, McpServer], Field(max_length=16)] = {}
    skills: ExtraNames = []  # folders skills/NAME of its repository
    plugins: ExtraNames = []  # folders plugins/NAME there
    egress: Entries = []  # what it may reach beside the model
    projects: Annotated[list[Project], Field(max_length=PROJECTS_LIMIT)] = []  # of the hive's, by their names

    @model_validator(mode="after")
    def _fits_together(self) -> AgentSettings:
        if self.available_models and self.model not in self.available_models:
            told = {"model": self.model, "models": ", ".join(self.available_models)}
            raise PydanticCustomError("model", "the model {model} is not one of available_models ({models})", told)
        if self.network == "private" and (led := sorted(name for name in self.env if name.lower() in _PROXY)):
            why = "env: {name} leads to the hive's proxy and is its own to set; `egress` names what may be reached"
            raise PydanticCustomError("proxy", why, {"name": led[0]})
        if "hive" in self.mcp_servers:
            raise PydanticCustomError("mcp", "mcp_servers.hive is the hive's own; choose another name")
        if OWN_PLUGIN in self.plugins:
            raise PydanticCustomError("plugin", "plugins: own is the plugin that has the skills; rename it")
        if taken := sorted(RESERVED.intersection(self.skills)):
            raise PydanticCustomError("skill", "skills: /{name} is the program's own; rename it", {"name": taken[0]})
        for key in ("name", "place"):
            values = [getattr(project, key) for project in self.projects]
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise PydanticCustomError("twice", "projects: {it} is there twice; take one out", {"it": twice})
        return self


EFFORTS: tuple[str, ...] = ("low", "medium", "high", "xhigh", "max")


def parse_model(raw: object) -> str:
    """The name of a model, as agent.toml takes it. Raises Refusal("usage")."""
    try:
        return TypeAdapter(Word).validate_python(raw)
    except ValidationError:
        raise Refusal("usage", f"cannot use {shown(raw)} as the model: give a name such as sonnet") from None


# pydantic's kind of error → what we say; its own words speak of inputs, strings and instances.
_SENTENCES = {
    "extra_forbidden": "unknown key",
    "missing": "it is missing",
    "string_type": "text is needed",
    "string_unicode": "text in UTF-8 is needed",
    "string_pattern_mismatch": "some of its characters, or their order, are not allowed",
    "string_too_long": "it is longer than {max_length} characters",
    "literal_error": "{expected} is needed",
    "list_type": "a list is needed",
    "dict_type": "a table is needed",
    "string_too_short": "it is empty",
    "too_short": "it holds nothing; leave it out",
    "too_long": "it holds more than {max_length} entries",
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_parsing_size": "a whole number is needed, and this one is too large",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "finite_number": "a finite number is needed",
    "greater_than": "more than {gt} is needed",
    "greater_than_equal": "at least {ge} is needed",
    "less_than": "less than {lt} is needed",
    "less_than_equal": "at most {le} is allowed",
    "model_type": "an object is needed",
}


def describe(error: ValidationError) -> str:
    """A pydantic error as one readable clause."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = named(".".join(str(part) for part in first["loc"] if part != "[key]"))[:60] or "the file"
    sentence = _SENTENCES.get(first["type"])
    what = sentence.format_map(first.get("ctx", {})) if sentence else first["msg"]
    return f"{where}: {what}"


def parse_agent_toml(data: bytes) -> AgentSettings:
    """The settings that agent.toml holds. Raises Refusal("usage") that names the key."""
    try:
        return AgentSettings.model_validate(tomllib.loads(data.decode()))
    except UnicodeDecodeError:
        raise Refusal("usage", "cannot read agent.toml: it is not UTF-8") from None
    except ValidationError as exc:
        raise Refusal("usage", f"cannot use agent.toml: {describe(exc)}") from None
    except RecursionError:
        raise Refusal("usage", "cannot read agent.toml: it is nested too deep") from None
    except ValueError as exc:  # also of a number too long to convert
        raise Refusal("usage", f"cannot read agent.toml: {str(exc)[:200]}") from None
