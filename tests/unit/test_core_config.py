from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hive_core.config import PATHS, Config, load_config
from hive_core.credentials import Credential, find_credential, how_to_give_one
from hive_core.git.repos import harness_settings
from hive_core.logs import JournalFormatter, JsonFormatter
from hive_core.protocol.refusal import Refusal
from hive_core.protocol.words import shown
from hive_core.services.agents import pick_port
from hive_core.settings import DEFAULT_TOOLS, parse_agent_toml
from hive_core.sockets.admin import PATIENCE_MOST_S
from hive_core.systemd import notify
from tests.needs import ROOT
from tests.processes import PATIENCE_S

# -- the daemon's configuration ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file that counts; not there until it is written."""
    path = tmp_path / "config.toml"
    monkeypatch.setattr("hive_core.config.config_files", lambda: [str(tmp_path / "first"), str(path)])
    return path


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_file(file: Path) -> None:
    assert load_config({}, {}).dashboard_port == 7000
    file.write_text("dashboard_port = 7001\ndefault_model = 'opus'\n")
    assert load_config({}, {}).dashboard_port == 7001
    assert load_config({}, {"HIVE_DASHBOARD_PORT": "7002"}).dashboard_port == 7002
    config = load_config({"dashboard_port": "7003"}, {"HIVE_DASHBOARD_PORT": "7002"})
    assert (config.dashboard_port, config.default_model) == (7003, "opus")


def test_the_first_file_that_exists_counts_alone(file: Path) -> None:
    file.write_text("dashboard_port = 7001\n")
    (file.parent / "first").write_text("default_model = 'opus'\n")
    config = load_config({}, {})
    assert (config.dashboard_port, config.default_model) == (7000, "opus")


def test_every_setting_can_be_given_as_a_variable(file: Path, tmp_path: Path) -> None:
    given = {
        "state_dir": str(tmp_path / "s"),
        "end_agents_with_daemon": "true",
        "orphan_grace_s": "1.5",
        "log_format": "json",
    }
    config = load_config({}, {f"HIVE_{name.upper()}": value for name, value in given.items()})
    assert (config.state_dir, config.end_agents_with_daemon, config.orphan_grace_s) == (tmp_path / "s", True, 1.5)
    assert config.database == tmp_path / "s" / "hive.sqlite"


@pytest.mark.parametrize("variable", ["HIVE_REQUIRE", "HIVE_LONG", "HIVE_TEST_ACCOUNT", "PATH", "HIVES"])
def test_a_variable_that_is_no_setting_of_the_daemon_is_left_alone(file: Path, variable: str) -> None:
    assert load_config({}, {variable: "x"}).dashboard_port == 7000


def refusal(flags: dict[str, object], environment: dict[str, str]) -> str:
    with pytest.raises(Refusal) as caught:
        load_config(flags, environment)
    assert caught.value.code == "usage"
    return caught.value.message


def test_an_unknown_setting_is_refused_by_name_and_place(file: Path) -> None:
    assert "cannot use the environment: there is no setting HIVE_DASHBORD_PORT" in refusal(
        {}, {"HIVE_DASHBORD_PORT": "1"}
    )
    said = refusal({"port": 1}, {})
    assert "cannot use the flags: there is no setting port; the settings are " in said
    assert "state_dir, runtime_dir, dashboard_host" in said
    file.write_text("[dashboard]\nport = 1\n")
    said = refusal({}, {})
    assert f"cannot use {file}: there is no setting dashboard" in said
    assert "dashboard_port" in said


