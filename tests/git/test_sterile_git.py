"""git of our own: within its limits, by nobody's configuration, and gone when it ends."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path

import pytest

from hive_core.git.sterile_git import GitFailed, GitLimits, run_git
from tests.hives import PATIENCE_S

LARGE = 256 * 2**20


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    run_git(tmp_path / "ours.git", "init", "--quiet", "--bare", "--template=")
    return tmp_path / "ours.git"


def shell(repository: Path, script: str, limits: GitLimits | None = None) -> bytes:
    """git, which runs a shell as it runs its own helpers."""
    return run_git(repository, "-c", f"alias.x=!{script}", "x", limits=limits)


def test_what_takes_too_long_is_ended_with_all_that_it_started(repository: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(GitFailed, match=r"^git took longer than 1 s$") as caught:
        shell(repository, f"exec 3>{tmp_path}/pipe; sleep 1000 & wait", GitLimits(time_s=1.0))
    assert caught.value.over == "time"
    # Nobody holds the pipe open for writing any more; whoever is killed may take a moment.
    with contextlib.suppress(BlockingIOError):
        assert os.read(pipe, 1) == b""
        return
    (poll := select.poll()).register(pipe, select.POLLHUP)
    assert poll.poll(PATIENCE_S * 1000)


def test_what_closes_its_output_and_goes_on_is_ended_too(repository: Path) -> None:
    with pytest.raises(GitFailed, match="git took longer than"):
        shell(repository, "exec >&- 2>&-; sleep 1000", GitLimits(time_s=0.3))


def test_what_says_too_much_is_ended(repository: Path) -> None:
    with pytest.raises(GitFailed, match="git said more than 1,000 bytes") as caught:
        shell(repository, "yes", GitLimits(output_bytes=1000))
    assert caught.value.over == "output"


def test_what_writes_too_large_a_file_is_ended(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(GitFailed, match="it would write a file of more than 1,048,576 bytes"):
        shell(repository, f"yes > {tmp_path}/large", GitLimits(file_bytes=1024**2))
    assert (tmp_path / "large").stat().st_size <= 1024**2


def test_what_takes_too_much_memory_is_ended(repository: Path) -> None:
    with pytest.raises(GitFailed, match="git took more than 32 MiB of memory"):
        run_git(
            repository,
            "hash-object",
            "--stdin",
            stdin=b"x" * 48 * 1024**2,
            limits=GitLimits(memory_bytes=32 * 1024**2),
        )


def test_a_pack_of_more_than_the_memory_can_be_looked_into(repository: Path, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(LARGE)
    stored = ["-c", "core.compression=0", "hash-object", "-w", str(tmp_path / "large")]  # into a pack: it is large
    large = run_git(repository, *stored, limits=GitLimits(file_bytes=2 * LARGE)).decode().strip()
    (pack,) = (repository / "objects" / "pack").glob("*.pack")
    assert pack.stat().st_size > LARGE
    assert run_git(repository, "cat-file", "-t", large, limits=GitLimits(memory_bytes=LARGE)) == b"blob\n"


def test_what_reads_nothing_that_it_is_told_is_not_waited_for(repository: Path) -> None:
    run_git(repository, "-c", "alias.x=!true", "x", stdin=b"x" * 1024**2)


def test_what_git_says_becomes_one_line_that_hides_nothing(repository: Path) -> None:
    with pytest.raises(GitFailed) as caught:
        shell(repository, "printf 'warning: a\\nfatal: b\\033[31m\\nc\\n' >&2; exit 3")
    assert (str(caught.value), caught.value.code) == ("fatal: b⟨U+001B⟩[31m", 3)


def test_nothing_of_whoever_started_us_reaches_git(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".gitconfig").write_text("[alias]\n\tevil = !echo evil\n")
    for name, value in {
        "HOME": str(tmp_path),
        "GIT_DIR": "/nowhere",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "alias.evil",
        "GIT_CONFIG_VALUE_0": "!echo evil",
        "GIT_ALTERNATE_OBJECT_DIRECTORIES": "/nowhere",
        "GIT_TRACE": str(tmp_path / "trace"),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GitFailed, match="'evil' is not a git command"):
        run_git(repository, "evil")
    assert run_git(repository, "rev-parse", "--git-dir").decode().strip() == str(repository)
    assert not (tmp_path / "trace").exists()


def test_it_is_the_first_to_go_where_the_host_has_no_memory_left(repository: Path) -> None:
    assert shell(repository, "cat /proc/self/oom_score_adj") == b"1000\n"
