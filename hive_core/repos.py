"""Each agent's two git repositories: `proposed`, which the manager's container writes, and `applied`, ours alone.

What an agent can write is hostile: nothing of git runs *inside* `proposed`. A proposal is one full commit id, fetched
into our own bare repository with nothing of the source's configuration honoured, and read from there. The proposed
repositories lie at proposed/NAME/config (not under agents/NAME), so that one bind mount of `proposed` gives the
manager every agent's configuration, those of agents to come included, and nothing else of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import git
import trio
from git.objects.fun import tree_to_stream
from gitdb import IStream
from gitdb.exc import ODBError

from hive_core.commit_contents import FILES, NIX_FILES, read_contents
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha
from hive_core.settings import POLICY, AgentSettings

DIFF_LIMIT_BYTES = 256 * 1024
GIT_TIMEOUT_S = 30

T = TypeVar("T")
_AUTHOR = git.Actor("hyperhive", "hive@localhost")
_STERILE = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_TERMINAL_PROMPT": "0",
    # A promisor remote of the source could name any transport.
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ASKPASS": "true",
    "GIT_ATTR_NOSYSTEM": "1",
    "HOME": os.devnull,
    "XDG_CONFIG_HOME": os.devnull,
    "LC_ALL": "C.UTF-8",
    "GIT_COMMITTER_NAME": "hyperhive",
    "GIT_COMMITTER_EMAIL": "hive@localhost",
}
_CONFIG = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.symlinks": "false",
    "protocol.allow": "never",
    "protocol.file.allow": "always",
    "fetch.fsckObjects": "true",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "tag.gpgSign": "false",
    "commit.gpgSign": "false",
}


@dataclass(frozen=True, slots=True)
class Proposal:
    """A commit that was fetched and found deployable, and what it changes against `base`.

    changed   the files of NIX_FILES that it brings, or brings otherwise
    """

    sha: CommitSha
    base: CommitSha
    changed: tuple[str, ...]
    diff: str


def pin_of(sha: CommitSha) -> str:
    """The ref that keeps a proposal's commit in the applied repository."""
    return f"refs/proposed/{sha}"


def harness_settings(settings: AgentSettings, prompt: str) -> dict[str, Any]:
    """What travels to the harness with a lease: protocol.harness.Settings. The policy is the host's to enforce."""
    left_out = {"description", *POLICY, *(key for key in ("env", "mcp_servers") if not getattr(settings, key))}
    chosen = settings.model_dump(exclude=left_out, exclude_none=True)
    return {**chosen, "prompt": prompt, "policy": settings.model_dump(include=POLICY, exclude_defaults=True)}


async def _in_thread(function: Callable[..., T], name: AgentName, *arguments: Any) -> T:
    """Run a blocking method; a repository that git cannot use becomes a Refusal that says why."""
    try:
        return await trio.to_thread.run_sync(function, name, *arguments)
    except (git.GitError, ODBError, ValueError) as exc:
        raise Refusal("unavailable", f"cannot use the repository of {name}: {_reason(exc)}") from exc


def _reason(exc: Exception) -> str:
    """What git said, as one short line."""
    said = (
        str(exc.stderr).strip().removeprefix("stderr: ").strip("'\n ")
        if isinstance(exc, git.CommandError)
        else str(exc)
    )
    lines = [line for line in said.splitlines() if line.strip()] or ["no reason given"]
    fatal = [line for line in lines if line.startswith(("fatal:", "error:"))]
    return (fatal or lines)[0][:300]


