"""Each agent's two git repositories: `proposed`, which the manager's container writes, and `applied`, ours alone.

What an agent can write is hostile: no git works in `proposed`. A proposal is one full commit id, whose objects are
copied into a quarantine, checked there, taken into our own bare repository, and read from there. The proposed
repositories lie at proposed/NAME/config (not under agents/NAME), so that one bind mount of `proposed` gives the
manager every agent's configuration, those of agents to come included, and nothing else of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from hive_core.extra_files import ExtraFiles
from hive_core.extras import NONE, Extras
from hive_core.git.agent_locks import AgentLocks
from hive_core.git.commit_contents import Contents, kinds, read_contents, read_files
from hive_core.git.proposals import Proposal, check_proposal, commit_at, diff_between, fetch_proposal, main_of, pin_of
from hive_core.git.repo_making import make_repositories, write_beside
from hive_core.git.repo_upkeep import Needed, Tag, clear_leavings, deployed_tags, set_tags, tidy
from hive_core.git.revisions import expand_revision
from hive_core.git.sterile_git import GitFailed, run_git
from hive_core.protocol.paths import explain
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha, shown
from hive_core.settings import POLICY, TOLD, AgentSettings

T = TypeVar("T")


def harness_settings(settings: AgentSettings, prompt: str, extras: Extras = NONE) -> dict[str, Any]:
    """What travels to the harness with a lease: protocol.harness.Settings. The policy is the host's to enforce."""
    empty = (key for key in ("env", "mcp_servers", "projects") if not getattr(settings, key))
    left_out = {"description", "skills", "plugins", *(POLICY - TOLD), *empty}
    chosen = settings.model_dump(exclude=left_out, exclude_none=True)
    told = {"extras": extras.to_wire()} if extras else {}
    return {**chosen, "prompt": prompt, **told, "policy": settings.model_dump(include=POLICY, exclude_defaults=True)}


