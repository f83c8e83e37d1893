from __future__ import annotations

import os
from pathlib import Path
from threading import Thread

import pytest

from hive_core.credentials import Credential, Credentials, parse_credential_name, parse_secret
from hive_core.protocol.refusal import Refusal
from tests.hives import PATIENCE_S

KEY = "sk-ant-api03-canary-0123456789"
TOKEN = "sk-ant-oat01-" + "canary" * 10


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "credentials").mkdir(mode=0o700)
    return tmp_path


def write(state: Path, file: str, secret: str, mode: int = 0o600) -> Path:
    path = state / "credentials" / file
    path.write_text(secret + "\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(("file", "kind"), [("work.api-key", "api_key"), ("work.oauth-token", "oauth_token")])
def test_a_credential_by_name_is_a_file_whose_end_tells_its_kind(state: Path, file: str, kind: str) -> None:
    path = write(state, file, KEY)
    credentials = Credentials(state, {})
    assert credentials.find("work") == Credential(kind, str(path), KEY, "work")
    assert credentials.missing("work") == ""
    assert credentials.names() == ["default", "work"]


def test_files_that_are_no_credential_have_no_name(state: Path) -> None:
    for file in ("Work.api-key", "work.txt", ".api-key", "a.b.api-key", "anthropic-api-key", "default.api-key"):
        write(state, file, KEY)
    assert Credentials(state, {}).names() == ["default"]


def test_a_named_credential_that_others_may_read_is_refused_with_the_way_out(state: Path) -> None:
    path = write(state, "work.api-key", KEY, 0o640)
    credentials = Credentials(state, {})
    assert credentials.find("work") is None
    assert f"chmod 600 {path}" in credentials.missing("work")
    assert "canary" not in credentials.missing("work")
    path.chmod(0o600)
    assert credentials.find("work") is not None


def test_whoever_names_a_credential_that_is_not_there_is_told_how_to_give_it(state: Path) -> None:
    assert "`hive login work`" in Credentials(state, {}).missing("work")
    assert "ANTHROPIC_API_KEY" in Credentials(state, {}).missing("default")


def test_a_changed_file_is_read_at_its_next_use_and_an_unchanged_one_is_not(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(state, "work.api-key", KEY)
    credentials = Credentials(state, {})
    assert (credentials.find("work") or NOBODY).secret == KEY
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *_: pytest.fail("it was read again"))
        assert (credentials.find("work") or NOBODY).secret == KEY
    write(state, "work.api-key", KEY + "-2")
    assert (credentials.find("work") or NOBODY).secret == KEY + "-2"
    path.unlink()
    assert credentials.find("work") is None
    write(state, "anthropic-api-key", KEY)
    assert (credentials.find("default") or NOBODY).secret == KEY


NOBODY = Credential("api_key", "", "")


def test_a_file_that_was_given_the_times_of_the_one_before_is_read_all_the_same(state: Path) -> None:
    path = write(state, "work.api-key", KEY)
    credentials = Credentials(state, {})
    assert credentials.find("work") is not None
    before = path.stat()
    path.write_text(KEY[::-1] + "\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = credentials.find("work")
    assert found is not None
    assert found.secret == KEY[::-1]


@pytest.mark.parametrize(("file", "name"), [("work.api-key", "work"), ("anthropic-api-key", "default")])
def test_a_pipe_in_the_place_of_a_credential_is_refused_and_not_waited_for(state: Path, file: str, name: str) -> None:
    path = state / "credentials" / file
    os.mkfifo(path, 0o600)
    told: list[str] = []
    look = Thread(target=lambda: told.append(Credentials(state, {}).missing(name)), daemon=True)
    look.start()
    look.join(PATIENCE_S)
    if look.is_alive():
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))  # so that it ends
    assert told == [f"cannot use the credential in {path}: it is no regular file; put the secret itself there"]


