"""What an agent's settings say of a project: where its clone is, and which refs of the project it may push."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

PROJECTS_LIMIT = 32
BRANCH_LIMIT = 200
# Less than git takes: what means the same to every program that reads a branch's name, and hides nothing.
_BRANCH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/@+#=,-]*")
_COMMIT = re.compile(r"[0-9a-fA-F]{40}|[0-9a-fA-F]{64}")  # for which git takes the commit, not the branch
_HEADS, _TAGS = "refs/heads/", "refs/tags/"
BRANCH_FORM = f"1 to {BRANCH_LIMIT} letters, digits and ._/@+#=,- as git takes them"


def is_branch(name: str) -> bool:
    """Whether this is the name of a branch or tag that is taken here; git would take each of them, too."""
    parts = name.split("/")
    return (
        len(name) <= BRANCH_LIMIT
        and _BRANCH.fullmatch(name) is not None
        and ".." not in name
        and not name.endswith(".")
        and all(part and not part.startswith((".", "-")) and not part.endswith(".lock") for part in parts)
        and _COMMIT.fullmatch(name) is None
        and parts[0] not in ("HEAD", "refs", "tags")  # which would read as something else
    )


def _branch(name: str) -> str:
    if not is_branch(name):
        raise PydanticCustomError("branch", "a branch is {form}", {"form": BRANCH_FORM})
    return name


def _pattern(pattern: str) -> str:
    start = pattern.removesuffix("*")
    # The rest that `*` stands for completes the name: "iris/" alone is none.
    if start and not is_branch(start if start == pattern else f"{start}x"):
        raise PydanticCustomError("pattern", "a branch, or the beginning of branches and then *, is needed")
    return pattern


class Project(BaseModel):
    """An entry of `projects` in agent.toml.

    push   the branches that the agent may push, `*` at the end for any rest; None: those below its own name;
           empty: none
    force  whether it may push them by force, and remove them
    tags   whether it may push tags: new ones, unless force
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*\z", max_length=63)]
    path: Annotated[str, StringConstraints(pattern=r"^/projects/[A-Za-z0-9][A-Za-z0-9._-]{0,62}\z")] | None = None
    branch: Annotated[str, AfterValidator(_branch)] | None = None
    push: Annotated[str, StringConstraints(max_length=BRANCH_LIMIT), AfterValidator(_pattern)] | None = None
    force: bool = False
    tags: bool = False

    @property
    def place(self) -> str:
        """Where the clone is in the agent's container."""
        return self.path or f"/projects/{self.name}"

    def pushes(self, agent: str) -> str:
        """The pattern of the branches that an agent of this name may push."""
        return f"{agent}/*" if self.push is None else self.push

    def as_text(self) -> str:
        """In words, for whoever approves it."""
        branch = f", branch {self.branch}" if self.branch else ""
        pushes = "its own name's branches" if self.push is None else self.push or "nothing"
        more = "".join(f", {key}" for key in ("force", "tags") if getattr(self, key))
        return f"{self.name} at {self.place}{branch}, push {pushes}{more}"

    def refuses(self, agent: str, ref: str) -> str | None:
        """Why this ref may not be pushed, and what may; None when it may."""
        if ref.startswith(_TAGS) and is_branch(ref.removeprefix(_TAGS)):
            return None if self.tags else "tags may not be pushed (projects.tags of agent.toml)"
        branch = ref.removeprefix(_HEADS)
        if branch == ref or not is_branch(branch):
            return f"it is no branch whose name is taken here: {BRANCH_FORM}"
        pattern = self.pushes(agent)
        start = pattern.removesuffix("*")
        if branch == pattern or (start != pattern and branch.startswith(start)):
            return None
        return f"only {pattern} may be pushed" if pattern else "nothing may be pushed to this project"
