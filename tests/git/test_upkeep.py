"""The applied repositories say what the rows say, and do not grow without end."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from hive_core.git.repo_upkeep import alone
from hive_core.procedures import repo_upkeep
from hive_core.procedures.repo_upkeep import TAGGED, TIDY_EVERY_S
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import OPERATOR, AgentName, CommitSha
from hive_core.store.writer import Transaction
from tests.checkouts import Checkout
from tests.hives import PATIENCE_S, Services, clean_environment, open_services
from tests.processes import look_until

IRIS = AgentName("iris")
NOISE = 20_000  # bytes of each proposal that no other has


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Services]:
    """iris with her repositories, and the gate served."""
    async with open_services(tmp_path) as services, trio.open_nursery() as nursery:
        nursery.start_soon(services.gate.serve)
        number = (await services.gate.spawn.request(OPERATOR, IRIS, "You read.", "a reader"))["approval"]
        with trio.fail_after(PATIENCE_S):
            await approve(services, number)
        yield services
        nursery.cancel_scope.cancel()


@pytest.fixture
def iris(hive: Services) -> Checkout:
    return Checkout(hive.repos.proposed_dir / "iris" / "config")


def repository(hive: Services) -> Path:
    return hive.state_dir / "applied" / "iris.git"


def git(hive: Services, *words: str, said: bytes = b"") -> str:
    command = ["git", "--git-dir", str(repository(hive)), *words]
    done = subprocess.run(command, env=clean_environment(), input=said, capture_output=True, check=True)
    return done.stdout.decode().strip()


def refs(hive: Services) -> dict[str, str]:
    """The short names of all refs but main, and the commit of each."""
    lines = git(hive, "for-each-ref", "--format=%(refname:lstrip=1) %(objectname) %(*objectname)").splitlines()
    return {line.split()[0]: line.split()[-1] for line in lines if "heads" not in line}


def size(hive: Services) -> int:
    return sum(path.stat().st_blocks * 512 for path in repository(hive).rglob("*"))


async def approve(hive: Services, number: int) -> str:
    card = await hive.approvals.get(number)
    return (await hive.gate.approve(number, card.digest, OPERATOR)).state


async def ask(hive: Services, sha: CommitSha) -> int:
    number: int = (await hive.gate.apply_commit.request(OPERATOR, IRIS, sha, "r"))["approval"]
    return number


async def test_each_step_of_a_commit_has_its_tag(hive: Services, iris: Checkout) -> None:
    first = iris.head()
    sha = iris.commit(CLAUDE__md="one\n")
    one = await ask(hive, sha)
    assert await approve(hive, one) == "done"
    no = iris.commit(CLAUDE__md="two\n")
    two = await ask(hive, no)
    await hive.gate.deny(two, "not yet", OPERATOR)
    bad = iris.commit(CLAUDE__md="three\n")
    three = await ask(hive, bad)
    (repository(hive) / "refs" / "heads" / "main.lock").touch()
    assert await approve(hive, three) == "failed"
    await trio.to_thread.run_sync(look_until, lambda: f"tags/failed/{three}" in refs(hive))
    assert {name: at for name, at in refs(hive).items() if name.startswith("tags/")} == {
        "tags/deployed/0": first,
        **{f"tags/{step}/{one}": sha for step in ("proposal", "approved", "deployed")},
        **{f"tags/{step}/{two}": no for step in ("proposal", "denied")},
        **{f"tags/{step}/{three}": bad for step in ("proposal", "approved", "failed")},
    }
    assert "main.lock" in git(hive, "for-each-ref", "--format=%(contents)", f"refs/tags/failed/{three}")


async def test_tags_that_a_daemon_which_died_did_not_set_are_set_by_the_next(hive: Services, iris: Checkout) -> None:
    numbers = [await ask(hive, iris.commit(CLAUDE__md=f"{n}\n")) for n in range(3)]
    done, denied, waits = numbers
    assert await approve(hive, done) == "done"
    await hive.gate.deny(denied, "not yet", OPERATOR)
    before = refs(hive)
    for name in before:
        if name != "tags/deployed/0" and name.startswith("tags/"):
            git(hive, "update-ref", "-d", f"refs/{name}")
    (repository(hive) / "refs" / "heads" / "main.lock").touch()
    (repository(hive).parent / ".iris.quarantine" / "objects").mkdir(parents=True)
    await hive.gate.upkeep.mend(IRIS)
    assert {name: at for name, at in refs(hive).items() if "tags" in name} == {
        name: at for name, at in before.items() if "tags" in name
    }
    assert "not yet" in git(hive, "for-each-ref", "--format=%(contents)", f"refs/tags/denied/{denied}")
    assert [path.name for path in repository(hive).parent.iterdir()] == ["iris.git"]
    assert f"tags/proposal/{waits}" in refs(hive)
    with pytest.raises(Refusal, match="look at it again"):  # what it is based on has moved
        await approve(hive, waits)
    assert await approve(hive, waits) == "done"  # and no lock stands in its way


async def test_of_one_whose_objects_are_gone_nothing_is_set_and_the_others_are(hive: Services, iris: Checkout) -> None:
    number = await ask(hive, iris.commit(CLAUDE__md="one\n"))
    await hive.store.write(lambda tx: put_denied(tx, "0" * 40))
    git(hive, "update-ref", "-d", f"refs/tags/proposal/{number}")
    await hive.gate.upkeep.mend(IRIS)
    assert set(refs(hive)) >= {"tags/deployed/0", f"tags/proposal/{number}"}


async def test_what_waits_what_runs_and_what_is_asked_for_just_now_stays(hive: Services, iris: Checkout) -> None:
    runs = iris.commit(CLAUDE__md="runs\n")
    assert await approve(hive, await ask(hive, runs)) == "done"
    waits, arrives, nobodys = (iris.commit(CLAUDE__md=f"{n}\n") for n in range(3))
    number = await ask(hive, waits)
    await hive.repos.fetch(IRIS, nobodys)
    with hive.repos.holding(IRIS, arrives):
        await hive.repos.fetch(IRIS, arrives)
        await hive.gate.upkeep.tidy(IRIS)
        assert {f"proposed/{sha}" for sha in (runs, waits, arrives)} <= set(refs(hive))
        assert f"proposed/{nobodys}" not in refs(hive)
    git(hive, "fsck", "--strict", "--no-dangling")
    assert await approve(hive, number) == "done"
    await hive.gate.upkeep.tidy(IRIS)
    assert f"proposed/{arrives}" not in refs(hive)
    with pytest.raises(subprocess.CalledProcessError):
        git(hive, "cat-file", "-e", nobodys)


def propose(hive: Services, base: str, number: int) -> list[str]:
    """The commits of so many proposals, pinned as requests leave them."""
    who = b"committer hm1nd <hm1nd@localhost> 1700000000 +0000"
    shas = []
    for _ in range(number):  # one at a time, as they come: each leaves objects of its own
        noise = os.urandom(NOISE // 2).hex().encode()
        lines = [b"commit refs/proposed/x", b"mark :1", who, b"data 1", b"x", b"from " + base.encode()]
        lines += [b"M 100644 inline noise", b"data %d" % len(noise), noise, b"get-mark :1", b"done", b""]
        sha = git(hive, "fast-import", "--quiet", "--done", "--force", "--date-format=raw", said=b"\n".join(lines))
        git(hive, "update-ref", f"refs/proposed/{sha}", sha)
        shas.append(sha)
    return shas


def put_denied(tx: Transaction, sha: str) -> None:
    sql = """
        INSERT INTO approvals (
          kind, agent, requested_by, reason, payload, digest, state, requested_at_ms, expires_at_ms
        ) VALUES ('apply_commit', 'iris', 'hm1nd', 'r', ?, ?, 'denied', 0, 0)
    """
    tx.execute(sql, (json.dumps({"sha": sha, "base": "", "diff": ""}), sha))


async def test_after_a_thousand_proposals_a_repository_is_as_large_as_after_a_hundred(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, kept = (1_000, TAGGED) if os.environ.get("HIVE_LONG") == "1" else (60, 6)
    monkeypatch.setattr(repo_upkeep, "TAGGED", kept)
    sizes: list[int] = []

    async def some(many: int) -> None:
        shas = propose(hive, iris.head(), many)

        def write(tx: Transaction) -> None:
            for sha in shas:
                put_denied(tx, sha)

        await hive.store.write(write)
        await hive.gate.upkeep.mend(IRIS)
        assert size(hive) > many * NOISE / 2
        await hive.gate.upkeep.tidy(IRIS)
        sizes.append(size(hive))

    await some(kept)
    await some(number)
    assert sizes[1] < sizes[0] * 1.3 + 64 * 1024
    assert len([name for name in refs(hive) if name.startswith("tags/denied/")]) == kept
    assert git(hive, "rev-parse", "main") == (await hive.agents.get("iris")).deployed_sha
    assert await approve(hive, await ask(hive, iris.commit(CLAUDE__md="one\n"))) == "done"


async def test_nothing_is_dropped_while_a_backup_reads(hive: Services, iris: Checkout) -> None:
    sha = iris.commit(CLAUDE__md="one\n")
    await hive.repos.fetch(IRIS, sha)
    with alone(hive.state_dir / "applied", reading=True):
        await hive.gate.upkeep.tidy(IRIS)
        assert f"proposed/{sha}" in refs(hive)
    await hive.gate.upkeep.tidy(IRIS)
    assert f"proposed/{sha}" not in refs(hive)


async def test_nothing_is_dropped_while_something_is_fetched_and_the_other_way_round(
    hive: Services, iris: Checkout
) -> None:
    """Between the two no moment is left in which what arrives has neither a row nor somebody who holds it."""
    shas = [iris.commit(CLAUDE__md=f"{n}\n") for n in range(6)]

    async def tidy_on() -> None:
        while True:
            await hive.gate.upkeep.tidy(IRIS)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tidy_on)
        with trio.fail_after(3 * PATIENCE_S):
            for sha in shas:
                number = await ask(hive, sha)
                assert refs(hive)[f"proposed/{sha}"] == refs(hive)[f"tags/proposal/{number}"] == sha
        nursery.cancel_scope.cancel()
    git(hive, "fsck", "--strict", "--no-dangling")


async def test_it_is_tidied_when_many_came_and_every_hour(
    hive: Services, iris: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repo_upkeep, "TIDY_AFTER", 2)
    monkeypatch.setattr(repo_upkeep, "TIDY_EVERY_S", 0.2)
    sha = iris.commit(CLAUDE__md="one\n")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hive.gate.upkeep.serve)
        await hive.repos.fetch(IRIS, sha)
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(look_until, lambda: f"proposed/{sha}" not in refs(hive))
        monkeypatch.setattr(repo_upkeep, "TIDY_EVERY_S", TIDY_EVERY_S)
        with pytest.raises(Refusal):
            await ask(hive, CommitSha("0" * 40))
        nursery.cancel_scope.cancel()
