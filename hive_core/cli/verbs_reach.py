"""More verbs of `hive`, in the form of those in verbs: about what agents reach and work on."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

REACH_VERBS: dict[str, tuple[str, str, list[tuple[tuple[str, ...], dict[str, Any]]]]] = {
    "forge": (
        "forges.forge",
        "where the pull requests and issues of projects are: agents open and read them, and hear of them by lanes",
        [
            (("what",), {"choices": ["add", "list", "check", "rehearse", "rm"]}),
            (
                ("words",),
                {"nargs": "*", "metavar": "PROJECT", "help": "add: PROJECT URL OWNER/REPO; rehearse: PROJECT NUMBER"},
            ),
            (("--kind",), {"choices": ["forgejo", "github"], "help": "forgejo (Gitea too) but for github.com"}),
            (("--token",), {"metavar": "FILE", "help": "that holds the token of its account; - is standard input"}),
        ],
    ),
}
