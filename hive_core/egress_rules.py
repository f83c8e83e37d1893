"""`egress` of agent.toml: the destinations that an agent may reach.

An entry is a text or a table:

"github.com:443"           tunnels (HTTP's CONNECT) to that host; "*.github.com:443": to every host below it
"http://deb.debian.org"    plain requests through the proxy, GET and HEAD; also with a port, and with *.
"python"                   a preset: what stands under that word in egress_presets.toml
{ to = "git.lan:3000", addresses = ["10.0.0.7"] }        a host whose addresses may lie in these networks too
{ to = "http://repo.lan", methods = ["GET", "POST"] }    other methods
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, TypeAdapter, model_validator
from pydantic_core import PydanticCustomError

from hive_core.destinations import (
    HTTP_PORT,
    TUNNEL,
    Allowed,
    authority,
    destination,
    parse_address,
    parse_authority,
    parse_network,
)
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown

ENTRIES_LIMIT = 200
_PLAIN, _BELOW = "http://", "*."
_WORD = re.compile(r"[a-z][a-z0-9-]*")

Method = Literal["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]
READING: list[Method] = ["GET", "HEAD"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class Rule(BaseModel):
    """An entry of `egress`.

    to         a destination, or a preset
    addresses  networks in which, besides the public ones, the host's addresses may lie
    methods    of plain requests
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    to: Text
    addresses: Annotated[list[Text], Field(max_length=50)] = []
    methods: Annotated[list[Method], Field(min_length=1, max_length=10)] = READING

    @model_validator(mode="after")
    def _can_be_used(self) -> Rule:
        try:
            self.allowed()
        except Refusal as refusal:
            raise PydanticCustomError("destination", "{why}", {"why": refusal.message}) from None
        return self

    def allowed(self) -> tuple[Allowed, ...]:
        """What it allows; of a preset all that it holds. Raises Refusal("usage") of one that cannot be used."""
        if self.to in presets():
            if self.addresses or self.methods != READING:
                raise Refusal("usage", f"cannot give addresses or methods to {self.to}: it is a preset; name its hosts")
            return presets()[self.to]
        if _WORD.fullmatch(self.to):
            known = ", ".join(presets())
            word = shown(self.to)
            raise Refusal("usage", f"cannot find a preset {word}: there are {known}; a host is written with its port")
        return (self._one(),)

    def _one(self) -> Allowed:
        is_plain = self.to.startswith(_PLAIN)
        rest = self.to.removeprefix(_PLAIN)
        if "/" in rest:
            raise Refusal("usage", f"cannot use {shown(self.to)}: {_without_path(self.to)}")
        below = rest.startswith(_BELOW)
        host, port = parse_authority(rest.removeprefix(_BELOW), HTTP_PORT if is_plain else None)
        address = parse_address(host)
        if below and address is not None:
            raise Refusal("usage", f"cannot use {shown(self.to)}: nothing is below an address; leave out the *.")
        written = authority(f"{_BELOW}{host}" if below else host, port)
        written = f"{_PLAIN}{written}" if is_plain else written
        if self.to not in (written, written.removesuffix(f":{HTTP_PORT}") if is_plain else written):
            raise Refusal("usage", f"cannot use {shown(self.to)}: write {written}")
        if not is_plain and self.methods != READING:
            raise Refusal("usage", f"cannot give methods to {self.to}: they are of plain requests, {_PLAIN}{written}")
        own = () if address is None else (parse_network(str(address)),)
        networks = (*own, *(parse_network(raw) for raw in self.addresses))
        return Allowed(host, port, below, tuple(self.methods) if is_plain else (), networks)

    def written(self) -> str | dict[str, Any]:
        """The entry as agent.toml has it, the shortest way."""
        given = self.model_dump(exclude_defaults=True)
        return self.to if given.keys() == {"to"} else given


def _without_path(to: str) -> str:
    if to.startswith("https://"):
        return f"the proxy sees no more of https than host and port; write {shown(to[8:].partition('/')[0])[1:-1]}:443"
    return "an entry names a host, and no path of it; leave out what is behind the host and its port"


def _as_table(entry: object) -> object:
    return {"to": entry} if isinstance(entry, str) else entry


Entry = Annotated[Rule, BeforeValidator(_as_table)]
Entries = Annotated[list[Entry], Field(max_length=ENTRIES_LIMIT)]
_ENTRIES: TypeAdapter[list[Rule]] = TypeAdapter(Entries)


@cache
def presets() -> dict[str, tuple[Allowed, ...]]:
    given = tomllib.loads(resources.files("hive_core").joinpath("egress_presets.toml").read_text("utf-8"))
    # Without the check of whether it can be used, which would look for a preset first.
    return {name: tuple(Rule.model_construct(to=to)._one() for to in given[name]) for name in given}


def expand(entries: Iterable[Rule | str | dict[str, Any]]) -> tuple[Allowed, ...]:
    """What entries allow, presets resolved, each once. Raises pydantic.ValidationError."""
    rules = _ENTRIES.validate_python(list(entries))
    return tuple(dict.fromkeys(one for rule in rules for one in rule.allowed()))


def wanted(how: str, host: str, port: int) -> Rule:
    """The entry by which a request would pass, as long as the host's addresses are public."""
    methods = READING if how in (TUNNEL, *READING) else [*READING, how]
    return Rule.model_validate({"to": destination(how, host, port), "methods": methods})