def test_what_is_stored_is_private_and_takes_the_place_of_the_other_kind(tmp_path: Path) -> None:
    credentials = Credentials(tmp_path, {})
    for name in ("work", "default"):
        old = credentials.put(name, "api_key", KEY)
        assert (credentials.find(name) or NOBODY).kind == "api_key"
        new = credentials.put(name, "oauth_token", TOKEN)
        assert not old.exists()
        assert new.stat().st_mode & 0o777 == 0o600
        found = credentials.find(name)
        assert found == Credential("oauth_token", str(new), TOKEN, name)
    assert credentials.folder.stat().st_mode & 0o777 == 0o700
    assert len(list(credentials.folder.iterdir())) == 2


def test_what_cannot_be_stored_leaves_what_was_there(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = Credentials(state, {})
    credentials.put("work", "api_key", KEY)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        credentials.put("work", "oauth_token", TOKEN)
    assert [path.name for path in credentials.folder.iterdir()] == ["work.api-key"]


def test_of_two_kinds_that_a_crash_left_the_newer_counts(state: Path) -> None:
    os.utime(write(state, "work.api-key", KEY), ns=(1, 1))
    write(state, "work.oauth-token", TOKEN)
    assert (Credentials(state, {}).find("work") or NOBODY).kind == "oauth_token"


def test_a_default_that_the_environment_gives_cannot_be_changed_by_a_file(state: Path) -> None:
    credentials = Credentials(state, {"ANTHROPIC_API_KEY": KEY})
    for change in (lambda: credentials.put("default", "api_key", KEY), lambda: credentials.remove("default")):
        with pytest.raises(Refusal) as refused:
            change()
        assert "it comes from ANTHROPIC_API_KEY" in refused.value.message
    credentials.put("work", "api_key", KEY)


def test_a_credential_is_removed_once(state: Path) -> None:
    credentials = Credentials(state, {})
    credentials.put("work", "api_key", KEY)
    credentials.remove("work")
    assert credentials.find("work") is None
    with pytest.raises(Refusal, match="there is none"):
        credentials.remove("work")


@pytest.mark.parametrize("name", ["", "Work", "9", "a--b", "-a", "a-", "../x", "a.b", "a\n", "x" * 31, None, 3])
def test_a_name_that_could_be_a_path_or_an_option_is_none(name: object) -> None:
    with pytest.raises(Refusal, match="as a credential's name"):
        parse_credential_name(name)


@pytest.mark.parametrize(
    ("kind", "secret"),
    [
        ("api_key", ""),
        ("api_key", "short"),
        ("api_key", "canary canary canary canary"),
        ("api_key", "canary" * 200),
        ("api_key", "canary\ncanary canary"),
        ("api_key", TOKEN),
        ("oauth_token", KEY),
        ("oauth_token", "sk-ant-oat01-canary"),
        ("oauth_token", None),
    ],
)
def test_a_secret_of_the_wrong_shape_is_refused_and_not_quoted(kind: str, secret: object) -> None:
    with pytest.raises(Refusal) as refused:
        parse_secret(kind, secret)
    assert "canary" not in refused.value.message


def test_a_secret_of_the_right_shape_is_taken_without_the_line_end() -> None:
    assert parse_secret("api_key", f"{KEY}\n") == KEY
    assert parse_secret("oauth_token", f" {TOKEN}\n") == TOKEN


def test_a_token_goes_with_the_beta_that_it_needs_and_the_programs_own_stays() -> None:
    token, key = Credential("oauth_token", "x", TOKEN), Credential("api_key", "x", KEY)
    theirs = [(b"anthropic-beta", b"claude-code-20250219,oauth-2025-04-20")]
    assert token.put_on(theirs) == [*theirs, *token.headers()]
    assert token.put_on([(b"anthropic-beta", b"a")]) == [
        (b"anthropic-beta", b"a"),
        (b"anthropic-beta", b"oauth-2025-04-20"),
        *token.headers(),
    ]
    assert key.put_on([]) == key.headers()