class Repos:
    """All methods run git or read files in a worker thread; cancelling one leaves the repositories usable.

    A repository that git cannot use is a Refusal("unavailable"). Of what writes in one agent's applied repository
    there is one at a time.
    """

    def __init__(self, state_dir: Path) -> None:
        self._applied = state_dir / "applied"
        self._proposed = state_dir / "proposed"
        # A hostile repository can take all its time: not on every thread that others need.
        self._fetching = trio.Semaphore(2)
        self._writing = AgentLocks()
        self._extra_files = ExtraFiles(state_dir)
        self._held: Counter[tuple[AgentName, CommitSha]] = Counter()
        self._fetched: Counter[AgentName] = Counter()

    @property
    def proposed_dir(self) -> Path:
        return self._proposed

    async def create(self, name: AgentName, files: Mapping[str, str], *, replace: bool = False) -> CommitSha:
        """Make both repositories with `files` as the first commit, tagged deployed/0; again: make what is missing.

        Returns the commit that is deployed/0. A crash at any point leaves nothing that the next call cannot finish.
        `replace` is for a name that is no agent yet: repositories that begin with other files are made anew.
        """
        async with self._writing.of(name):
            return await _in_thread(
                name, lambda: make_repositories(self._applied, self._proposed, name, files, replace)
            )

    async def fetch(self, name: AgentName, sha: CommitSha) -> Proposal:
        """Take one commit from the proposed repository and check it. Raises Refusal when it cannot be deployed."""
        async with self._writing.of(name), self._fetching:
            self._fetched[name] += 1
            return await _in_thread(name, lambda: fetch_proposal(self._of(name), self._proposed, name, sha))

    @contextmanager
    def holding(self, name: AgentName, sha: CommitSha) -> Iterator[None]:
        """Whatever is tidied in here, this commit stays when it is fetched or made: no row speaks of it yet."""
        self._held[name, sha] += 1
        try:
            yield
        finally:
            self._held[name, sha] -= 1
            self._held += Counter()  # without those that nobody holds

    async def expand(self, name: AgentName, given: object) -> CommitSha:
        """The whole id of the commit that a branch, a tag, HEAD or an abbreviation names in the proposed repository.

        Raises Refusal when it names none, or more than one.
        """
        async with self._writing.of(name), self._fetching:
            return await _in_thread(name, lambda: expand_revision(self._of(name), self._proposed, name, given))

    async def diff(self, name: AgentName, base: CommitSha, sha: CommitSha) -> str:
        """The whole difference between two commits of the applied repository. Raises Refusal when one is not kept."""
        return await _in_thread(name, lambda: _diff(self._of(name), name, base, sha))

    async def main(self, name: AgentName) -> CommitSha:
        """What is deployed, as the applied repository has it."""
        return await _in_thread(name, lambda: main_of(self._of(name)))

    async def look_again(self, name: AgentName, sha: CommitSha) -> Proposal:
        """What was fetched before, held against what the agent runs now. Raises Refusal as `fetch` does."""
        return await _in_thread(name, lambda: check_proposal(self._of(name), self._of(name), name, sha))

    async def read(self, name: AgentName, sha: CommitSha) -> dict[str, Any]:
        """The harness settings that a commit of the applied repository holds."""
        found = await self.contents(name, sha)
        return harness_settings(found.settings, found.prompt, found.extras)

    async def contents(self, name: AgentName, sha: CommitSha) -> Contents:
        """What a commit of the applied repository holds. Raises Refusal where that may not be deployed any more."""
        return await _in_thread(name, lambda: read_contents(self._of(name), sha))

    async def tagged(self, name: AgentName, tag: str) -> CommitSha:
        """The commit of a tag of the applied repository. Raises Refusal("not_found") when there is no such tag."""
        return await _in_thread(name, lambda: _tagged(self._of(name), name, tag))

    async def deployments(self, name: AgentName) -> dict[str, CommitSha]:
        """The tags of all that was deployed, deployed/0 first, and their commits. Raises Refusal without deployed/0."""
        first = await self.tagged(name, "deployed/0")
        return {"deployed/0": first, **await _in_thread(name, lambda: deployed_tags(self._of(name)))}

    async def put_extras(self, name: AgentName, extras: Extras) -> None:
        """Have skills and plugins lie where the agent's container sees them; again is fine. Who calls this holds the
        agent's lock. Raises Refusal("unavailable")."""
        with _extras_of(name):
            await self._extra_files.put(name, extras)

    async def has_extras(self, name: AgentName, digest: str) -> bool:
        return await self._extra_files.has(name, digest)

    async def keep_extras(self, name: AgentName, digest: str | None) -> None:
        """Remove all that lies there but these, None: all. Raises Refusal("unavailable")."""
        with _extras_of(name):
            await self._extra_files.keep(name, digest)

    async def text(self, name: AgentName, sha: CommitSha, path: str) -> str | None:
        """A file of a commit of the applied repository; None when it holds none of that path."""
        return await _in_thread(name, lambda: _text(self._of(name), sha, path))

    async def commit_back(self, name: AgentName, tag: str) -> CommitSha:
        """Make a commit on main with the files of a tag's. Raises Refusal when those are main's already."""
        async with self._writing.of(name):
            return await _in_thread(name, lambda: _commit_back(self._of(name), name, tag))

    async def commit_edit(self, name: AgentName, path: str, edit: Callable[[str], str], message: str) -> CommitSha:
        """Make a commit on main with one of its files edited. path: of a file that is in no folder.

        Raises Refusal when main holds no such file, and whatever `edit` raises.
        """
        async with self._writing.of(name):
            return await _in_thread(name, lambda: _commit_edit(self._of(name), name, path, edit, message))

    async def hand_over(self, name: AgentName) -> None:
        """Write main to proposed/NAME/deployed.bundle, from which its proposed repository can fetch it.

        All of it: which of the hive's own commits that repository has is not known.
        """

        def write() -> None:
            bundle = run_git(self._of(name), "bundle", "create", "--quiet", "-", "main")
            write_beside(self._proposed, name, "deployed.bundle", bundle)

        await _in_thread(name, write)

    async def tag(self, name: AgentName, tag: str, sha: CommitSha, note: str = "") -> None:
        """Tag a commit of the applied repository; the same tag again is left as it is."""
        async with self._writing.of(name):
            await _in_thread(name, lambda: set_tags(self._of(name), [Tag(tag, sha, note)]))

    async def check_main(self, name: AgentName, sha: CommitSha, base: CommitSha) -> None:
        """Raises Refusal("conflict") when `deploy` would."""
        await _in_thread(name, lambda: _check_main(self._of(name), name, sha, base))

    async def deploy(self, name: AgentName, approval_id: int, sha: CommitSha, base: CommitSha) -> None:
        """Move main from `base` to `sha` and tag it deployed/ID; done already is fine.

        Raises Refusal("conflict") when main is neither.
        """
        async with self._writing.of(name):
            await _in_thread(name, lambda: _deploy(self._of(name), name, approval_id, sha, base))

    async def pin(self, name: AgentName, sha: CommitSha) -> None:
        """Give a commit of the applied repository the ref that a proposal's has, by which nix fetches it."""
        async with self._writing.of(name):
            await _in_thread(name, lambda: run_git(self._of(name), "update-ref", pin_of(sha), sha))

    async def mend(self, name: AgentName, tags: Sequence[Tag]) -> None:
        """Remove what a daemon that died left behind, and set those of the tags that are missing."""

        def mend() -> None:
            clear_leavings(self._of(name), name)
            set_tags(self._of(name), tags)

        async with self._writing.of(name):
            await _in_thread(name, mend)

    async def tidy(self, name: AgentName, needed: Callable[[], Awaitable[Needed]]) -> None:
        """Drop the pins, tags and objects of proposals that nobody needs.

        needed: what the rows need, asked while nothing else writes here.
        """
        async with self._writing.of(name):
            held = {sha for each, sha in self._held if each == name}  # first: what is let go has its row by then
            rows = await needed()
            keep = Needed(rows.commits | held, rows.numbers)
            if await _in_thread(name, lambda: tidy(self._of(name), keep)):
                self._fetched.pop(name, None)

    def untidy(self, fetched: int) -> list[AgentName]:
        """Whose repositories took so many commits since they were tidied."""
        return [name for name, number in self._fetched.items() if number >= fetched]

    def _of(self, name: AgentName) -> Path:
        return self._applied / f"{name}.git"


