"""hyperhive.*, the module of an agent's container."""

from __future__ import annotations

import pytest

from hive_agent.serve_cli import make_parser
from hive_core.containers import inside, seccomp
from hive_core.egress_rules import Rule
from hive_core.settings import AgentSettings, McpServer
from tests.nixes import NIXPKGS, Nix

everywhere = pytest.mark.parametrize("nixpkgs", NIXPKGS, ids=lambda given: "given" if given else "stand-in")


def agent(module: str, name: str = "iris") -> str:
    return f'(self.lib.mkAgent {{ system = "x86_64-linux"; name = "{name}"; modules = [ {module} ]; }})'


@everywhere
def test_what_nobody_sets_is_what_the_host_takes_for_it(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(f"{agent('{ }')}.config.hyperhive.settings", nixpkgs)
    assert set(found) == set(AgentSettings.model_fields)
    assert {key: value for key, value in found.items() if value is not None} == AgentSettings().model_dump(
        exclude_none=True
    )


@everywhere
def test_the_names_for_people_are_those_of_agent_toml(nix: Nix, nixpkgs: str) -> None:
    module = """{ hyperhive = { availableModels = [ "opus" ]; env.TZ = "UTC"; extraMcpServers.files.command = "files";
        model = "opus"; effort = "low"; tools = [ "Bash" ]; description = "reads";
        credential = "other"; allowedRecipients = [ "hm1nd" ]; autoCompact.atPercent = 50;
        autoCompact.contextWindow = 9000;
        egress = [ "python" "git.lan:22" { to = "http://repo.lan"; methods = [ "POST" ]; }
                   { to = "git.lan:3000"; addresses = [ "10.0.0.0/8" ]; } ]; }; }"""
    found = nix.value(f"{agent(module)}.config.hyperhive.settings", nixpkgs)
    assert AgentSettings(**{key: value for key, value in found.items() if value is not None}) == AgentSettings(
        available_models=["opus"],
        env={"TZ": "UTC"},
        mcp_servers={"files": McpServer(command="files")},
        model="opus",
        effort="low",
        tools=["Bash"],
        description="reads",
        credential="other",
        recipients=["hm1nd"],
        compact_at_percent=50,
        context_window=9000,
        egress=[
            Rule(to="python"),
            Rule(to="git.lan:22"),
            Rule(to="http://repo.lan", methods=["POST"]),
            Rule(to="git.lan:3000", addresses=["10.0.0.0/8"]),
        ],
    )


@everywhere
@pytest.mark.parametrize(("name", "program"), [("iris", "hive-agent"), ("hm1nd", "hive-mind")])
def test_the_harness_is_a_unit_with_arguments_that_it_takes(nix: Nix, nixpkgs: str, name: str, program: str) -> None:
    command = nix.value(f"{agent('{ }', name)}.config.systemd.services.hive-agent.serviceConfig.ExecStart", nixpkgs)
    path, serve, *arguments = command.split()
    assert path.endswith(f"/bin/{program}")
    assert serve == "serve"
    parsed = make_parser().parse_args(arguments)
    assert (parsed.run, parsed.state, parsed.sandbox) == ("/run/hive", "/state", "nixos-container")
    assert (parsed.claude.endswith("/bin/claude"), parsed.network) == (True, "private")
    module = '{ hyperhive.settings.network = "host"; }'
    command = nix.value(f"{agent(module, name)}.config.systemd.services.hive-agent.serviceConfig.ExecStart", nixpkgs)
    assert make_parser().parse_args(command.split()[2:]).network == "host"


@everywhere
def test_the_end_of_the_harness_is_the_containers_and_a_switch_is_none(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(
        f"let unit = {agent('{ }')}.config.systemd.services.hive-agent; in"
        " { inherit (unit) restartIfChanged; inherit (unit.unitConfig) SuccessAction FailureAction;"
        ' restart = unit.serviceConfig.Restart or "no"; says = unit.serviceConfig.StandardOutput;'
        " as = unit.serviceConfig.SyslogIdentifier; }",
        nixpkgs,
    )
    # A restart by systemd's own doing would pass through the unit's end.
    assert found == {
        "restartIfChanged": False,
        "SuccessAction": "exit",
        "FailureAction": "exit",
        "restart": "no",
        "says": "journal+console",
        "as": "hive-agent",
    }


@everywhere
def test_the_harness_has_no_more_rights_than_under_the_other_sandboxes(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(f"{agent('{ }')}.config.systemd.services.hive-agent.serviceConfig", nixpkgs)
    assert found["SystemCallFilter"] == [f"~{name}" for name in seccomp.REFUSED]
    assert found["SystemCallErrorNumber"] == "EPERM"
    assert found["ReadOnlyPaths"] == [f"-{path}" for path in (*inside.PROC_OF_THE_HOST, inside.ETC)]
    assert {f"-{path}" for path in inside.KEYS_OF_THE_HOST} <= {*found["InaccessiblePaths"]}
    assert (found["CapabilityBoundingSet"], found["NoNewPrivileges"], found["RestrictNamespaces"]) == ("", True, True)


@everywhere
def test_the_container_is_one_of_nspawns_and_has_no_nix(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(
        f"let config = {agent('{ }')}.config; in [ config.boot.isContainer config.boot.isNspawnContainer"
        " config.nix.enable ]",
        nixpkgs,
    )
    assert found == [True, True, False]


@everywhere
def test_a_nixos_that_knows_one_kind_of_containers_is_served_too(nix: Nix, nixpkgs: str) -> None:
    older = """let
        bag = lib.mkOption { type = lib.types.anything; };
        options = { boot.isContainer = bag; }
          // lib.genAttrs [ "networking" "hyperhive" "nix" "documentation" "system" ] (_: bag);
        nixosSystem = { system, modules }: lib.evalModules { modules = modules ++ [ { inherit options; } ]; };
        mkAgent = import ./nix/agent/system.nix { nixpkgs.lib = lib // { inherit nixosSystem; }; agent = { }; };
      in (mkAgent { system = "x86_64-linux"; name = "iris"; modules = [ ]; }).config.boot"""
    assert nix.value(older, nixpkgs) == {"isContainer": True}


def test_a_model_that_is_not_available_is_refused_by_name(nix: Nix) -> None:
    module = '{ hyperhive.model = "opus"; hyperhive.availableModels = [ "haiku" "sonnet" ]; }'
    said = nix.failure(f"{agent(module)}.config.system.build.toplevel.drvPath")
    assert "hyperhive.model is opus, and hyperhive.availableModels has haiku, sonnet: choose one of them." in said


@everywhere
@pytest.mark.parametrize(
    "given",
    [
        'model = "two words"',
        'model = "-x"',
        "settings.warm_turns = 0",
        'settings.effort = "most"',
        'allowedRecipients = [ "Ada" ]',
        "settings.frob = 1",
        'credential = "a--b"',
    ],
)
def test_what_the_host_would_refuse_is_refused_by_nix_too(nix: Nix, nixpkgs: str, given: str) -> None:
    said = nix.failure(f"{agent(f'{{ hyperhive.{given}; }}')}.config.hyperhive.settings", nixpkgs)
    assert "is not of type" in said or "does not exist" in said


@everywhere
def test_an_agent_that_runs_claude_allows_its_licence_and_no_other(nix: Nix, nixpkgs: str) -> None:
    allowed = (
        "(map {0}.config.nixpkgs.config.allowUnfreePredicate"
        ' [ {{ pname = "claude-code"; }} {{ pname = "something"; }} ])'
    )
    assert nix.value(allowed.format(agent("{ }")), nixpkgs) == [True, False]
    rehearsal = agent('{ hyperhive.settings.program = "rehearsal"; }')
    assert nix.value(allowed.format(rehearsal), nixpkgs) == [False, False]
    assert "--claude" not in nix.value(
        f"{rehearsal}.config.systemd.services.hive-agent.serviceConfig.ExecStart", nixpkgs
    )