PORT = "it must be a whole number from 0 to 65535"
PORTS = "it must be FIRST-LAST, two port numbers from 1 to 65535, such as 8100-8999"
ADDRESS = "it must be an http:// or https:// address without a user name and spaces"
SILENCE = (
    "it must be a number of seconds from 20: the harness of a quiet turn says that it lives every 10 s, "
    "and would lose it"
)
HOST = "it must be an address or a name of this machine, such as 127.0.0.1"
MODEL = "it must be a model's name: 1 to 80 of A-Z, a-z, 0-9 and ._:[]-, and the first a letter or digit"
PATH = "it must be a path: not empty, without NUL, and with the name of a user where it begins with ~"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dashboard_port", "x", PORT),
        ("dashboard_port", "-1", PORT),
        ("dashboard_port", "65536", PORT),
        ("dashboard_port", "1.5", PORT),
        ("dashboard_port", "9" * 5000, PORT),
        ("manager_port", "\udcff", PORT),
        ("agent_ports", "8100", PORTS),
        ("agent_ports", "9000-8100", PORTS),
        ("agent_ports", "0-10", PORTS),
        ("agent_ports", "1-70000", PORTS),
        ("agent_ports", "²-9", PORTS),
        ("agent_ports", "1-" + "9" * 5000, PORTS),
        ("dashboard_host", "two words", HOST),
        ("dashboard_host", "[::1]", HOST),
        ("dashboard_host", "x" * 254, HOST),
        ("provider_base_url", "ftp://x", ADDRESS),
        ("provider_base_url", "https://", ADDRESS),
        ("provider_base_url", "https://x\n", ADDRESS),
        ("default_program", "sh", "it must be claude or rehearsal"),
        ("default_model", "a b", MODEL),
        ("default_model", 'a"\nx = 1', MODEL),
        ("default_model", "opus\n", MODEL),
        ("log_format", "xml", "it must be text or json"),
        ("log_level", "loud", "it must be debug, info, warning or error"),
        ("log_level", "\x1b[31m", "it must be debug, info, warning or error"),
        ("log_level", "\udcff", "it must be debug, info, warning or error"),
        ("orphan_grace_s", "0", "it must be a number of seconds above 0"),
        ("orphan_grace_s", "nan", "it must be a number of seconds above 0"),
        ("orphan_grace_s", "inf", "it must be a number of seconds above 0"),
        ("orphan_grace_s", "soon", "it must be a number of seconds above 0"),
        ("drain_s", "-1", "it must be a number of seconds above 0 and at most 86400"),
        ("drain_s", "86401", "it must be a number of seconds above 0 and at most 86400"),
        ("backoff_s", "14401", "it must be a number of seconds above 0 and at most 14400"),
        ("provider_rest_s", "86400", "it must be a number of seconds above 0 and at most 14400"),
        ("lease_silence_s", "10", SILENCE),
        ("lease_silence_s", "19.9", SILENCE),
        ("unsafe_no_sandbox", "perhaps", "it must be true or false"),
        ("claude", "~no-such-user/claude", PATH),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_bad_value_is_refused_with_its_setting_what_is_allowed_and_its_place(
    file: Path, name: str, value: str, allowed: str
) -> None:
    variable = f"HIVE_{name.upper()}"
    assert refusal({}, {variable: value}) == f"cannot use {shown(value)} as {name}: {allowed}; change {variable}"
    flag = f"--{name.replace('_', '-')}"
    assert refusal({name: value}, {}) == f"cannot use {shown(value)} as {name}: {allowed}; change {flag}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dashboard_port = '7000x'", f"cannot use '7000x' as dashboard_port: {PORT}; change it in "),
        ("dashboard_port = [1]", f"cannot use [1] as dashboard_port: {PORT}; change it in "),
        ("dashboard_port = true", f"cannot use True as dashboard_port: {PORT}; change it in "),
        ("log_level = 1", "cannot use 1 as log_level: it must be debug, info, warning or error; change it in "),
        ("state_dir = 7", f"cannot use 7 as state_dir: {PATH}; change it in "),
        ("state_dir = ''", f"cannot use '' as state_dir: {PATH}; change it in "),
        ('state_dir = "/a\\u0000b"', f"cannot use '/a\\x00b' as state_dir: {PATH}; change it in "),
        ("dashboard_host = ''", f"cannot use '' as dashboard_host: {HOST}; change it in "),
        ("[claude]\na = 1", f"cannot use {{'a': 1}} as claude: {PATH}; change it in "),
    ],
)
def test_a_bad_value_of_the_file_is_refused_with_the_files_name(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    assert refusal({}, {}) == f"{said}{file}"


@pytest.mark.parametrize("name", Config.model_fields)
def test_of_every_setting_there_is_a_sentence_that_says_what_it_may_be(file: Path, name: str) -> None:
    file.write_text(f"{name} = [[]]\n")
    said = refusal({}, {})
    assert said.startswith(f"cannot use [[]] as {name}: it must be ")
    assert ("path" in said) == (name in PATHS)


def test_an_empty_variable_is_none_as_for_the_clients(file: Path) -> None:
    """An empty host would be every network of the machine, an empty directory the current one."""
    given = {f"HIVE_{name.upper()}": "" for name in ("dashboard_host", "dashboard_port", "state_dir", "runtime_dir")}
    assert load_config({}, given) == load_config({}, {})
    assert f"cannot use '' as dashboard_host: {HOST}; change --dashboard-host" in refusal({"dashboard_host": ""}, {})


def test_an_unknown_variable_is_shown_and_not_sent_to_the_terminal(file: Path) -> None:
    said = refusal({}, {"HIVE_\x1b[31m" + "x" * 1000: "1"})
    assert "there is no setting HIVE_⟨U+001B⟩[31M" in said
    assert "X" * 100 not in said


def test_a_drain_that_the_daemon_would_refuse_is_refused_at_its_start(file: Path) -> None:
    assert load_config({"drain_s": str(PATIENCE_MOST_S)}, {}).drain_s == PATIENCE_MOST_S
    assert f"at most {PATIENCE_MOST_S:.0f}" in refusal({"drain_s": str(PATIENCE_MOST_S + 1)}, {})


@pytest.mark.parametrize("text", ["dashboard_port = ", "dashboard_port = 1\ndashboard_port = 2\n", "\ud800"])
def test_a_file_that_cannot_be_read_is_named(file: Path, text: str) -> None:
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert f"cannot read {file}: " in refusal({}, {})


def test_a_runtime_directory_too_long_for_sockets_is_refused(file: Path) -> None:
    assert "set runtime_dir to a shorter path" in refusal({"runtime_dir": "/" + "x" * 90}, {})


def test_relative_paths_become_absolute(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/you")
    config = load_config({"state_dir": "here", "claude": "~/bin/claude"}, {})
    assert (config.state_dir, config.claude) == (tmp_path / "here", Path("/home/you/bin/claude"))


def test_the_ports_of_agents_are_a_range_with_both_ends() -> None:
    assert Config(agent_ports="8100-8102").agent_port_range == range(8100, 8103)


# -- ports ------------------------------------------------------------------------------------------------------------


@hypothesis_settings(deadline=None)
@given(st.text(max_size=10), st.sets(st.integers(0, 9)))
def test_a_port_is_the_names_own_or_the_next_that_is_free(name: str, taken: set[int]) -> None:
    ports = range(8100, 8110)
    used = {8100 + n for n in taken}
    first = pick_port(name, ports, ())
    if len(used) == len(ports):
        with pytest.raises(Refusal, match="all 10 page ports are allocated; widen agent_ports"):
            pick_port(name, ports, used)
    else:
        port = pick_port(name, ports, used)
        assert port in ports
        assert port not in used
        between = [8100 + (first - 8100 + step) % 10 for step in range((port - first) % 10)]
        assert set(between) <= used


def test_a_names_port_is_the_same_on_every_machine() -> None:
    assert pick_port("iris", range(8100, 9000), ()) == pick_port("iris", range(8100, 9000), (8999,))
    assert len({pick_port(f"agent-{n}", range(8100, 9000), ()) for n in range(50)}) > 40


# -- agent.toml -------------------------------------------------------------------------------------------------------


def test_an_empty_agent_toml_is_the_defaults() -> None:
    settings = parse_agent_toml(b"")
    assert (settings.program, settings.model, settings.tools) == ("claude", "sonnet", DEFAULT_TOOLS)
    assert not {"SendMessage", "Task", "WebFetch", "WebSearch", "CronCreate"} & set(settings.tools)


@pytest.mark.parametrize("model", ["sonnet", "claude-opus-4-1-20250805", "opus[1m]", "us.anthropic.claude:0", "a" * 80])
def test_a_models_name_passes(model: str) -> None:
    assert parse_agent_toml(f'model = "{model}"'.encode()).model == model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"model = 'opus\\n'", "model"),
        (b'model = "opus\\n"', "model: "),
        (b'model = "--dangerously"', "model: "),
        (b'model = "a b"', "model: "),
        (b'model = ""', "model: "),
        (b'model = "' + b"a" * 81 + b'"', "model: "),
        (b'program = "bash"', "program: "),
        (b'effort = "maximal"', "effort: "),
        (b'tools = "Bash"', "tools: "),
        (b'tools = ["Bash", "-x"]', "tools.1: "),
        (b'tools = ["Bash(rm:*)"]', "tools.0: "),
        (b"tools = [" + b'"A",' * 65 + b"]", "tools: "),
        (b'[hooks]\nx = "y"', "hooks: unknown key"),
        (b'description = "' + b"x" * 201 + b'"', "description: "),
        (b"model = ", "cannot read agent.toml"),
        (b"\xff", "not UTF-8"),
        (b"a = " + b"[" * 10_000, "nested too deep"),
        (b"a = " + b"9" * 5_000, "cannot read agent.toml"),
        (b"a = 0000-00-00", "cannot read agent.toml"),
    ],
)
def test_what_agent_toml_may_not_say_is_refused_by_name(text: bytes, words: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_agent_toml(text)
    assert words in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 7", "model: text is needed"),
        ("model = 'a b'", "model: some of its characters, or their order, are not allowed"),
        (f"model = '{'a' * 81}'", "model: it is longer than 80 characters"),
        ("program = 'bash'", "program: 'claude' or 'rehearsal' is needed"),
        ("tools = 'Bash'", "tools: a list is needed"),
        ("tools = [" + '"A",' * 65 + "]", "tools: it holds more than 64 entries"),
        ("description = true", "description: text is needed"),
        ("available_models = ['opus']", "the file: the model sonnet is not one of available_models (opus)"),
        ("env = 'A=b'", "env: a table is needed"),
        ("[env]\nHIVE_AGENT = 'x'", "env: HIVE_AGENT is the hive's own to set; choose another name"),
        ("[env]\nLD_PRELOAD = 'x'", "env: LD_PRELOAD is the hive's own to set; choose another name"),
        ("[env]\nPATH = 'x'", "env: PATH is the hive's own to set; choose another name"),
        *(
            (
                f"[env]\n{name} = 'x'",
                f"the file: env: {name} leads to the hive's proxy and is its own to set; `egress` names what may be "
                "reached",
            )
            for name in ("HTTPS_PROXY", "http_proxy", "NO_PROXY", "NODE_USE_ENV_PROXY")
        ),
        ("[env]\n'a b' = 'x'", "env.a b: some of its characters, or their order, are not allowed"),
        ('[env]\nA = "\\u0000"', "env.A: some of its characters, or their order, are not allowed"),
        ("skills = ['a/b']", "skills.0: some of its characters, or their order, are not allowed"),
        ("plugins = ['..']", "plugins.0: some of its characters, or their order, are not allowed"),
        ("skills = ['a', 'a']", "skills: a is there twice; take one out"),
        ("plugins = ['own']", "the file: plugins: own is the plugin that has the skills; rename it"),
        ("skills = ['compact']", "the file: skills: /compact is the program's own; rename it"),
        ("[mcp_servers.hive]\ncommand = 'x'", "the file: mcp_servers.hive is the hive's own; choose another name"),
        *(
            (f"[mcp_servers.{name}]\ncommand = 'x'", f"mcp_servers.{name}: {order}")
            for order in ["some of its characters, or their order, are not allowed"]
            for name in ("hive__x", "a__b", "hive_", "A")
        ),
        ("[mcp_servers.files]\ncommand = ''", "mcp_servers.files.command: it is empty"),
        ("[mcp_servers.files]\nargs = []", "mcp_servers.files.command: it is missing"),
        ("[mcp_servers.files]\ncommand = 'x'\nurl = 'y'", "mcp_servers.files.url: unknown key"),
        (
            "[mcp_servers.files]\ncommand = 'x'\nallowed_tools = []",
            "mcp_servers.files.allowed_tools: it holds nothing; leave it out",
        ),
        (
            "[mcp_servers.files]\ncommand = 'x'\nallowed_tools = ['a,b']",
            "mcp_servers.files.allowed_tools.0: some of its characters, or their order, are not allowed",
        ),
    ],
)
def test_what_is_wrong_with_a_setting_of_an_agent_is_said_in_plain_words(text: str, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse_agent_toml(text.encode())
    assert caught.value.message == f"cannot use agent.toml: {said}"


def test_an_agent_with_the_hosts_network_may_be_given_a_proxy_of_its_own() -> None:
    settings = parse_agent_toml(b"network = 'host'\nenv = { HTTPS_PROXY = 'http://proxy.lan:3128' }")
    assert settings.env == {"HTTPS_PROXY": "http://proxy.lan:3128"}


def test_variables_servers_and_models_travel_to_where_they_count() -> None:
    toml = b"""
        available_models = ["haiku", "sonnet"]
        env = { TZ = "UTC", PATHS = "a", HOMELESS = "b" }
        [mcp_servers.files]
        command = "mcp-files"
        args = ["--root", "/state"]
        env = { DEBUG = "1" }
    """
    travels = harness_settings(parse_agent_toml(toml), "You are a test.")
    assert travels["env"] == {"TZ": "UTC", "PATHS": "a", "HOMELESS": "b"}
    files = {"command": "mcp-files", "args": ["--root", "/state"], "env": {"DEBUG": "1"}}
    assert travels["mcp_servers"] == {"files": files}
    assert travels["policy"] == {"available_models": ["haiku", "sonnet"]}
    assert {"env", "mcp_servers", "available_models"}.isdisjoint(harness_settings(parse_agent_toml(b""), "x"))


@hypothesis_settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_settings_or_a_refusal(data: bytes) -> None:
    try:
        assert parse_agent_toml(data).tools
    except Refusal as exc:
        assert "agent.toml" in exc.message


# -- the credential ---------------------------------------------------------------------------------------------------


def test_a_credential_is_taken_from_the_environment_then_systemd_then_the_state_directory(tmp_path: Path) -> None:
    state, systemd = tmp_path / "state", tmp_path / "systemd"
    environment = {"CREDENTIALS_DIRECTORY": str(systemd)}
    assert find_credential(state, environment) is None
    (state / "credentials").mkdir(parents=True)
    (state / "credentials" / "claude-oauth-token").write_text("from-state\n")
    assert find_credential(state, environment) == Credential(
        "oauth_token", f"{state}/credentials/claude-oauth-token", "from-state"
    )
    (state / "credentials" / "anthropic-api-key").write_text("key-from-state\n")
    assert (find_credential(state, environment) or KEY).secret == "key-from-state"
    systemd.mkdir()
    (systemd / "claude-oauth-token").write_text("from-systemd")
    assert (find_credential(state, environment) or KEY).secret == "from-systemd"
    environment["CLAUDE_CODE_OAUTH_TOKEN"] = "from-variable"
    assert (find_credential(state, environment) or KEY).secret == "from-variable"
    environment["ANTHROPIC_API_KEY"] = "key-from-variable"
    found = find_credential(state, environment)
    assert found is not None
    assert (found.kind, found.source, found.secret) == ("api_key", "ANTHROPIC_API_KEY", "key-from-variable")


KEY = Credential("api_key", "ANTHROPIC_API_KEY", "sk-canary")


def test_an_empty_credential_is_none(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "anthropic-api-key").write_text(" \n")
    assert find_credential(tmp_path, {"ANTHROPIC_API_KEY": " "}) is None


@pytest.mark.parametrize("data", [b"\xff\xfe", b"sk-canary\nsecond line", b"sk-canary\0", b"sk canary"])
def test_a_credential_that_cannot_be_one_is_refused_by_its_place_and_never_shown(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "claude-oauth-token").write_bytes(data)
    with pytest.raises(Refusal) as refused:
        find_credential(tmp_path, {})
    assert f"{tmp_path}/credentials/claude-oauth-token" in refused.value.message
    assert "canary" not in refused.value.message


def test_a_credential_does_not_show_its_secret() -> None:
    assert "canary" not in f"{KEY!r} {KEY!s} {[KEY]}"
    assert KEY.headers() == [(b"x-api-key", b"sk-canary")]
    assert Credential("oauth_token", "x", "t").headers() == [(b"authorization", b"Bearer t")]


def test_whoever_has_none_is_told_every_way_in_one_line(tmp_path: Path) -> None:
    said = how_to_give_one(tmp_path)
    assert "\n" not in said
    for way in ("ANTHROPIC_API_KEY", "claude setup-token", f"{tmp_path}/credentials/anthropic-api-key"):
        assert way in said


# -- logs -------------------------------------------------------------------------------------------------------------


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    return logging.getLogger("hive").makeRecord("hive", level, "f", 1, message, (), None, extra=extra or None)


@hypothesis_settings(deadline=None)
@given(st.text())
def test_a_log_entry_is_one_json_object_on_one_line(message: str) -> None:
    line = JsonFormatter().format(record(message))
    assert "\n" not in line
    assert json.loads(line)["message"] == message


def test_a_log_entry_says_which_agent_and_what_happened() -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        entry = record("failed", logging.ERROR, agent="iris")
        entry.exc_info = sys.exc_info()
    line = JsonFormatter().format(entry)
    parsed = json.loads(line)
    assert (parsed["level"], parsed["agent"], parsed["logger"]) == ("error", "iris", "hive")
    assert "ValueError: broken" in parsed["trace"]
    assert "\n" not in line


def test_journald_is_given_the_priority_and_one_entry_for_many_lines() -> None:
    formatter = JournalFormatter("%(name)s: %(message)s")
    assert formatter.format(record("a\n<0>b", logging.WARNING)) == "<4>hive: a\n  <0>b"
    assert formatter.format(record("a", logging.ERROR)).startswith("<3>")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_chosen_format_is_what_comes_out_on_stderr(log_format: str) -> None:
    program = (
        "import logging, sys; from hive_core.logs import set_up_logs; set_up_logs(sys.argv[1], 'info');"
        "log = logging.getLogger('hive'); log.debug('no'); log.info('half \\ud800'); log.warning('two\\nlines')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("JOURNAL_STREAM", None)
    done = subprocess.run(
        [sys.executable, "-c", program, log_format], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if log_format == "json":
        assert [json.loads(line)["level"] for line in lines] == ["info", "warning"]
    else:
        assert "INFO    hive: half" in lines[0]


# -- systemd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    address = f"@{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/notify", "@gone", "vsock:1:2"])
def test_a_service_manager_that_does_not_listen_is_no_trouble(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


@pytest.mark.parametrize("given", ["they/them", "she", "xe/xem/xyr"])
def test_pronouns_are_words(file: Path, given: str) -> None:
    assert load_config({"operator_pronouns": given}, {}).operator_pronouns == given


@pytest.mark.parametrize("given", ["", "he him", "they/", "it's", "x" * 41, "a\n/b", 7, True])
def test_pronouns_that_could_be_more_than_words_are_refused(file: Path, given: object) -> None:
    said = refusal({"operator_pronouns": given}, {})
    assert "as operator_pronouns: it must be up to 40 letters, words with / between, such as they/them" in said


def test_a_file_that_is_named_is_read_in_the_place_of_the_usual_ones(file: Path, tmp_path: Path) -> None:
    file.write_text("dashboard_port = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("dashboard_port = 2\n")
    assert load_config({}, {}, str(other)).dashboard_port == 2
