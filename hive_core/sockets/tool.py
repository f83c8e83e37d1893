"""What a tool of an agent's is: its form, its answer, and the method that gives it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import mcp_types as types
from pydantic import BaseModel

from hive_core.protocol.call_key import CallKey
from hive_core.sockets import forms
from hive_core.sockets.told import Result

Key = CallKey | None


@dataclass(frozen=True, slots=True)
class Tool:
    """call: with its parsed arguments, its key, and where it waits, whether it is taken back.

    told: the result in words.
    """

    name: str
    description: str
    takes: type[forms.Arguments]
    answers: type[BaseModel]
    told: Callable[[Result], str]
    call: Callable[..., Awaitable[Result]]
    read_only: bool = False
    destructive: bool = False
    open_world: bool = False  # what it deals with is not the hive's
    waits: bool = False  # it may take minutes: whoever asks to be told that it goes on is told

    @property
    def asks_for(self) -> str:
        """The kind of the approval that it puts before the operator, by its name; "" of any other."""
        return self.name.removeprefix("request_") if self.name.startswith("request_") else ""

    def to_mcp(self) -> types.Tool:
        return types.Tool(
            name=self.name,
            description=self.description,
            input_schema=forms.schema_of(self.takes),
            output_schema=forms.schema_of(self.answers),
            annotations=types.ToolAnnotations(
                read_only_hint=self.read_only,
                idempotent_hint=True,
                destructive_hint=self.destructive,
                open_world_hint=self.open_world,
            ),
        )


_DECLARED: dict[str, list[Tool]] = {}  # by the class whose methods they are
Method = TypeVar("Method", bound=Callable[..., Awaitable[Result]])


def tool(
    description: str,
    takes: type[forms.Arguments],
    answers: type[BaseModel],
    told: Callable[[Result], str],
    **traits: bool,
) -> Callable[[Method], Method]:
    """The method is the tool of its name."""

    def add(method: Method) -> Method:
        owner, _, name = method.__qualname__.rpartition(".")
        _DECLARED.setdefault(owner, []).append(Tool(name, description, takes, answers, told, method, **traits))
        return method

    return add


def tools_of(owner: Any) -> dict[str, Tool]:
    """The tools that an object's methods are, in the order in which its class has them."""
    return {one.name: replace(one, call=partial(one.call, owner)) for one in declared(type(owner))}


def declared(owner: type) -> list[Tool]:
    """The tools of a class, whose `call` wants an object of it first."""
    return [one for each in owner.__mro__ for one in _DECLARED.get(each.__qualname__, [])]
