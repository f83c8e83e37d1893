"""Backups of a hive that is written to meanwhile, and archives that nobody should believe."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from hive_core.git.repos import Repos
from hive_core.lock import take_lock
from hive_core.procedures import backup, backup_format, restore
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import MANAGER, OPERATOR, AgentName
from hive_core.store.schema import APPLICATION_ID, migrate
from tests.dashboards import hive_of
from tests.hives import Services, clean_environment, open_services
from tests.needs import ROOT
from tests.processes import PATIENCE_S, look_until

NOW = "2026-01-01T00:00:00+00:00"


def quiet(_: int, __: int) -> None:
    pass


def back_up(state: Path, to: Path, **more: Any) -> backup.Report:
    work = to.parent / f"{to.name}.work"
    work.mkdir()
    with to.open("wb") as out:
        return backup.back_up(state, out, work, **{"with_credentials": False, "now": NOW, "tell": quiet, **more})


def verify(file: Path) -> restore.Manifest:
    work = file.parent / f"{file.name}.verify"
    work.mkdir(exist_ok=True)
    with file.open("rb") as source:
        return restore.verify(source, work, quiet)


def bring_back(file: Path, state: Path, paused: bool = False) -> restore.Manifest:
    state.mkdir(mode=0o700, exist_ok=True)
    with file.open("rb") as source:
        return restore.restore(source, state, paused=paused, tell=quiet)


def git(repo: Path, *words: str) -> str:
    command = ["git", "-c", "safe.directory=*", "-C", str(repo), *words]
    return subprocess.run(command, env=clean_environment(), check=True, capture_output=True, text=True).stdout.strip()


async def approve(hive: Services, approval_id: int) -> None:
    """Approve what is asked for, and see it carried out."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.serve)
        with trio.fail_after(PATIENCE_S):
            approval = await hive.approvals.get(approval_id)
            done = await hive.gate.approve(approval.id, approval.digest, OPERATOR)
        nursery.cancel_scope.cancel()
    assert done.state == "done"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a hive with a manager, an agent, mail, and a large body."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)

    async def fill() -> None:
        async with open_services(folder) as hive:
            await hive.gate.ensure_manager("You manage.")
            asked = await hive.gate.spawn.request(OPERATOR, AgentName("iris"), "You write.", "hands")
            await approve(hive, asked["approval"])
            await hive.say("operator", "iris", "remember me")

    trio.run(fill)
    notes = folder / "agents" / "iris" / "state"
    notes.mkdir(parents=True)
    (notes / "notes.md").write_text("a note")
    (notes / "run.sh").write_text("#!/bin/sh\n")
    (notes / "run.sh").chmod(0o755)
    (notes / "empty").mkdir(mode=0o750)
    (notes / "latest").symlink_to("notes.md")
    (notes / "secrets").symlink_to("/etc/passwd")
    os.utime(notes / "notes.md", (1_000_000, 1_000_000))
    (folder / "credentials").mkdir(mode=0o700)
    (folder / "credentials" / "anthropic-api-key").write_text("secret-canary")
    (folder / "processes").mkdir()
    (folder / "nix").mkdir()
    (folder / "processes" / "iris.log").write_text("of this machine")
    return folder


def test_what_comes_back_is_what_was_there(state: Path, tmp_path: Path) -> None:
    report = back_up(state, tmp_path / "hive.tar")
    assert report.agents == ["hm1nd", "iris"]
    assert report.changed == []
    assert report.left_out == ["credentials: see --with-credentials"]
    manifest = bring_back(tmp_path / "hive.tar", tmp_path / "new")
    assert len(manifest.files) == report.files
    notes = tmp_path / "new" / "agents" / "iris" / "state"
    assert (notes / "notes.md").read_text() == "a note"
    assert (notes / "notes.md").stat().st_mtime == 1_000_000
    assert (notes / "run.sh").stat().st_mode & 0o777 == 0o755
    assert (notes / "empty").stat().st_mode & 0o777 == 0o750
    assert (notes / "latest").readlink() == Path("notes.md")
    assert (notes / "secrets").readlink() == Path("/etc/passwd")
    assert sorted(os.listdir(tmp_path / "new")) == ["agents", "applied", "hive.sqlite", "proposed"]
    assert (tmp_path / "new" / "hive.sqlite").stat().st_mode & 0o777 == 0o600
    for name in ("hm1nd", "iris"):
        assert git(tmp_path / "new" / "applied" / f"{name}.git", "fsck", "--strict") == ""
        assert git(tmp_path / "new" / "proposed" / name / "config", "status", "--short") == ""

    async def look() -> None:
        async with open_services(tmp_path / "new") as hive:
            message = await hive.broker.messages.one(1)
            assert message is not None
            bodies = [row["body"] for row in await hive.broker.messages.newest()]
            assert "remember me" in bodies
            iris = await hive.agents.get("iris")
            settings = await hive.repos.read(AgentName("iris"), iris.deployed_sha)  # type: ignore[arg-type]
            assert "You write." in settings["prompt"]

    trio.run(look)


