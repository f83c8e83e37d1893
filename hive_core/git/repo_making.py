"""Making an agent's two repositories, with the first commit that both begin with. Everything here blocks."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from hive_core.git.commit_contents import read_files
from hive_core.git.proposals import commit_at
from hive_core.git.sterile_git import run_git
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import AgentName, CommitSha

FIRST = "deployed/0"


def make_repositories(
    applied_dir: Path, proposed_dir: Path, name: AgentName, files: Mapping[str, str], replace: bool
) -> CommitSha:
    """As `Repos.create`. Raises GitFailed, OSError, and Refusal for what the manager put in the way."""
    applied, fresh = applied_dir / f"{name}.git", applied_dir / f".{name}.new"
    applied_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    room = _open_room(proposed_dir, name)
    try:
        if replace and applied.exists() and _begins_otherwise(applied, files):
            _remove("config", room)
            shutil.rmtree(applied)
        if not applied.exists():
            shutil.rmtree(fresh, ignore_errors=True)
            _first_commit(fresh, files)
            fresh.rename(applied)
        if not _is_there("config", room):
            # Made in a directory of ours, where the manager's container cannot put a hand in while git works.
            shutil.rmtree(fresh, ignore_errors=True)
            # Hard links would let the container write the objects of the applied repository.
            run_git(applied, "clone", "--quiet", "--no-hardlinks", "--template=", str(applied), str(fresh))
            os.rename(fresh, "config", dst_dir_fd=room)
    finally:
        os.close(room)
    return commit_at(applied, f"refs/tags/{FIRST}")


def write_beside(proposed_dir: Path, name: AgentName, file: str, content: bytes) -> None:
    """Write a file of ours beside an agent's proposed repository, where the manager can read it."""
    room, fresh = _open_room(proposed_dir, name), f".{file}.new"
    try:
        _remove(fresh, room)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(fresh, flags, 0o600, dir_fd=room), "wb") as opened:
            opened.write(content)
        os.rename(fresh, file, src_dir_fd=room, dst_dir_fd=room)
    finally:
        os.close(room)


def _open_room(proposed_dir: Path, name: AgentName) -> int:
    """A descriptor of proposed/NAME. The manager can write beside it, so links are not followed."""
    proposed_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    top = os.open(proposed_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=top)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    except OSError as exc:
        where = f"/agents/{name} of the manager"
        raise Refusal("refused", f"cannot create {name}: {where} is no directory ({exc.strerror}); remove it") from exc
    finally:
        os.close(top)


def _begins_otherwise(applied: Path, files: Mapping[str, str]) -> bool:
    """Whether the first commit of a repository holds other files than these."""
    first = commit_at(applied, f"refs/tags/{FIRST}")
    found = read_files(applied, first)
    return found.keys() != files.keys() or any(
        run_git(applied, "cat-file", "blob", found[path].object_id) != text.encode() for path, text in files.items()
    )


def _first_commit(path: Path, files: Mapping[str, str]) -> None:
    # An empty template: the machine's own would bring its hooks along.
    run_git(path, "init", "--quiet", "--bare", "--template=", "--initial-branch=main")
    who = f"hyperhive <hive@localhost> {int(time.time())} +0000"
    lines = [b"commit refs/heads/main", f"committer {who}".encode(), _data("First configuration\n")]
    for file_name, text in sorted(files.items()):
        lines += [f"M 100644 inline {file_name}".encode(), _data(text)]
    lines += [b"reset refs/tags/deployed/0", b"from refs/heads/main", b"", b"done", b""]
    run_git(path, "fast-import", "--quiet", "--done", "--date-format=raw", stdin=b"\n".join(lines))


def _data(text: str) -> bytes:
    content = text.encode()
    return b"data %d\n%b" % (len(content), content)


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
