"""agent.toml: an agent's settings as data, read from a commit and checked before anything trusts them."""

from __future__ import annotations

import tomllib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hive_core.protocol.refusal import Refusal

# The agent program's own tools that are on unless agent.toml lists others. Messaging, scheduling, sub-agents and the
# web are the hive's to give, so they are not here.
DEFAULT_TOOLS = ["Bash", "Read", "Edit", "Write", "Glob", "Grep"]

Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:\[\]-]*\z", max_length=80)]


class AgentSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    program: Literal["claude", "rehearsal"] = "claude"
    model: Word = "sonnet"
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    tools: Annotated[list[Word], Field(max_length=64)] = DEFAULT_TOOLS
    description: Annotated[str, StringConstraints(max_length=200)] = ""


def describe(error: ValidationError) -> str:
    """A pydantic error as one readable clause."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
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