@contextmanager
def _extras_of(name: AgentName) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise Refusal("unavailable", f"cannot see to the skills and plugins of {name}: {explain(exc)}") from exc


async def _in_thread(name: AgentName, function: Callable[[], T]) -> T:
    """Run what blocks; a repository that git cannot use becomes a Refusal that says why."""
    try:
        return await trio.to_thread.run_sync(function)
    except (GitFailed, OSError) as exc:
        why = explain(exc) if isinstance(exc, OSError) else str(exc)
        raise Refusal("unavailable", f"cannot use the repository of {name}: {why}") from exc


def _diff(repository: Path, name: AgentName, base: CommitSha, sha: CommitSha) -> str:
    for each, (kind, _) in zip((base, sha), kinds(repository, [base, sha]), strict=True):
        if kind != "commit":
            why = f"it is not in the repository of {name}, which keeps what was not deployed for a while only"
            raise Refusal("not_found", f"cannot compare {each[:12]}: {why}")
    return diff_between(repository, base, sha)


def _tagged(repository: Path, name: AgentName, tag: str) -> CommitSha:
    if not run_git(repository, "for-each-ref", f"refs/tags/{tag}"):
        why = f"{name} has no tag {shown(tag)}; `hive history {name}` shows them"
        raise Refusal("not_found", f"cannot find what was deployed: {why}")
    return commit_at(repository, f"refs/tags/{tag}")


def _text(repository: Path, sha: CommitSha, path: str) -> str | None:
    if (entry := read_files(repository, sha).get(path)) is None:
        return None
    return run_git(repository, "cat-file", "blob", entry.object_id).decode("utf-8", "replace")


def _commit_back(repository: Path, name: AgentName, tag: str) -> CommitSha:
    main, target = main_of(repository), _tagged(repository, name, tag)
    tree, now = (run_git(repository, "rev-parse", f"{commit}^{{tree}}").decode().strip() for commit in (target, main))
    if tree == now:
        raise Refusal("conflict", f"cannot roll {name} back to {tag}: it runs on the same files now")
    return _commit(repository, tree, main, f"Back to {tag}")


def _commit_edit(repository: Path, name: AgentName, path: str, edit: Callable[[str], str], message: str) -> CommitSha:
    main = main_of(repository)
    if (text := _text(repository, main, path)) is None:
        raise Refusal("refused", f"cannot change {path} of {name}: its commit holds none")
    blob = run_git(repository, "hash-object", "-w", "--stdin", stdin=edit(text).encode()).decode().strip()
    entries = run_git(repository, "ls-tree", "-z", main).split(b"\0")[:-1]
    named = [entry.partition(b"\t") for entry in entries]
    kept = [entry for entry, (_, _, file) in zip(entries, named, strict=True) if file != path.encode()]
    (mode,) = (about.split(b" ")[0] for about, _, file in named if file == path.encode())
    changed = mode + f" blob {blob}\t{path}".encode()
    tree = run_git(repository, "mktree", "-z", stdin=b"".join(entry + b"\0" for entry in [*kept, changed]))
    return _commit(repository, tree.decode().strip(), main, message)


def _commit(repository: Path, tree: str, main: CommitSha, message: str) -> CommitSha:
    made = run_git(repository, "commit-tree", tree, "-p", main, "-m", message)
    sha = CommitSha(made.decode().strip())
    run_git(repository, "update-ref", pin_of(sha), sha)
    return sha


def _check_main(repository: Path, name: AgentName, sha: CommitSha, base: CommitSha) -> CommitSha:
    main = main_of(repository)
    if main not in (sha, base):
        why = f"{name} runs {main[:12]} now, not {base[:12]}; let it be asked for again"
        raise Refusal("conflict", f"cannot apply {sha[:12]}: {why}")
    return main


def _deploy(repository: Path, name: AgentName, approval_id: int, sha: CommitSha, base: CommitSha) -> None:
    main = _check_main(repository, name, sha, base)
    # Both or none: an approval that fails moves nothing.
    both = f"update refs/heads/main {sha} {main}\nupdate refs/tags/deployed/{approval_id} {sha}\n"
    run_git(repository, "update-ref", "--stdin", stdin=both.encode())
