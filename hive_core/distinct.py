"""Tables of the configuration that are told apart by their names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from pydantic.functional_validators import AfterValidator
from pydantic_core import PydanticCustomError


class Named(Protocol):
    @property
    def name(self) -> str: ...


Tables = TypeVar("Tables", bound=Sequence[Named])


def distinct(what: str) -> AfterValidator:
    """Refuses a second table of the same name. what: "lanes"."""
    return AfterValidator(_check(what))


def _check(what: str) -> Callable[[Tables], Tables]:
    def check(tables: Tables) -> Tables:
        names = [table.name for table in tables]
        for index, name in enumerate(names):
            if name in names[:index]:
                sentence = "two {what} are called {name}; give each its own name"
                raise PydanticCustomError("twice", sentence, {"what": what, "name": name})
        return tables

    return check