def test_credentials_go_along_only_when_asked(state: Path, tmp_path: Path) -> None:
    back_up(state, tmp_path / "without.tar")
    assert b"secret-canary" not in (tmp_path / "without.tar").read_bytes()
    back_up(state, tmp_path / "with.tar", with_credentials=True)
    assert bring_back(tmp_path / "with.tar", tmp_path / "new").credentials
    assert (tmp_path / "new" / "credentials" / "anthropic-api-key").read_text() == "secret-canary"


def test_agents_can_be_kept_from_running_on_the_new_machine(state: Path, tmp_path: Path) -> None:
    with sqlite3.connect(state / "hive.sqlite") as database:
        database.execute("UPDATE agents SET wanted = 'down' WHERE name = 'iris'")
    database.close()
    back_up(state, tmp_path / "hive.tar")
    wanted = "SELECT name, wanted FROM agents ORDER BY name"
    for paused, manager in ((False, "up"), (True, "paused")):
        bring_back(tmp_path / "hive.tar", tmp_path / str(paused), paused)
        with sqlite3.connect(tmp_path / str(paused) / "hive.sqlite") as restored:
            assert restored.execute(wanted).fetchall() == [("hm1nd", manager), ("iris", "down")]
        restored.close()


def test_the_copy_is_of_one_instant_and_neither_it_nor_the_writer_waits_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "PAGES", 1)
    path = tmp_path / "hive.sqlite"
    writer = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    writer.execute("PRAGMA journal_mode = WAL")
    migrate(writer, str(path))
    writer.execute("CREATE TABLE pairs (a INTEGER, b INTEGER, filling TEXT)")
    writer.execute("BEGIN")
    writer.executemany("INSERT INTO pairs VALUES (?, ?, ?)", [(n, n, "x" * 2000) for n in range(20_000)])
    writer.execute("COMMIT")
    stop, rounds = threading.Event(), 0

    def write() -> None:
        nonlocal rounds
        while not stop.is_set() and rounds < 30_000:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE pairs SET a = a + 1 WHERE rowid = ?", (1 + 7 * rounds % 20_000,))
            writer.execute("UPDATE pairs SET b = b + 1 WHERE rowid = ?", (1 + 7 * rounds % 20_000,))
            writer.execute("COMMIT")
            rounds += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        before = look_until(lambda: rounds)
        backup.copy_database(path, tmp_path / "copy.sqlite")
        during = rounds - before
    finally:
        stop.set()
        thread.join()
    writer.close()
    assert during > 0, "the writer stood still while the copy was made"
    assert rounds < 30_000, "the copy was made only when the writer had nothing more to write"
    copy = sqlite3.connect(tmp_path / "copy.sqlite")
    assert copy.execute("SELECT count(*), sum(a != b) FROM pairs").fetchone() == (20_000, 0)
    backup_format.check_database(copy)
    copy.close()


