"""What an agent pushes: held in git's quarantine, judged there, and sent on before any ref of the mirror moves.

git itself checks every object (fsck) and that nothing is missing; what is here comes behind that. Everything blocks.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hive_core.git.hive_secrets import OVERLAP, find_secret, forms_of
from hive_core.git.mirrors import (
    HEADS,
    MEMORY_BYTES,
    NOTHING,
    REFS_LIMIT,
    TAGS,
    Mirror,
    packed_bytes,
    refs_of,
    stands_in_the_way,
)
from hive_core.git.remotes import better_told, their_git
from hive_core.git.sterile_git import GitFailed, GitLimits, Setting, command_of, run_git
from hive_core.project_rules import Project
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.visible import mib, named
from hive_core.protocol.words import AgentName

AT_ONCE_LIMIT = 100  # refs of one push
PUSHED_REFS_LIMIT = REFS_LIMIT * 9 // 10  # of a mirror: the rest is left to its source
ASK_LIMIT_BYTES = 64 * 1024
INFLATED_FACTOR = 16  # how much more than the limit of a push its objects may be when they are unpacked
REF_TOLD = 250  # characters of a name
_PIECE_BYTES = 1024 * 1024
_FORWARD_ENDS = ("(fetch first)", "(non-fast-forward)", "(stale info)", "(needs force)")

# Run by git in the mirror when all objects have come and been checked, and before a ref moves. It hands what it is
# given to the daemon, through pipes that it has of it, and does what that says; whose end is a no.
HOOK = """\
#!/bin/sh
trap '' PIPE
if [ -n "$GIT_PUSH_CERT" ]; then  # which git has put into the mirror already
    rm -f "objects/${GIT_PUSH_CERT%"${GIT_PUSH_CERT#??}"}/${GIT_PUSH_CERT#??}"
    echo "the hive takes no signed push; push without --signed" >&2
    exit 1
fi
{ printf '%s\\n' "$GIT_QUARANTINE_PATH" && cat && echo .; } >"/dev/fd/$HIVE_ASK" 2>/dev/null
{ read -r verdict && cat >&2; } <"/dev/fd/$HIVE_ANSWER"
[ "$verdict" = ok ] && exit 0
[ -n "$verdict" ] || echo "the hive's daemon went away before all was pushed; push again" >&2
exit 1
"""


@dataclass(frozen=True, slots=True)
class Update:
    """A ref of the mirror that is to move. old, new: ids; NOTHING where it is not there."""

    ref: str
    old: str
    new: str

    @property
    def short(self) -> str:
        return self.ref.removeprefix(HEADS).removeprefix("refs/")


@dataclass(frozen=True, slots=True)
class Push:
    """quarantine: where the objects are that came; None when none had to come."""

    quarantine: Path | None
    updates: tuple[Update, ...]


def put_hook(folder: Path) -> Path:
    """A directory with our hook and no other, for core.hooksPath."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = folder / ".pre-receive"
    fresh.write_text(HOOK)
    fresh.chmod(0o700)
    fresh.rename(folder / "pre-receive")
    return folder


def parse_push(asked: bytes, mirror: Path) -> Push:
    """What the hook asks. Raises Refusal for a push that is too large to be looked at."""
    if len(asked) > ASK_LIMIT_BYTES:
        raise Refusal("refused", f"more is pushed at once than may be: the limit is {AT_ONCE_LIMIT} branches")
    lines = asked.decode("utf-8", "surrogateescape").split("\n")
    quarantine = Path(lines[0]) if lines[0] else None
    if quarantine is not None and mirror / "objects" not in quarantine.parents:
        raise Refusal("refused", "what came lies in no quarantine of this project")
    updates = [line.split(" ", 2) for line in lines[1:] if line]
    if len(updates) > AT_ONCE_LIMIT:
        raise Refusal("refused", f"{len(updates):,} branches are pushed at once, and the limit is {AT_ONCE_LIMIT}")
    return Push(quarantine, tuple(Update(named(ref), old, new) for old, new, ref in updates))


def check_names(push: Push, secrets: Mapping[str, bytes]) -> None:
    """Raises Refusal where the name of a branch is, or holds, one of the secrets; names are told to many."""
    forms = forms_of(secrets)
    for update in push.updates:
        if (name := find_secret(update.ref.encode(), forms)) is not None:
            raise _holds("the name of a branch", name)


def check_room(mirror: Path, push: Push, most_bytes: int) -> None:
    """Raises Refusal where a push would make the mirror larger than `most_bytes`, or give it so many refs that no
    fetch would take it any more: then nobody could work on the project."""
    came = 0 if push.quarantine is None else sum(file.stat().st_size for file in push.quarantine.glob("pack/*"))
    if (size := packed_bytes(mirror) + came) > most_bytes:
        why = f"its mirror would have {mib(size)}, and project_bytes is {mib(most_bytes)}"
        raise Refusal("refused", f"nothing can be pushed to this project: {why}; the operator can raise that")
    new = sum(update.old == NOTHING for update in push.updates)
    if new and len(refs_of(mirror, HEADS, TAGS)) + new > PUSHED_REFS_LIMIT:
        why = f"it would have more than {PUSHED_REFS_LIMIT:,} branches and tags"
        raise Refusal("refused", f"no new branch can be pushed to this project: {why}; remove some")


class Judge:
    """Whether a push may be, for one mirror and one agent's settings. look: as of a run of git."""

    def __init__(
        self, mirror: Path, project: Project, agent: AgentName, push_bytes: int, push_s: float, look: Callable[[], None]
    ) -> None:
        self._mirror = mirror
        self._project = project
        self._agent = agent
        self._push_bytes = push_bytes
        self._limits = GitLimits(push_s, MEMORY_BYTES, push_bytes)
        self._ends_at = time.monotonic() + push_s
        self._look = look

    def check(self, push: Push, secrets: Mapping[str, bytes]) -> None:
        """Raises Refusal with what may not be, and why; and GitFailed. secrets: what may leave nowhere, by names."""
        for update in push.updates:
            if (why := self._project.refuses(self._agent, update.ref)) is not None:
                raise _refused(update, f"{why}; ask for another rule of `projects` in your agent.toml")
        self._check_places(push)
        for update in push.updates:
            self._check_move(push, update)
        if push.quarantine is not None:
            self._check_secrets(push, push.quarantine, secrets)

    def _check_move(self, push: Push, update: Update) -> None:
        if update.new == NOTHING:
            if not self._project.force:
                raise _refused(update, "it would be removed, and that takes `force` in your agent.toml")
            if run_git(self._mirror, "symbolic-ref", "HEAD").decode().strip() == update.ref:
                raise _refused(update, "it would be removed, and a clone begins with it")
            return
        kind = self._git(push, "cat-file", "-t", update.new).decode().strip()
        if kind != "commit" and not (kind == "tag" and update.ref.startswith(TAGS)):
            raise _refused(update, f"it would be a {kind}; push a commit")
        if update.old == NOTHING or self._project.force:
            return
        if update.ref.startswith(TAGS):
            raise _refused(update, "the tag is there already, and to move it takes `force` in your agent.toml")
        try:
            self._git(push, "merge-base", "--is-ancestor", update.old, update.new)
        except GitFailed as failed:
            if failed.code != 1:
                raise
            why = "it would lose commits that are there; fetch, and merge or rebase onto it"
            raise _refused(update, f"{why} (by force takes `force` in your agent.toml)") from None

    def _check_places(self, push: Push) -> None:
        there = refs_of(self._mirror, HEADS, TAGS)
        for update in push.updates:
            if there.get(update.ref, NOTHING) != update.old:  # which is what whoever pushes says
                raise _refused(update, "it has moved meanwhile; fetch, and push again")
            if update.new != NOTHING:
                if other := stands_in_the_way(update.ref, there):
                    raise _refused(
                        update, f"{named(other)} is there, and git keeps one of the two; choose another name"
                    )
                there[update.ref] = ""

    def _check_secrets(self, push: Push, quarantine: Path, secrets: Mapping[str, bytes]) -> None:
        """Look for the secrets in every object that came: in what files hold, in their names, and in messages."""
        forms = forms_of(secrets)
        for object_id, piece in self._objects(quarantine):
            if (name := find_secret(piece, forms)) is not None:
                where = self._path_of(push, object_id)
                raise _holds("a file" if find_secret(where.encode(), forms) else where, name)

    def _objects(self, quarantine: Path) -> Iterator[tuple[str, bytes]]:
        """The id of each object and a piece of what is in it, piece by piece; each piece begins with the end of the
        last one."""
        setting = Setting(environment={"GIT_OBJECT_DIRECTORY": str(quarantine)})
        words = ("cat-file", "--batch-all-objects", "--batch", "--unordered", "--buffer")
        command, environment = command_of(self._mirror, words, self._limits, setting)
        with subprocess.Popen(
            command,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                assert process.stdout is not None
                yield from self._read_batch(process.stdout)
                if process.wait():
                    raise GitFailed("what came could not be read to its end")
            finally:
                process.kill()

    def _read_batch(self, stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
        left_bytes = INFLATED_FACTOR * self._push_bytes
        while head := stream.readline(256):
            object_id, _, size = (*head.decode("ascii", "replace").split(), "", "", "")[:3]
            if not size.isdigit():
                raise GitFailed("what came could not be read")
            left, rest = int(size), b""
            left_bytes -= left
            if left_bytes < 0:
                most = mib(INFLATED_FACTOR * self._push_bytes)
                raise Refusal("refused", f"what is pushed has more than {most} when it is unpacked; push less at once")
            while left:
                self._look()
                if time.monotonic() > self._ends_at:
                    raise Refusal("refused", "it takes longer than push_s to look at; push less at once")
                piece = stream.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise GitFailed("what came could not be read to its end")
                left -= len(piece)
                yield object_id, rest + piece
                rest = (rest + piece)[-OVERLAP:]
            stream.read(1)

    def _path_of(self, push: Push, object_id: str) -> str:
        """What an object is called in what is pushed."""
        new = [update.new for update in push.updates if update.new != NOTHING]
        said = self._git(push, "rev-list", "--objects", *new, "--not", "--all").decode("utf-8", "replace")
        for line in said.splitlines():
            found, _, path = line.partition(" ")
            if found == object_id:
                return named(path)[:200] or f"the message of commit {object_id[:12]}"
        return f"the object {object_id[:12]}"

    def _git(self, push: Push, *words: str) -> bytes:
        return run_git(self._mirror, *words, limits=self._limits, setting=quarantined(push, self._mirror, self._look))


def quarantined(push: Push, mirror: Path, look: Callable[[], None] | None, setting: Setting | None = None) -> Setting:
    """A setting in which git sees what came beside what is in the mirror."""
    setting = setting or Setting()
    if push.quarantine is None:
        return Setting(setting.config, setting.environment, look)
    objects = {
        "GIT_OBJECT_DIRECTORY": str(push.quarantine),
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": f"{mirror}/objects",
    }
    return Setting(setting.config, {**setting.environment, **objects}, look)


def forward(
    mirror: Mirror, push: Push, agent: AgentName, push_s: float, look: Callable[[], None], secrets: Mapping[str, bytes]
) -> None:
    """Bring it to the project's repository: all of it or nothing. Again is fine. Raises Refusal, or GitFailed.

    A server gets the same refs; a repository of this host refs/hive/AGENT/…, which nobody has checked out.
    secrets: what is not told of a server's answer.
    """
    source = mirror.access.source
    words = ["push", "--porcelain", "--no-verify", "--no-follow-tags", "--recurse-submodules=no", "--no-signed"]
    if len(push.updates) > 1:
        words.append("--atomic")
    specs: list[str] = []
    for update in push.updates:
        what = "" if update.new == NOTHING else update.new
        if source.kind == "path":
            specs.append(
                f"+{what}:{place_on_host(update.ref, agent)}" if what else f":{place_on_host(update.ref, agent)}"
            )
        else:
            # That it may be by force was judged already, and against what the server had when it was fetched last.
            words.append(f"--force-with-lease={update.ref}:{_or_empty(update.old)}")
            specs.append(f"{what}:{update.ref}")
    if source.kind == "path":
        words.append(f"--receive-pack={their_git(source, 'receive-pack')}")
    setting = quarantined(push, mirror.path, look, mirror.access.setting())
    try:
        run_git(
            mirror.path,
            *words,
            "--",
            source.text,
            *specs,
            limits=GitLimits(push_s, MEMORY_BYTES, MEMORY_BYTES),
            setting=setting,
        )
    except GitFailed as failed:
        if find_secret(failed.printed.encode("utf-8", "replace"), forms_of(secrets)) is not None:
            why = f"{source.text} did not take it, and what it says holds a secret of the hive's"
            raise Refusal("refused", why) from None
        raise Refusal("refused", _why_not(failed, source.text)) from None


def place_on_host(ref: str, agent: AgentName) -> str:
    """Where a repository of this host gets what an agent pushes."""
    return f"refs/hive/{agent}/{ref.removeprefix(HEADS).removeprefix('refs/')}"


def _or_empty(sha: str) -> str:
    return "" if sha == NOTHING else sha


def _why_not(failed: GitFailed, where: str) -> str:
    rejected = [line.split("\t")[-1] for line in failed.printed.splitlines() if line.startswith("!\t")]
    if any(line.endswith(_FORWARD_ENDS) for line in rejected):
        return f"{where} has moved meanwhile; fetch, and push again"
    said = [
        line.removeprefix("remote: ").strip() for line in failed.printed.splitlines() if line.startswith("remote: ")
    ]
    why = "; ".join(filter(None, [*rejected[:2], *said[:3]])) or str(better_told(failed))
    return f"{where} did not take it: {named(why)[:400]}"


def _holds(where: str, name: str) -> Refusal:
    way_out = "take it out of every commit that you push, and tell the operator how you came by it"
    return Refusal("refused", f"{where} holds a secret of the hive's ({name}); {way_out}")


def _refused(update: Update, why: str) -> Refusal:
    return Refusal("refused", f"{update.short[:REF_TOLD]} cannot be pushed: {why}")
