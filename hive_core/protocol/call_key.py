"""What tells a call that is sent again from another one. Standard library alone."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any


class CallKey(str):
    """A client's key of one call of a tool, which knows with what arguments it was given.

    The same key with the same arguments is the same call; with other arguments it is a mistake of the client's.
    """

    _arguments: dict[str, Any]

    def __new__(cls, key: str, arguments: dict[str, Any]) -> CallKey:
        self = super().__new__(cls, key)
        self._arguments = arguments
        return self

    @cached_property
    def digest(self) -> str:
        """Of the arguments, however their object was ordered."""
        return hashlib.sha256(json.dumps(self._arguments, sort_keys=True).encode()).hexdigest()