def test_an_approval_that_is_carried_out_while_we_copy_is_undecided_in_the_copy(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is copied first; then a proposal is made, approved and deployed; then the repositories."""
    copied = backup.copy_database

    def copy_and_go_on(source: Path, target: Path) -> None:
        copied(source, target)
        trio.run(deploy)

    async def deploy() -> None:
        async with open_services(state) as hive:
            config = Repos(state).proposed_dir / "iris" / "config"
            (config / "CLAUDE.md").write_text("You paint.")
            git(config, "commit", "--quiet", "--all", "--message", "paint")
            sha = git(config, "rev-parse", "HEAD")
            asked = await hive.gate.apply_commit.request(MANAGER, AgentName("iris"), sha, "why not")  # type: ignore[arg-type]
            await approve(hive, asked["approval"])
            assert (await hive.agents.get("iris")).deployed_sha == sha

    monkeypatch.setattr(backup, "copy_database", copy_and_go_on)
    back_up(state, tmp_path / "hive.tar")
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    applied = tmp_path / "new" / "applied" / "iris.git"
    tags = ["approved/2", "deployed/0", "deployed/2", "proposal/2"]
    assert git(state / "applied" / "iris.git", "tag").split() == tags
    assert git(applied, "tag").split() == ["deployed/0"]
    database = sqlite3.connect(tmp_path / "new" / "hive.sqlite")
    (deployed,) = database.execute("SELECT deployed_sha FROM agents WHERE name = 'iris'").fetchone()
    database.close()
    assert git(applied, "rev-parse", "main") == deployed
    git(applied, "fsck", "--strict")


def test_a_file_that_changes_under_our_hands_is_named(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noisy = state / "agents" / "iris" / "state" / "noisy.log"
    noisy.write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(backup, "PIECE_BYTES", 1_000_000)
    read = backup._Writer._taken

    def write_meanwhile(self: Any, file: Any, limit: int) -> Any:
        if limit >= 3_000_000:
            with noisy.open("ab") as more:
                more.write(b"y")
        return read(self, file, limit)

    monkeypatch.setattr(backup._Writer, "_taken", write_meanwhile)
    report = back_up(state, tmp_path / "hive.tar")
    assert report.changed == ["agents/iris/state/noisy.log"]
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    assert (tmp_path / "new" / "agents" / "iris" / "state" / "noisy.log").read_bytes().startswith(b"x" * 3_000_000)


def test_what_an_agent_plants_neither_stops_a_backup_nor_leads_it_astray(state: Path, tmp_path: Path) -> None:
    planted = state / "agents" / "iris" / "state" / "planted"
    planted.mkdir()
    os.mkfifo(planted / "fifo")
    (planted / os.fsdecode(b"not-\xff-utf8\n")).write_text("odd")
    (planted / "outside").symlink_to("/", target_is_directory=True)
    (planted / "loop").symlink_to("loop")
    with (planted / "hollow").open("wb") as hollow:
        hollow.truncate(1024**4)
    deep = planted
    for _ in range(backup_format.DEPTH_LIMIT):
        deep = deep / "d"
        deep.mkdir()
    lock = state / "proposed" / "iris" / "config" / ".git" / "index.lock"
    lock.touch()
    report = back_up(state, tmp_path / "hive.tar")
    told = "\n".join(report.left_out)
    assert "planted/fifo: neither a file nor a directory" in told
    assert "planted/hollow: a file of 1,099,511,627,776 bytes that are mostly holes" in told
    assert f"more than {backup_format.DEPTH_LIMIT} directories deep" in told
    assert (tmp_path / "hive.tar").stat().st_size < 10_000_000
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    back = tmp_path / "new" / "agents" / "iris" / "state" / "planted"
    assert (back / os.fsdecode(b"not-\xff-utf8\n")).read_text() == "odd"
    assert (back / "outside").readlink() == Path("/")
    assert not (tmp_path / "new" / "proposed" / "iris" / "config" / ".git" / "index.lock").exists()


def test_what_all_share_goes_along_whatever_is_planted_in_it_and_comes_back(state: Path, tmp_path: Path) -> None:
    shared = state / "shared"
    (shared / "plan").mkdir(parents=True)
    (shared / "plan" / "file").write_text("of two agents")
    (shared / "secrets").symlink_to("/etc/shadow")
    (shared / "around").symlink_to(state)
    os.mkfifo(shared / "fifo")
    report = back_up(state, tmp_path / "hive.tar")
    assert [line for line in report.left_out if "shared" in line] == ["shared/fifo: neither a file nor a directory"]
    bring_back(tmp_path / "hive.tar", tmp_path / "again")
    again = tmp_path / "again" / "shared"
    assert (again / "plan" / "file").read_text() == "of two agents"
    assert [os.readlink(again / name) for name in ("secrets", "around")] == ["/etc/shadow", str(state)]
    assert not (again / "fifo").exists()


def test_clones_of_projects_are_in_it_with_what_nobody_else_has_and_what_they_borrow_is_not(
    state: Path, tmp_path: Path
) -> None:
    clone, packs = "agents/iris/projects/x/.git", "agents/iris/mirrors/x/objects/pack"
    for name in (f"{clone}/HEAD", f"{clone}/index.lock", "agents/iris/projects/x/uv.lock", f"{packs}/pack-1.pack"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text("one")
    back_up(state, tmp_path / "hive.tar")
    held = {name for name in verify(tmp_path / "hive.tar").files if "/projects/" in name or "/mirrors/" in name}
    assert held == {f"{clone}/HEAD", "agents/iris/projects/x/uv.lock"}


def test_snapshots_of_what_is_in_it_anyway_are_left_out(state: Path, tmp_path: Path) -> None:
    for own in ("agents/iris", "tombstones/argus@2026-01-01T00:00:00Z/agent"):
        for place in ("snapshots/2026-01-01T00:00:00Z/state", ".restored", "state/snapshots"):
            (state / own / place).mkdir(parents=True)
            (state / own / place / "note").write_text("one")
    back_up(state, tmp_path / "hive.tar")
    held = [name for name in verify(tmp_path / "hive.tar").files if name.endswith("/note")]
    assert held == [
        "agents/iris/state/snapshots/note",
        "tombstones/argus@2026-01-01T00:00:00Z/agent/state/snapshots/note",
    ], "an agent may call a directory as it likes"


def test_a_directory_that_is_a_link_is_refused_rather_than_left_out(state: Path, tmp_path: Path) -> None:
    (state / "agents").rename(tmp_path / "elsewhere")
    (state / "agents").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="agents in the state directory is a link; mount a disk there"):
        back_up(state, tmp_path / "hive.tar")


def test_a_large_body_goes_along_and_one_that_is_gone_is_named(state: Path, tmp_path: Path) -> None:
    text = b"large " * 20_000
    digests = [hashlib.sha256(text).hexdigest(), "f" * 64]
    place = state / "bodies" / digests[0][:2]
    place.mkdir(parents=True)
    (place / digests[0]).write_bytes(text)
    (place / ("0" * 64)).write_bytes(b"an orphan, of a send that was refused")
    with sqlite3.connect(state / "hive.sqlite") as database:
        sql = "INSERT INTO messages (sender, body, body_bytes, body_sha256, cause, chain_id, hops, sent_at_ms)"
        for digest in digests:
            database.execute(f"{sql} VALUES ('iris', 'large', 120000, ?, 'system', 1, 0, 0)", (digest,))
    database.close()
    report = back_up(state, tmp_path / "hive.tar")
    assert f"bodies/ff/{'f' * 64}: it is gone" in report.left_out
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    kept = [path.name for path in (tmp_path / "new" / "bodies").rglob("*") if path.is_file()]
    assert kept == [digests[0]]


@pytest.mark.parametrize("older", [False, True])
def test_attached_files_go_along_where_the_hive_knows_of_any(state: Path, tmp_path: Path, older: bool) -> None:
    digest = hashlib.sha256(b"attached").hexdigest()
    place = state / "bodies" / digest[:2]
    place.mkdir(parents=True)
    (place / digest).write_bytes(b"attached")
    with contextlib.closing(sqlite3.connect(state / "hive.sqlite")) as database, database:
        sql = "INSERT INTO messages (id, sender, body, body_bytes, cause, chain_id, hops, sent_at_ms)"
        database.execute(f"{sql} VALUES (90, 'operator', 'look', 4, 'operator', 90, 0, 0)")
        database.execute("INSERT INTO attachments VALUES (90, 1, 'a.txt', 8, ?)", (digest,))
        if older:
            database.execute("DROP TABLE attachments")
    back_up(state, tmp_path / "hive.tar")
    with tarfile.open(tmp_path / "hive.tar") as tar:
        assert (f"bodies/{digest[:2]}/{digest}" in tar.getnames()) is not older


# -- what is refused ---------------------------------------------------------------------------------------------------


def members(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def rewrite(file: Path, content: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in content:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))


def change(file: Path, name: str, to: Callable[[Any], Any]) -> None:
    """Change a JSON member."""
    rewrite(
        file,
        [
            (member, json.dumps(to(json.loads(data))).encode() if member.name == name else data)
            for member, data in members(file)
        ],
    )


def assert_refused(file: Path, why: str) -> None:
    """Neither a check nor a restore takes it, and nothing is left of the try."""
    with pytest.raises(Refusal, match=why):
        verify(file)
    state = file.parent / "refused"
    state.mkdir()
    with pytest.raises(Refusal, match=why):
        bring_back(file, state)
    assert os.listdir(state) == []


@pytest.fixture
def archive(state: Path, tmp_path: Path) -> Path:
    back_up(state, tmp_path / "hive.tar")
    return tmp_path / "hive.tar"


def test_any_byte_that_differs_is_found(archive: Path) -> None:
    note = next(n for n, (member, _) in enumerate(members(archive)) if member.name.endswith("notes.md"))
    content = members(archive)
    content[note] = (content[note][0], b"A note")
    rewrite(archive, content)
    assert_refused(archive, r"notes.md is not what was backed up \(its sha256 differs\); nothing was written")


def test_a_backup_that_is_cut_off_is_refused_wherever_it_is_cut(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    for part in (0, 100, 512, len(whole) // 2, len(whole) * 9 // 10):
        cut = tmp_path / f"cut-{part}.tar"
        cut.write_bytes(whole[:part])
        with pytest.raises(Refusal, match="cannot use the backup"):
            verify(cut)


def test_a_newer_format_is_refused_by_its_number(archive: Path) -> None:
    change(archive, backup_format.HEAD, lambda head: {**head, "hyperhive_backup": 2})
    assert_refused(archive, r"a newer hyperhive made it \(format 2, this one knows 1\)")


def test_a_newer_database_is_refused(state: Path, tmp_path: Path) -> None:
    with sqlite3.connect(state / "hive.sqlite") as database:
        database.execute("PRAGMA user_version = 999")
    database.close()
    with pytest.raises(Refusal, match="a newer hyperhive wrote it"):
        back_up(state, tmp_path / "hive.tar")


def test_another_tar_file_is_no_backup(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"))
    assert_refused(tmp_path / "other.tar", "readme is not a path that a hive has|it is not a backup of a hive")


def plant(kind: bytes, name: str, **more: Any) -> Callable[[Path], None]:
    def do(file: Path) -> None:
        member = tarfile.TarInfo(name)
        member.type = kind
        for key, value in more.items():
            setattr(member, key, value)
        content = members(file)
        rewrite(file, [*content[:-1], (member, b"x" if kind == tarfile.REGTYPE else b""), content[-1]])

    return do


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        (plant(tarfile.REGTYPE, "../outside"), "not a path that a hive has"),
        (plant(tarfile.REGTYPE, "agents/../../outside"), "not a path that a hive has"),
        (plant(tarfile.REGTYPE, "/etc/cron.d/x"), "not a path that a hive has"),
        (plant(tarfile.REGTYPE, "agents/./x"), "not a path that a hive has"),
        (plant(tarfile.REGTYPE, "daemon.lock"), "not a path that a hive has"),
        (plant(tarfile.REGTYPE, ".restore-x/y"), "not a path that a hive has"),
        (plant(tarfile.SYMTYPE, "agents/x", linkname="/etc"), "agents/x is not a plain file"),
        (plant(tarfile.LNKTYPE, "agents/x", linkname="hive.sqlite"), "agents/x is not a plain file"),
        (plant(tarfile.CHRTYPE, "agents/null"), "agents/null is not a plain file"),
        (plant(tarfile.FIFOTYPE, "agents/fifo"), "agents/fifo is not a plain file"),
        (plant(tarfile.DIRTYPE, "agents/folder"), "agents/folder is not a plain file"),
        (plant(tarfile.REGTYPE, "agents/unknown"), "its manifest does not know agents/unknown"),
        (plant(tarfile.REGTYPE, "hive.sqlite"), "hive.sqlite is in it twice"),
    ],
)
def test_a_member_that_no_backup_has_is_refused(archive: Path, planted: Callable[[Path], None], why: str) -> None:
    planted(archive)
    assert_refused(archive, why)


@pytest.mark.parametrize(
    ("to", "why"),
    [
        (lambda m: {**m, "links": {"../x": "/"}}, "not a path that a hive has"),
        (lambda m: {**m, "links": {"applied/x": "/"}}, "a link where none may be"),
        (lambda m: {**m, "links": {"agents": "/"}}, "a link where none may be"),
        (lambda m: {**m, "links": {"agents/iris/state/notes.md": "/"}}, "two things in it have one name"),
        (lambda m: {**m, "links": {"agents/iris": "/etc"}}, "two things in it have one name|lies below a file"),
        (lambda m: {**m, "links": {"agents/x": "/tmp", **m["links"]}, "folders": {**m["folders"], "agents/x/y": 0o700}},
         "agents/x/y lies below a file"),
        (lambda m: {**m, "folders": {"/tmp/x": 0o700}}, "not a path that a hive has"),
        (lambda m: {**m, "folders": {"agents/x": 0o4777}}, "malformed"),
        (lambda m: {**m, "files": {**m["files"], "agents/y": {"bytes": 1, "sha256": "0", "mode": 0o600}}},
         "agents/y is missing"),
        (lambda m: {**m, "files": []}, "malformed"),
        (lambda m: {**m, "version": 5}, "malformed at version"),
        (lambda m: {**m, "made_at": None}, "malformed at made_at"),
        (lambda m: {**m, "agents": "iris"}, "malformed at agents"),
        (lambda m: {**m, "agents": ["iris", 7]}, "malformed at agents"),
        (lambda m: {**m, "credentials": 1}, "malformed at credentials"),
        (lambda m: {**m, "changed": [None]}, "malformed at changed"),
        (lambda m: {**m, "left_out": {}}, "malformed at left_out"),
        (lambda m: {**m, "folders": {"agents/\ud800": 0o700}}, r"agents/\\ud800 is not a path that a hive has"),
        (lambda m: {**m, "links": {"agents/x": "\ud800"}}, "a link where none may be"),
        (lambda m: {**m, "links": {"agents/x": "y" * 4096}}, "a link where none may be"),
        (lambda m: {**m, "folders": {"agents/" + "x" * 256: 0o700}}, "is not a path that a hive has"),
        (lambda m: {**m, "folders": {"agents" + "/x" * 2000: 0o700}}, "is not a path that a hive has"),
        (lambda m: {**m, "folders": {"agents" + ("/" + "x" * 250) * 13: 0o700}}, "is not a path that a hive has"),
        (lambda m: [], "malformed"),
        (lambda m: {}, "malformed"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_is_refused(archive: Path, to: Callable[[Any], Any], why: str) -> None:
    change(archive, backup_format.MANIFEST, to)
    assert_refused(archive, why)


def behind_its_head(file: Path, raw: bytes) -> None:
    whole, place = file.read_bytes(), members(file)[1][0].offset
    file.write_bytes(whole[:place] + raw + whole[place:])


@pytest.mark.parametrize("mtime", [1e300, float("inf"), float("nan"), -1.0, 2.0**60])
def test_a_time_that_no_file_can_have_is_refused_before_anything_is_written(archive: Path, mtime: float) -> None:
    content = members(archive)
    note = next(member for member, _ in content if member.name.endswith("notes.md"))
    note.mtime, note.pax_headers = 0, {"mtime": str(mtime)}
    rewrite(archive, content)
    assert_refused(archive, "notes.md has a time that no file has; nothing was written")


@pytest.mark.parametrize(("kind", "size"), [(tarfile.XHDTYPE, 2**62), (tarfile.GNUTYPE_LONGNAME, 2**80)])
def test_a_header_larger_than_any_memory_is_refused(archive: Path, kind: bytes, size: int) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, size
    behind_its_head(archive, header.tobuf(tarfile.GNU_FORMAT))
    assert_refused(archive, "it is no tar file, or cut off")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_upon_headers_are_refused(archive: Path, kind: bytes) -> None:
    header = tarfile.TarInfo("x")
    header.type = kind
    behind_its_head(archive, header.tobuf(tarfile.GNU_FORMAT) * 5000)
    assert_refused(archive, "it is no tar file, or cut off")


def test_a_database_without_the_tables_of_a_hive_is_refused(archive: Path, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "hollow.sqlite") as database:
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("CREATE TABLE other (x)")
    database.close()
    with_database(archive, (tmp_path / "hollow.sqlite").read_bytes())
    assert_refused(archive, "cannot use the copy of the database")


def with_database(archive: Path, data: bytes) -> None:
    """Let a backup hold another database, and its manifest say so."""
    rewrite(archive, [(m, data if m.name == "hive.sqlite" else old) for m, old in members(archive)])
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(archive, backup_format.MANIFEST, lambda m: m["files"]["hive.sqlite"].update(entry) or m)


def test_a_database_that_does_not_let_itself_be_changed_is_refused(archive: Path, state: Path, tmp_path: Path) -> None:
    with sqlite3.connect(state / "hive.sqlite") as database:
        database.execute("CREATE TRIGGER no BEFORE UPDATE ON timeline BEGIN SELECT raise(ABORT, 'no'); END")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    with_database(archive, (state / "hive.sqlite").read_bytes())
    with pytest.raises(Refusal, match=r"its database cannot be changed \(no\); nothing was written"):
        bring_back(archive, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


def test_a_hive_that_comes_back_has_a_timeline_of_its_own_each_time(archive: Path, state: Path, tmp_path: Path) -> None:
    found = set()
    for name in ("one", "two"):
        bring_back(archive, tmp_path / name)
    for home in (state, tmp_path / "one", tmp_path / "two"):
        with contextlib.closing(sqlite3.connect(home / "hive.sqlite")) as database:
            found |= {row[0] for row in database.execute("SELECT id FROM timeline")}
    assert len(found) == 3


def test_what_an_agent_names_or_dates_oddly_makes_no_backup_that_cannot_come_back(state: Path, tmp_path: Path) -> None:
    notes = state / "agents" / "iris" / "state"
    for name, mtime in (("old", -5), ("far", 2**40)):
        (notes / name).write_text(name)
        try:
            os.utime(notes / name, (mtime, mtime))
        except OSError:  # not every disk keeps such a time
            continue
    folder = os.open(notes, os.O_RDONLY)
    for _ in range(20):  # a path longer than any that can be opened at once
        os.mkdir("d" * 250, dir_fd=folder)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    report = back_up(state, tmp_path / "hive.tar")
    assert "its path is longer than 3,000 bytes" in "\n".join(report.left_out)
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    assert (tmp_path / "new" / "agents" / "iris" / "state" / "old").read_text() == "old"
    assert (tmp_path / "new" / "agents" / "iris" / "state" / "far").read_text() == "far"


def test_a_damaged_database_is_refused_though_its_digest_is_right(archive: Path) -> None:
    content = members(archive)
    data = bytearray(next(data for member, data in content if member.name == "hive.sqlite"))
    data[5000:9000] = b"\xff" * 4000
    with_database(archive, bytes(data))
    assert_refused(archive, "cannot use the copy of the database")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_junk_in_a_backup_is_a_refusal_and_never_a_trace(small: bytes, data: st.DataObject) -> None:
    junk = bytearray(small)
    for _ in range(data.draw(st.integers(1, 8))):
        junk[data.draw(st.integers(0, len(junk) - 1))] = data.draw(st.integers(0, 255))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        try:
            restore.verify(io.BytesIO(bytes(junk)), Path(folder), quiet)
        except Refusal:
            pass
        else:
            # Only what nobody reads may differ: a time, an owner, the padding.
            assert len(members_of(bytes(junk))) == len(members_of(small))


def members_of(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A backup of an empty hive."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "state").mkdir()
    database = sqlite3.connect(folder / "state" / "hive.sqlite")
    migrate(database, "here")
    database.close()
    back_up(folder / "state", folder / "hive.tar")
    return (folder / "hive.tar").read_bytes()


# -- where to ----------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_empty_is_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("mine")
    with pytest.raises(Refusal, match=r"it is not empty \(precious is there\); move it away, or set state_dir"):
        bring_back(archive, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == ["precious"]


def test_a_restore_that_was_interrupted_can_be_run_again(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(restore, "_remove_tree", lambda _: None)  # as if by SIGKILL
        patch.setattr(os, "sync", die)
        with pytest.raises(KeyboardInterrupt):
            bring_back(archive, tmp_path / "new")
    assert not (tmp_path / "new" / "hive.sqlite").exists()
    bring_back(archive, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["agents", "applied", "hive.sqlite", "proposed"]


def test_the_database_is_moved_last_and_what_fails_takes_back_what_it_did(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves: list[str] = []
    rename = os.rename

    def fail_at_the_last(source: Path, target: Path) -> None:
        moves.append(target.name)
        if len(moves) == 4:
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_at_the_last)
        with pytest.raises(OSError, match="No space left"):
            bring_back(archive, tmp_path / "new")
    assert sorted(moves[:3]) == ["agents", "applied", "proposed"]
    assert moves[3] == "hive.sqlite"
    assert os.listdir(tmp_path / "new") == []


def command(home: Path, state: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "HIVE_STATE_DIR": str(state), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "hive_core.cli", *words],
        env=environment,
        input="",
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_the_commands_say_what_they_did_and_leave_nothing_beside(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    done = command(tmp_path, state, "backup", str(out / "hive.tar"))
    assert done.returncode == 0, done.stderr
    assert "agents hm1nd, iris" in done.stdout
    assert "is whole: it was read back" in done.stdout
    assert os.listdir(out) == ["hive.tar"]
    assert (out / "hive.tar").stat().st_mode & 0o777 == 0o600
    checked = command(tmp_path, tmp_path / "nowhere", "restore", "--check", str(out / "hive.tar"), "--json")
    assert json.loads(checked.stdout)["agents"] == ["hm1nd", "iris"]
    assert not (tmp_path / "nowhere").exists()
    back = command(tmp_path, tmp_path / "new", "restore", str(out / "hive.tar"))
    assert back.returncode == 0, back.stderr
    assert "`hive up` starts it" in back.stdout
    again = command(tmp_path, tmp_path / "new", "restore", str(out / "hive.tar"))
    assert again.returncode == 4
    assert "it is not empty" in again.stderr


def test_a_backup_to_standard_output_is_one_too(state: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HIVE_STATE_DIR": str(state), "PYTHONPATH": str(ROOT)}
    with (tmp_path / "hive.tar").open("wb") as out:
        done = subprocess.run(
            [sys.executable, "-m", "hive_core.cli", "backup", "-"], env=environment, stdout=out, stderr=subprocess.PIPE
        )
    assert done.returncode == 0, done.stderr
    assert b"hive restore --check" in done.stderr
    assert verify(tmp_path / "hive.tar").agents == ["hm1nd", "iris"]


def test_a_backup_that_fails_leaves_the_one_before(state: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "hive.tar").write_text("the one before")
    (state / "hive.sqlite").write_bytes(b"junk" * 4000)
    done = command(tmp_path, state, "backup", str(out / "hive.tar"))
    assert done.returncode == 1
    assert done.stderr.startswith("hive: cannot back up: the database")
    assert os.listdir(out) == ["hive.tar"]
    assert (out / "hive.tar").read_text() == "the one before"


def test_a_hive_that_runs_is_not_restored_into(archive: Path, tmp_path: Path) -> None:
    lock = take_lock(tmp_path / "new")
    done = command(tmp_path, tmp_path / "new", "restore", str(archive))
    os.close(lock)
    assert done.returncode == 4
    assert f"a daemon (pid {os.getpid()}) runs on it" in done.stderr
    assert os.listdir(tmp_path / "new") == ["daemon.lock"]


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("backup", "{state}/x.tar"), 2, "it lies in the state directory"),
        (("backup", "{tmp}"), 2, "it is a directory"),
        (("backup", "{tmp}/no/such/x.tar"), 3, "x.tar: there is no directory {tmp}/no/such; make it"),
        (("backup", "{tmp}/" + "x" * 300), 1, "its name is too long"),
        (("restore", "{tmp}/none.tar"), 3, "hive: cannot restore from {tmp}/none.tar: there is no such file; give"),
        (("restore", "{tmp}"), 2, "it is no file"),
        (("restore", "/dev/null"), 2, "it is read twice; save it to a file first"),
        (("restore", "/dev/stdin"), 2, "it is read twice; save it to a file first"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    state: Path, tmp_path: Path, words: tuple[str, ...], code: int, why: str
) -> None:
    done = command(tmp_path, state, *(word.format(state=state, tmp=tmp_path) for word in words))
    assert (done.returncode, why.format(tmp=tmp_path) in done.stderr) == (code, True), done.stderr
    assert done.stderr.count("\n") == 1
    assert ".hive-backup-" not in done.stderr


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes device nodes")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as door:
        try:
            door.bind(str(path))
        except OSError:
            pytest.skip("the temporary directory is too long for a socket")


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize("make", [make_fifo, make_device, make_socket])
def test_a_backup_replaces_nothing_but_files(
    state: Path, tmp_path: Path, make: Callable[[Path], None], through_a_link: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out / "node")
    before = (out / "node").lstat()
    (out / "link").symlink_to("node")
    name = "link" if through_a_link else "node"
    done = command(tmp_path, state, "backup", str(out / name))
    assert (done.returncode, f"cannot back up to {out / name}: it is no file; " in done.stderr) == (2, True)
    after = (out / "node").lstat()
    assert (after.st_mode, after.st_ino, after.st_rdev) == (before.st_mode, before.st_ino, before.st_rdev)
    assert (out / "link").is_symlink()
    assert sorted(os.listdir(out)) == ["link", "node"]


def test_a_backup_through_a_link_leaves_the_link(state: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "hive.tar").symlink_to("disk/hive.tar")
    for _ in range(2):  # where nothing was, and where one was
        assert command(tmp_path, state, "backup", str(tmp_path / "hive.tar")).returncode == 0
        assert (tmp_path / "hive.tar").is_symlink()
        assert verify(tmp_path / "disk" / "hive.tar").agents == ["hm1nd", "iris"]
    (tmp_path / "loop").symlink_to("loop")
    assert command(tmp_path, state, "backup", str(tmp_path / "loop")).returncode == 1
    assert (tmp_path / "loop").is_symlink()


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = command(tmp_path, tmp_path / "new", "restore", str(tmp_path / "fifo"))
    assert (done.returncode, "it is read twice; save it to a file first" in done.stderr) == (2, True)


def test_names_in_a_backup_do_not_reach_the_terminal_as_they_are(archive: Path, tmp_path: Path) -> None:
    change(archive, backup_format.MANIFEST, lambda m: {**m, "agents": ["\x1b[31miris"], "version": "\x1b]0;x"})
    done = command(tmp_path, tmp_path / "new", "restore", "--check", str(archive))
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "⟨U+001B⟩[31miris" in done.stdout


def test_where_there_is_no_hive_a_backup_says_so(tmp_path: Path) -> None:
    done = command(tmp_path, tmp_path / "none", "backup", str(tmp_path / "x.tar"))
    assert done.returncode == 3
    assert "there is no hive in" in done.stderr
    assert not (tmp_path / "none").exists()


def test_what_is_kept_of_a_destroyed_agent_goes_along_and_can_be_revived(state: Path, tmp_path: Path) -> None:
    async def destroy() -> None:
        async with open_services(state) as hive, trio.open_nursery() as nursery:
            house = hive_of(hive)
            nursery.start_soon(house.destruction.serve)
            await house.destruction.destroy(AgentName("iris"), at_once=True)
            nursery.cancel_scope.cancel()

    async def revive() -> None:
        async with open_services(tmp_path / "new") as hive, trio.open_nursery() as nursery:
            house = hive_of(hive)
            nursery.start_soon(house.destruction.serve)
            await house.destruction.revive("iris")
            assert (await hive.agents.get("iris")).wanted == "up"
            nursery.cancel_scope.cancel()

    trio.run(destroy)
    report = back_up(state, tmp_path / "hive.tar")
    assert (report.agents, report.changed) == (["hm1nd"], [])
    bring_back(tmp_path / "hive.tar", tmp_path / "new")
    trio.run(revive)
    notes = tmp_path / "new" / "agents" / "iris" / "state"
    assert (notes / "notes.md").read_text() == "a note"
    assert (notes / "secrets").readlink() == Path("/etc/passwd")
    assert git(tmp_path / "new" / "applied" / "iris.git", "fsck", "--strict") == ""
