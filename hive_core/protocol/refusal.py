"""The one shape of a "no" that its caller can act on."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# The exit code `hive` ends with for each code of a refusal. Anything else is 1: it failed.
EXIT_CODES = {"usage": 2, "not_found": 3, "not_running": 3, "refused": 4, "conflict": 4}


class Refusal(Exception):
    """A request was understood and will not be done; nothing has changed because of it.

    code     one of usage (the request is malformed), not_found, not_running, refused (a rule says no),
             conflict (the state moved on), unavailable (try again later)
    message  one sentence for a person: what is wrong, the limit, the way out
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def to_wire(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message}

    @classmethod
    def from_wire(cls, data: Any) -> Refusal:
        """The refusal that a peer sent; a malformed one becomes a refusal that says so."""
        if not isinstance(data, dict):
            return cls("unavailable", "the other side answered with something that is not an error of this protocol")
        return cls(str(data.get("code", "failed")), str(data.get("message", "no reason was given")))