class Repos:
    """All methods run git or read objects in a worker thread; cancelling one leaves the repositories usable.

    A repository that git cannot use is a Refusal("unavailable").
    """

    def __init__(self, state_dir: Path) -> None:
        self._applied = state_dir / "applied"
        self._proposed = state_dir / "proposed"
        # A hostile repository can make git wait for its whole time: not on every thread that others need.
        self._fetching = trio.Semaphore(2)

    @property
    def proposed_dir(self) -> Path:
        return self._proposed

    async def create(self, name: AgentName, files: Mapping[str, str], *, replace: bool = False) -> CommitSha:
        """Make both repositories with `files` as the first commit, tagged deployed/0; again: make what is missing.

        Returns the commit that is deployed/0. A crash at any point leaves nothing that the next call cannot finish.
        `replace` is for a name that is no agent yet: repositories that begin with other files are made anew.
        """
        return await _in_thread(self._create, name, files, replace)

    async def fetch(self, name: AgentName, sha: CommitSha) -> Proposal:
        """Take one commit from the proposed repository and check it. Raises Refusal when it cannot be deployed."""
        async with self._fetching:
            return await _in_thread(self._fetch, name, sha)

    async def look_again(self, name: AgentName, sha: CommitSha) -> Proposal:
        """What was fetched before, held against what the agent runs now. Raises Refusal as `fetch` does."""
        return await _in_thread(self._look_again, name, sha)

    async def read(self, name: AgentName, sha: CommitSha) -> dict[str, Any]:
        """The harness settings that a commit of the applied repository holds."""
        return await _in_thread(self._read, name, sha)

    async def tag(self, name: AgentName, tag: str, sha: CommitSha, note: str = "") -> None:
        """Tag a commit of the applied repository; the same tag again is left as it is."""
        await _in_thread(self._tag, name, tag, sha, note)

    async def check_main(self, name: AgentName, sha: CommitSha, base: CommitSha) -> None:
        """Raises Refusal("conflict") when `deploy` would."""
        await _in_thread(self._check_main, name, sha, base)

    async def deploy(self, name: AgentName, approval_id: int, sha: CommitSha, base: CommitSha) -> None:
        """Move main from `base` to `sha` and tag it deployed/ID; done already is fine.

        Raises Refusal("conflict") when main is neither.
        """
        await _in_thread(self._deploy, name, approval_id, sha, base)

    async def pin(self, name: AgentName, sha: CommitSha) -> None:
        """Give a commit of the applied repository the ref that a proposal's has, by which nix fetches it."""
        await _in_thread(self._pin, name, sha)

    def _open(self, name: AgentName) -> git.Repo:
        repo = git.Repo(self._applied / f"{name}.git")
        repo.git.update_environment(**_STERILE)
        return repo

    def _git(self, repo: git.Repo, *arguments: str) -> str:
        options = [word for key, value in _CONFIG.items() for word in ("-c", f"{key}={value}")]
        output: str = repo.git.execute(["git", *options, *arguments], kill_after_timeout=GIT_TIMEOUT_S)
        return output

    def _create(self, name: AgentName, files: Mapping[str, str], replace: bool) -> CommitSha:
        applied, fresh = self._applied / f"{name}.git", self._applied / f".{name}.new"
        self._applied.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = self._open_room(name)
        try:
            if replace and applied.exists() and self._first_files(name) != files:
                _remove("config", room)
                shutil.rmtree(applied)
            if not applied.exists():
                shutil.rmtree(fresh, ignore_errors=True)
                self._first_commit(fresh, files)
                fresh.rename(applied)
            if not _is_there("config", room):
                # Made in a directory of ours, where the manager's container cannot put a hand in while git works.
                shutil.rmtree(fresh, ignore_errors=True)
                with self._open(name) as repo:
                    # Hard links would let the container write the objects of the applied repository.
                    self._git(repo, "clone", "--quiet", "--no-hardlinks", "--template=", str(applied), str(fresh))
                os.rename(fresh, "config", dst_dir_fd=room)
        finally:
            os.close(room)
        with self._open(name) as repo:
            return CommitSha(repo.commit("deployed/0").hexsha)

    def _open_room(self, name: AgentName) -> int:
        """A descriptor of proposed/NAME. The manager can write beside it, so links are not followed."""
        self._proposed.mkdir(mode=0o700, parents=True, exist_ok=True)
        top = os.open(self._proposed, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=top)
            return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
        except OSError as exc:
            where = f"/agents/{name} of the manager"
            raise Refusal(
                "refused", f"cannot create {name}: {where} is no directory ({exc.strerror}); remove it"
            ) from exc
        finally:
            os.close(top)

    def _first_files(self, name: AgentName) -> dict[str, str]:
        with self._open(name) as repo:
            tree = repo.commit("deployed/0").tree
            return {str(entry.path): entry.data_stream.read().decode("utf-8", "replace") for entry in tree}

    def _first_commit(self, path: Path, files: Mapping[str, str]) -> None:
        # An empty template: the machine's own would bring its hooks along.
        repo = git.Repo.init(path, bare=True, template="", initial_branch="main", allow_unsafe_options=True)
        with repo:
            repo.git.update_environment(**_STERILE)
            entries = []
            for file_name, text in sorted(files.items()):
                data = text.encode()
                stream = repo.odb.store(IStream("blob", len(data), io.BytesIO(data)))
                entries.append((stream.binsha, 0o100644, file_name))
            buffer = io.BytesIO()
            tree_to_stream(entries, buffer.write)
            tree = repo.odb.store(IStream("tree", buffer.tell(), io.BytesIO(buffer.getvalue())))
            commit = git.Commit.create_from_tree(
                repo,
                git.Tree(repo, tree.binsha),
                "First configuration\n",
                parent_commits=[],
                author=_AUTHOR,
                committer=_AUTHOR,
                author_date=f"{int(time.time())} +0000",
                commit_date=f"{int(time.time())} +0000",
            )
            self._git(repo, "update-ref", "refs/heads/main", commit.hexsha)
            self._git(repo, "tag", "deployed/0", commit.hexsha)

    def _fetch(self, name: AgentName, sha: CommitSha) -> Proposal:
        source = self._proposed / name / "config"
        for folder in (source.parent, source, source / ".git"):
            if folder.is_symlink() or not folder.is_dir():
                raise Refusal(
                    "refused", f"cannot fetch from /agents/{name}/config: {folder.name} is no directory of its own"
                )
        with self._open(name) as repo:
            # The pin keeps the objects until the approval is resolved, whatever happens to the source.
            pin = pin_of(sha)
            try:
                self._git(repo, "fetch", "--quiet", "--no-tags", "--no-write-fetch-head", str(source), f"{sha}:{pin}")
            except git.GitCommandError as exc:
                raise Refusal(
                    "refused",
                    f"cannot fetch {sha} from the configuration of {name}: {_reason(exc)}; commit it first",
                ) from None
            return self._check(repo, name, sha)

    def _look_again(self, name: AgentName, sha: CommitSha) -> Proposal:
        with self._open(name) as repo:
            return self._check(repo, name, sha)

    def _check(self, repo: git.Repo, name: AgentName, sha: CommitSha) -> Proposal:
        base = CommitSha(repo.commit("refs/heads/main").hexsha)
        if self._git(repo, "cat-file", "-t", sha) != "commit":
            raise Refusal("refused", f"cannot apply {sha[:12]}: it is not a commit (`git rev-parse HEAD` gives one)")
        if sha == base:
            raise Refusal("refused", f"cannot apply {sha[:12]}: it is what {name} runs already")
        try:
            self._git(repo, "merge-base", "--is-ancestor", base, sha)
        except git.GitCommandError:
            raise Refusal(
                "refused", f"cannot apply {sha[:12]}: it is not based on {base[:12]}, which {name} runs; rebase it"
            ) from None
        files, before = read_contents(repo, sha).files, {entry.path: entry.hexsha for entry in repo.commit(base).tree}
        changed = tuple(name for name in NIX_FILES if name in files and files[name] != before.get(name))
        shown = ["diff", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", base, sha]
        diff = self._git(repo, *shown, "--", *FILES, *NIX_FILES)
        if len(diff.encode()) > DIFF_LIMIT_BYTES:
            raise Refusal("refused", f"cannot apply {sha[:12]}: its diff is over {DIFF_LIMIT_BYTES:,} bytes; split it")
        return Proposal(sha, base, changed, diff)

    def _read(self, name: AgentName, sha: CommitSha) -> dict[str, Any]:
        with self._open(name) as repo:
            found = read_contents(repo, sha)
            return harness_settings(found.settings, found.prompt)

    def _pin(self, name: AgentName, sha: CommitSha) -> None:
        with self._open(name) as repo:
            self._git(repo, "update-ref", pin_of(sha), sha)

    def _tag(self, name: AgentName, tag: str, sha: CommitSha, note: str) -> None:
        with self._open(name) as repo:
            if tag not in {existing.name for existing in repo.tags}:
                message = ("-a", "--cleanup=verbatim", "-m", note) if note else ()
                self._git(repo, "tag", *message, tag, sha)

    def _check_main(self, name: AgentName, sha: CommitSha, base: CommitSha) -> str:
        with self._open(name) as repo:
            main: str = repo.commit("refs/heads/main").hexsha
        if main not in (sha, base):
            raise Refusal("conflict", f"cannot apply {sha[:12]}: {name} runs {main[:12]} now, not {base[:12]}")
        return main

    def _deploy(self, name: AgentName, approval_id: int, sha: CommitSha, base: CommitSha) -> None:
        main = self._check_main(name, sha, base)
        with self._open(name) as repo:
            self._git(repo, "update-ref", "refs/heads/main", sha, main)
        self._tag(name, f"deployed/{approval_id}", sha, "")


def _is_there(name: str, folder: int) -> bool:
    """Whether a directory holds an entry of that name, whatever it is."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _remove(name: str, folder: int) -> None:
    """Remove an entry of a directory, following no link."""
    try:
        shutil.rmtree(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except OSError:
        os.unlink(name, dir_fd=folder)
