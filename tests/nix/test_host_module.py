"""services.hyperhive, evaluated by real nix on the stand-in for nixpkgs, and on a nixpkgs where one is given."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tomlkit
from packaging.requirements import Requirement

from hive_agent.rehearsal_script import BadScript, fill_command, find_rules
from hive_core.config import Config, load_config
from hive_core.containers.nixos_host import NixosHost
from hive_core.daemon_cli import main as hive_core
from hive_core.flakes.flake_files import agent_files
from hive_core.protocol.words import AgentName
from tests import nix_pages
from tests.booted.hive import BY_DEFAULT
from tests.nixes import NIXPKGS, ROOT, Nix

everywhere = pytest.mark.parametrize("nixpkgs", NIXPKGS, ids=lambda given: "given" if given else "stand-in")


def settings(nix: Nix, module: str, nixpkgs: str = "") -> dict[str, object]:
    found: dict[str, object] = nix.value(f"(host {{ {module} }}).config.services.hyperhive.settings", nixpkgs)
    return found


@everywhere
def test_enable_alone_gives_a_unit_a_group_and_settings_that_the_daemon_takes(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(
        "let config = (host { services.hyperhive.enable = true; }).config; unit = config.systemd.services.hyperhive; in"
        " { inherit (config.services.hyperhive) settings; inherit (unit) aliases wantedBy;"
        " service = unit.serviceConfig; user = config.users.users.hyperhive.group; }",
        nixpkgs,
    )
    assert found["user"] == found["service"]["Group"] == "hive-admin"
    assert found["aliases"] == ["hive-c0re.service"]
    assert found["wantedBy"] == ["multi-user.target"]
    assert found["service"]["ExecStart"].endswith("/bin/hive-core serve")
    config = Config(**found["settings"])
    assert (config.state_dir, config.runtime_dir) == (Path("/var/lib/hyperhive"), Path("/run/hyperhive"))
    assert config.dashboard_port == 7000


@everywhere
def test_the_first_readme_of_the_original_evaluates_as_written(nix: Nix, nixpkgs: str) -> None:
    flake = """
        { outputs = { self, nixpkgs, hyperhive }: {
            nixosConfigurations.my-host = nixpkgs.lib.nixosSystem {
              system = "x86_64-linux";
              modules = [
                hyperhive.nixosModules.hive-c0re
                ({ ... }: {
                  services.hive-c0re.enable = true;
                  system.stateVersion = "25.11";
                })
              ];
            };
          }; }
    """
    machine = f"(({flake}).outputs {{ self = {{ }}; inherit nixpkgs; hyperhive = self; }}).nixosConfigurations.my-host"
    assert nix.value(f"{machine}.config.systemd.services.hyperhive.serviceConfig.Type", nixpkgs) == "notify"


@everywhere
def test_the_readme_tells_a_flake_that_evaluates(nix: Nix, nixpkgs: str) -> None:
    flake = (ROOT / "README.md").read_text().split("```nix\n")[1].split("```")[0]
    machine = f"(({flake}).outputs {{ inherit nixpkgs; hyperhive = self; }}).nixosConfigurations.my-host"
    found = nix.value(f"({machine}).config.services.hyperhive.settings", nixpkgs)
    assert found["claude"].endswith("/bin/claude")


@everywhere
def test_the_later_name_of_the_original_enables_it_too(nix: Nix, nixpkgs: str) -> None:
    assert nix.value("(host { hyperhive.enable = true; }).config.services.hyperhive.enable", nixpkgs) is True


def test_every_option_has_the_name_of_the_original_too(nix: Nix) -> None:
    paths = (
        "let flat = path: set: if lib.isOption set then [ path ] else lib.concatMap (name: flat (path ++ [ name ])"
        " set.${name}) (lib.attrNames set); options = (host { }).options.services; in"
        ' { ours = flat [ ] options.hyperhive; theirs = flat [ ] options."hive-c0re"; }'
    )
    found = nix.value(paths)
    assert found["theirs"] == found["ours"]
    assert len(found["ours"]) > 10


@everywhere
def test_the_module_may_be_imported_twice_and_under_both_names(nix: Nix, nixpkgs: str) -> None:
    module = "imports = [ self.nixosModules.hive-c0re self.nixosModules.default ]; services.hyperhive.enable = true;"
    assert settings(nix, module, nixpkgs)["dashboard_port"] == 7000


@everywhere
def test_what_is_given_under_the_original_names_keeps_its_properties(nix: Nix, nixpkgs: str) -> None:
    module = (
        "imports = [ ({ lib, ... }: { services.hive-c0re.dashboard.port = lib.mkForce 7003;"
        " services.hive-c0re.adminUsers = lib.mkIf false [ ]; }) ];"
        " services.hive-c0re.enable = true; services.hyperhive.dashboard.port = 7002;"
    )
    assert settings(nix, module, nixpkgs)["dashboard_port"] == 7003


def test_options_become_settings_and_settings_win_over_them(nix: Nix) -> None:
    module = """
        services.hyperhive = { enable = true; operatorPronouns = "she/her"; dashboard.port = 7777;
          settings = { tries = 3; dashboard_port = 7778; }; };
    """
    found = settings(nix, module)
    assert Config(**found).operator_pronouns == "she/her"  # type: ignore[arg-type]
    assert (found["tries"], found["dashboard_port"]) == (3, 7778)


@everywhere
def test_package_admin_users_and_the_dashboards_address_reach_what_they_are_for(nix: Nix, nixpkgs: str) -> None:
    module = (
        "imports = [ ({ pkgs, ... }: { services.hyperhive.package = pkgs.strace; }) ]; services.hyperhive ="
        ' { enable = true; adminUsers = [ "ada" "bo" ]; dashboard.address = "::1"; };'
    )
    found = nix.value(
        f"let machine = (host {{ {module} }}); package = toString nixpkgs.legacyPackages.x86_64-linux.strace; in"
        " { admins = machine.config.users.groups.hive-admin.members;"
        " host = machine.config.services.hyperhive.settings.dashboard_host;"
        " runs = map (name: lib.removePrefix package machine.config.systemd.services.${name}.serviceConfig.ExecStart)"
        ' [ "hyperhive" "hyperhive-root" ];'
        " installed = lib.elem package (map toString machine.config.environment.systemPackages); }",
        nixpkgs,
    )
    assert found == {
        "admins": ["ada", "bo"],
        "host": "::1",
        "runs": ["/bin/hive-core serve", "/bin/hive-root serve"],
        "installed": True,
    }


@everywhere
def test_the_limits_of_each_agent_are_settings_of_the_daemon(nix: Nix, nixpkgs: str) -> None:
    given = "agents.memoryMiB = 2048; agents.cpuPercent = 50; agents.tasks = 100;"
    config = Config(**settings(nix, f"services.hyperhive = {{ enable = true; {given} }};", nixpkgs))  # type: ignore[arg-type]
    assert (config.agent_memory_bytes, config.agent_cpu_percent, config.agent_tasks) == (2 * 2**30, 50, 100)


def test_claude_is_taken_from_a_package_and_needs_its_licence_allowed(nix: Nix) -> None:
    module = (
        "imports = [ ({ lib, pkgs, ... }: { services.hyperhive.claude = pkgs.claude-code; "
        'nixpkgs.config.allowUnfreePredicate = package: lib.getName package == "claude-code"; }) ];'
        " services.hyperhive.enable = true;"
    )
    assert str(settings(nix, module)["claude"]).endswith("/bin/claude")
    denied = module.replace('lib.getName package == "claude-code"', "false")
    assert "unfree" in nix.failure(f"(host {{ {denied} }}).config.services.hyperhive.settings.claude")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ('credentials.github = "/run/secrets/x"', "has no use for github: a credential is anthropic-api-key or"),
        ('credentials.anthropic-api-key = "/nix/store/x"', "would put a secret into the Nix store"),
        ('environmentFiles = [ "/nix/store/env" ]', "would put a secret into the Nix store"),
        ("dashboard.port = 8000", "the port of the manager's page"),
        ('sandbox = "nspawn"; services.hyperhive.helper.enable = false', "leave services.hyperhive.helper.enable as"),
        ("settings.dashboard_port = 8000", "the port of the manager's page"),
        ('settings.state_dir = "/tmp/hive"', "of which the daemon's unit sees nothing: choose a place outside of"),
        ('settings.sandbox = "nspawn"', "say services.hyperhive.sandbox instead"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_the_way_out(nix: Nix, given: str, said: str) -> None:
    machine = f"(host {{ services.hyperhive.enable = true; services.hyperhive.{given}; }})"
    assert said in nix.failure(f"{machine}.config.system.build.toplevel.drvPath")


@pytest.mark.parametrize(
    "given", ['dashboard.port = "7000"', "adminUsers = true", "frob = 1", "dashboard.port = 65536"]
)
def test_an_option_that_does_not_exist_or_has_another_type_is_refused(nix: Nix, given: str) -> None:
    said = nix.failure(f"(host {{ services.hyperhive.{given}; }}).config.services.hyperhive.{given.split(' ')[0]}")
    assert "does not exist" in said or "is not of type" in said


def test_a_dashboard_on_a_network_is_warned_of(nix: Nix) -> None:
    of = "(host {{ services.hyperhive.enable = true; services.hyperhive.dashboard.address = {0}; }}).config.warnings"
    assert nix.value(of.format('"127.0.0.1"')) == []
    (said,) = nix.value(of.format('"0.0.0.0"'))
    assert "no encryption" in said
    (said,) = nix.value(of.format('"127.0.0.1"; services.hyperhive.settings.dashboard_host = "0.0.0.0"'))
    assert "no encryption" in said


def test_limits_of_agents_that_nobody_would_hold_them_to_are_warned_of(nix: Nix) -> None:
    of = "(host {{ services.hyperhive = {{ enable = true; {0} }}; }}).config.warnings"
    (said,) = nix.value(of.format("helper.enable = false; agents.memoryMiB = 2048;"))
    assert "has no control groups" in said
    (said,) = nix.value(of.format("helper.enable = false; settings.agent_tasks = 100;"))
    assert "Leave services.hyperhive.helper.enable as it is" in said
    for held in ("", 'helper.enable = false; sandbox = "nixos-container";'):
        assert nix.value(of.format(f"agents.cpuPercent = 50; {held}")) == []
    assert nix.value(of.format("helper.enable = false;")) == []


def test_containers_of_nspawn_over_the_system_of_nixos_are_warned_of(nix: Nix) -> None:
    (said,) = nix.value('(host { services.hyperhive = { enable = true; sandbox = "nspawn"; }; }).config.warnings')
    assert "no agent would be started. Say bwrap or nixos-container" in said


def test_the_build_runs_the_daemons_own_parser_over_the_settings(nix: Nix) -> None:
    script = nix.value(
        '(host { services.hyperhive.enable = true; }).config.environment.etc."hyperhive/config.toml".source.given.text'
    )
    assert "/bin/hive-core check /nix/store/" in script


POLICY = """
  imports = [ { services.hyperhive.settings.policy = [ { name = "more"; kind = "apply_commit"; agents = [ "*" ];
    requested_by = [ "operator" ]; only = [ "model" ]; } ]; } ];
  services.hyperhive = { enable = true; settings.policy = [ { name = "own prompt"; kind = "apply_commit";
    agents = [ "iris" ]; requested_by = "*"; only = [ "prompt" ]; at_most.prompt_lines = %s; per_day = 3; } ]; };
"""


def build_of_the_settings(nix: Nix, folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    """What NixOS runs to write config.toml, with our own hive-core: nixpkgs makes TOML of the settings by tomlkit."""
    found = nix.value(
        f"let config = (host {{ {module} }}).config; in {{ inherit (config.services.hyperhive) settings;"
        ' script = config.environment.etc."hyperhive/config.toml".source.given.text; }'
    )
    written = folder / "written.toml"
    written.write_text(tomlkit.dumps(found["settings"]))
    program = shlex.join([sys.executable, "-m", "hive_core.daemon_cli"])
    script = re.sub(r"/nix/store/\S+/bin/hive-core", program, found["script"])
    script = re.sub(r"/nix/store/\S+-hyperhive-config\.toml", shlex.quote(str(written)), script)
    assert "/nix/store" not in script
    environment = {**os.environ, "out": str(folder / "out")}
    return subprocess.run(["sh", "-ec", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_a_list_of_rules_is_what_the_daemon_reads_as_its_policy(nix: Nix, tmp_path: Path) -> None:
    done = build_of_the_settings(nix, tmp_path, POLICY % "200")
    assert (done.returncode, done.stderr) == (0, "")
    rules = {rule.name: rule for rule in load_config({}, {}, str(tmp_path / "out")).policy}
    assert set(rules) == {"own prompt", "more"}
    own = rules["own prompt"]
    assert (own.agents, own.requested_by, own.only, own.per_day) == (["iris"], ["*"], ["prompt"], 3)
    assert own.at_most.prompt_lines == 200


@pytest.mark.parametrize(
    ("given", "said"),
    [('"two hundred"', "at_most.prompt_lines"), ("-1", "at_most.prompt_lines"), ("200; onyl = [ ]", "onyl")],
)
def test_a_rule_that_is_no_good_ends_the_build_of_the_host_with_its_key(
    nix: Nix, tmp_path: Path, given: str, said: str
) -> None:
    done = build_of_the_settings(nix, tmp_path, POLICY % given)
    assert done.returncode != 0
    assert re.search(r"cannot use the policy: rule [12]: .*" + re.escape(said), done.stderr)
    assert not (tmp_path / "out").exists()


def test_check_takes_a_file_that_fits_and_names_what_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text('state_dir = "/var/lib/hyperhive"\nruntime_dir = "/run/hyperhive"\n')
    assert hive_core(["check", str(file)]) == 0
    file.write_text("dashboard_prot = 1\n")
    assert hive_core(["check", str(file)]) == 2
    assert f"cannot use {file}: there is no setting dashboard_prot" in capsys.readouterr().err
    assert hive_core(["check", str(tmp_path / "none.toml")]) == 2
    assert load_config({}, {}, "/dev/null").dashboard_port == 7000


def test_credentials_and_variables_are_systemds_to_hand_over(nix: Nix) -> None:
    module = """
        services.hyperhive = { enable = true; environmentFiles = [ "/run/secrets/env" ];
          credentials.anthropic-api-key = "/run/secrets/key"; };
    """
    service = nix.value(f"(host {{ {module} }}).config.systemd.services.hyperhive.serviceConfig")
    assert service["LoadCredential"] == ["anthropic-api-key:/run/secrets/key"]
    assert service["EnvironmentFile"] == ["/run/secrets/env"]


def test_containers_of_nixos_are_built_from_the_flake_and_the_nixpkgs_of_the_host(nix: Nix) -> None:
    of = (
        "let config = (host {{ services.hyperhive = {{ enable = true; sandbox = {0}; }}; }}).config; in"
        " {{ inherit (config.boot) enableContainers; inherit (config.systemd.tmpfiles) rules;"
        " inherit (config.services.hyperhive) settings;"
        " nix = lib.elem config.nix.package config.systemd.services.hyperhive.path;"
        " daemon = config.systemd.services.hyperhive.serviceConfig;"
        " helper = config.systemd.services.hyperhive-root.serviceConfig or null; }}"
    )
    found = nix.value(of.format('"nixos-container"'))
    assert (found["enableContainers"], found["nix"]) == (True, True)
    # The daemon has no rights, and evaluates what agents wrote in a sandbox that it makes; the helper has all the rest.
    assert (found["daemon"]["User"], found["daemon"]["CapabilityBoundingSet"]) == ("hyperhive", "")
    assert "RestrictNamespaces" not in found["daemon"]
    kept = {path for path in found["helper"]["ReadWritePaths"] if path.startswith(("/etc", "/nix"))}
    assert kept >= {str(NixosHost().confs), str(NixosHost().profiles)}
    assert kept == {rule.split()[1] for rule in found["rules"] if rule.split()[1] in kept}
    assert {"/var/lib", "/run"} < {*found["helper"]["ReadWritePaths"]}
    assert found["helper"]["RestrictSUIDSGID"] is False
    assert any(rule.startswith(f"d {NixosHost().confs} ") for rule in found["rules"])
    config = Config(**found["settings"])
    assert (config.sandbox, str(config.helper)) == ("nixos-container", "/run/hyperhive-root/helper.sock")
    assert (config.hyperhive_source, config.nixpkgs) == (ROOT, ROOT / "tests/nix/standin")
    found = nix.value(of.format('"bwrap"'))
    assert (found["enableContainers"], found["nix"], "nixpkgs" in found["settings"]) == (False, False, False)
    assert {"/etc/nixos-containers", "/nix"}.isdisjoint(found["helper"]["ReadWritePaths"])


def test_limits_hold_the_slice_of_the_daemon_and_its_agents(nix: Nix) -> None:
    module = 'services.hyperhive = { enable = true; limits.memoryMax = "16G"; limits.tasksMax = 9000; };'
    config = nix.value(
        f"let c = (host {{ {module} }}).config.systemd; in [ c.slices.hyperhive.sliceConfig"
        " c.services.hyperhive.serviceConfig.Slice ]"
    )
    assert config == [{"MemoryMax": "16G", "TasksMax": 9000}, "hyperhive.slice"]


# -- the helper -------------------------------------------------------------------------------------------------------

HELPED = "services.hyperhive.enable = true"
ALONE = "services.hyperhive = { enable = true; helper.enable = false; }"
LOOK = (
    "let config = (host {{ {0}; }}).config; in {{ inherit (config.services.hyperhive) settings;"
    " daemon = {{ inherit (config.systemd.services.hyperhive) after wants serviceConfig; }};"
    " helper = (config.systemd.services.hyperhive-root or {{ }}).serviceConfig or null; }}"
)


@everywhere
def test_by_default_the_helper_starts_agents_outside_of_a_daemon_that_is_hardened_further(
    nix: Nix, nixpkgs: str
) -> None:
    found = nix.value(LOOK.format(HELPED), nixpkgs)
    # What tests/booted runs is what the module describes.
    given = Config(**found["settings"]).model_dump(mode="json")
    assert {key: given[key] for key in BY_DEFAULT} == BY_DEFAULT
    assert found["helper"]["ExecStart"].endswith("/bin/hive-root serve")
    assert "User" not in found["helper"]
    assert "hyperhive-root.service" in found["daemon"]["after"]
    assert found["daemon"]["wants"] == ["hyperhive-root.service"]
    source = nix.value("import ./nix/systemd/helper.nix")
    assert found["daemon"]["serviceConfig"].items() >= source["Daemon"]["Service"].items()


@everywhere
def test_without_it_there_is_none_and_the_daemon_can_make_sandboxes(nix: Nix, nixpkgs: str) -> None:
    found = nix.value(LOOK.format(ALONE), nixpkgs)
    config = Config(**found["settings"])
    assert (config.helper, config.sandbox, found["helper"]) == (None, "bwrap", None)
    assert "hyperhive-root.service" not in (*found["daemon"]["after"], *found["daemon"]["wants"])
    own = nix.value("(import ./nix/systemd/unit.nix).Service")
    assert found["daemon"]["serviceConfig"].items() >= own.items()
    assert "RestrictNamespaces" not in found["daemon"]["serviceConfig"]


def test_the_helper_may_write_where_the_daemon_keeps_the_hive(nix: Nix) -> None:
    module = f'{HELPED}; services.hyperhive.settings.state_dir = "/srv/hive";'
    service = nix.value(f"(host {{ {module} }}).config.systemd.services.hyperhive-root.serviceConfig")
    assert "-/srv/hive" in service["ReadWritePaths"]


def test_the_daemon_has_its_directories_made_and_open_wherever_they_are(nix: Nix) -> None:
    module = f'{HELPED}; services.hyperhive.settings = {{ state_dir = "/srv/hive"; runtime_dir = "/run/bees"; }};'
    look = (
        "let config = (host {{ {0} }}).config; in {{ rules = config.systemd.tmpfiles.rules or [ ];"
        " open = config.systemd.services.hyperhive.serviceConfig.ReadWritePaths or [ ]; }}"
    )
    found = nix.value(look.format(module))
    assert found["open"] == ["/srv/hive", "/run/bees"]
    assert found["rules"] == ["d /srv/hive 0700 hyperhive hive-admin -", "d /run/bees 0750 hyperhive hive-admin -"]
    assert nix.value(look.format(f"{HELPED};")) == {"rules": [], "open": []}


# -- the unit ---------------------------------------------------------------------------------------------------------


def test_the_unit_of_other_systems_is_made_from_the_same_source(nix: Nix) -> None:
    assert nix_pages.UNIT.read_text() == nix_pages.unit_text(nix.value("import ./nix/systemd/unit.nix"))


def test_the_helpers_files_are_made_from_the_same_source(nix: Nix) -> None:
    for path, text in nix_pages.helper_texts(nix.value("import ./nix/systemd/helper.nix")).items():
        assert path.read_text() == text


def helped_daemon() -> str:
    """The daemon's unit with its drop-in, as one file: later lines win."""
    drop_in = nix_pages.DROP_IN.read_text().split("[Service]\n")[1]
    return nix_pages.UNIT.read_text().replace("\n[Install]", f"{drop_in}\n[Install]")


@pytest.fixture(params=["the daemon's", "the daemon's with the helper", "the helper's"])
def unit_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    """A unit, and ten times what its exposure stays below."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd is not installed")
    text, exposure = {
        "the daemon's": (nix_pages.UNIT.read_text(), 29),
        "the daemon's with the helper": (helped_daemon(), 12),
        "the helper's": (nix_pages.HELPER_UNIT.read_text(), 47),
    }[request.param]
    file = tmp_path / "hyperhive.service"
    file.write_text(re.sub(r"/usr/local/bin/hive-\w+ serve", shutil.which("true") or "", text))
    return file, exposure


def test_systemd_takes_every_line_of_a_unit(unit_file: tuple[Path, int]) -> None:
    done = subprocess.run(["systemd-analyze", "verify", unit_file[0]], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_unit_is_exposed_no_more_than_the_docs_say(unit_file: tuple[Path, int]) -> None:
    file, exposure = unit_file
    command = ["systemd-analyze", "security", "--offline=yes", "--json=short", f"--threshold={exposure}", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    open_holes = [row["name"] for row in json.loads(done.stdout) if row["exposure"]]
    assert done.returncode == 0, open_holes


def test_the_unit_leaves_out_what_keeps_bubblewrap_from_its_sandbox(nix: Nix) -> None:
    service = nix.value("(import ./nix/systemd/unit.nix).Service")
    broken_by = {"RestrictNamespaces", "ProtectKernelTunables", "ProtectKernelLogs", "ProcSubset", "ProtectHostname"}
    assert broken_by.isdisjoint(service)
    assert {"@mount", "sethostname"} <= set(service["SystemCallFilter"])
    assert "AF_NETLINK" in service["RestrictAddressFamilies"]


# -- the flake --------------------------------------------------------------------------------------------------------


def test_everything_parses(nix: Nix) -> None:
    nix.parses([ROOT / "flake.nix", *(ROOT / "nix").rglob("*.nix"), *(ROOT / "tests/nix").rglob("*.nix")])


def test_nix_takes_every_output_of_the_flake_for_what_it_should_be(nix: Nix) -> None:
    standin = f"path:{ROOT}/tests/nix/standin"
    options = ["--no-build", "--no-write-lock-file", "--override-input", "nixpkgs", standin]
    done = nix.run("nix", "flake", "check", *options, f"git+file://{ROOT}")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "unknown flake output" in line] == [
        "warning: unknown flake output 'lib'"  # as that of nixpkgs is, to this nix
    ]


@everywhere
@pytest.mark.parametrize("system", ["x86_64-linux", "aarch64-linux"])
def test_every_output_evaluates_for_both_processors(nix: Nix, nixpkgs: str, system: str) -> None:
    outputs = nix.value(
        "builtins.mapAttrs (_: builtins.mapAttrs (_: one: one.drvPath or one.program))"
        f" {{ inherit (self.packages) {system}; checks = self.checks.{system}; apps = self.apps.{system};"
        f" shells = self.devShells.{system}; formatter.it = self.formatter.{system}; }}",
        nixpkgs,
    )
    assert {"default", "hive-agent"} <= set(outputs[system])
    assert {
        "python-format",
        "python-types",
        "nix-format",
        "toml-format",
        "option-docs",
        "modules",
        "fast-tests",
    } <= set(outputs["checks"])
    assert {"demo"} == set(outputs["apps"])


@everywhere
@pytest.mark.parametrize(("name", "sandbox"), [("swarm", "bwrap"), ("containers", "nixos-container")])
def test_the_virtual_machines_evaluate_and_their_scripts_are_python(
    nix: Nix, nixpkgs: str, name: str, sandbox: str
) -> None:
    found = nix.value(
        f"let test = import ./nix/tests/{name}.nix {{ inherit self; }}; machine = (host test.nodes.machine).config; in"
        " { inherit (test) testScript; inherit (machine.services.hyperhive) settings;"
        " inherit (machine.users) groups; }",
        nixpkgs,
    )
    compile(found["testScript"], name, "exec")
    config = Config(**found["settings"])
    assert (config.default_program, config.sandbox) == ("rehearsal", sandbox)
    assert found["groups"]["hive-admin"]["members"] == ["ada"]


@pytest.mark.parametrize(
    ("name", "file", "added"),
    [
        ("swarm", "agent.toml", ['model = "haiku"', None]),
        ("containers", "agent.nix", ["pkgs.librsvg ];", "  systemd.services.hive-agent.enable = false;"]),
    ],
)
def test_the_changes_that_the_machines_managers_make_fit_what_is_rendered_for_an_agent(
    nix: Nix, tmp_path: Path, name: str, file: str, added: list[str | None]
) -> None:
    prompt = nix.value(
        f"((import ./nix/tests/{name}.nix {{ inherit self; }}).nodes.machine {{ inherit lib; pkgs ="
        " nixpkgs.legacyPackages.x86_64-linux // { writeText = _: text: { outPath = text; }; };"
        " }).services.hyperhive.settings.manager_prompt"
    )
    steps = [step for rule in find_rules(prompt) for step in rule["do"]]
    (persona,) = [step["args"]["persona"] for step in steps if step.get("tool") == "request_spawn"]
    folder = tmp_path / "iris" / "config"
    folder.mkdir(parents=True)
    files = agent_files(AgentName("iris"), "", hyperhive="x", system="x")
    files |= {"agent.toml": 'program = "rehearsal"\nmodel = "sonnet"\n', "CLAUDE.md": f"# iris\n\n{persona}\n"}
    for path, text in files.items():
        (folder / path).write_text(text)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *words], check=True)
    assert find_rules((folder / "CLAUDE.md").read_text())[0]["match"] == "Draw"
    who = {f"GIT_{role}_{what}": "t" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    scripts = [step["run"] for step in steps if "run" in step]
    for script, line in zip(scripts, added, strict=True):
        command = ["sh", "-c", fill_command(script, {"sha": "x"})]
        environment = {**os.environ, **who, "HIVE_CONFIGS": str(tmp_path)}
        first = subprocess.check_output(command, env=environment, text=True)
        if line == "pkgs.librsvg ];":  # it is denied first, and asked for again
            assert subprocess.check_output(command, env=environment, text=True) == first
        changed = subprocess.check_output([*git, "show", "--format=", "HEAD", "--", file], text=True)
        if line is not None:
            assert [one for one in changed.splitlines() if one.startswith("+") and one.endswith(line)]
        else:
            with pytest.raises(BadScript):
                find_rules((folder / "CLAUDE.md").read_text())


@everywhere
def test_the_pages_of_options_are_what_the_modules_say(nix: Nix, nixpkgs: str) -> None:
    assert nix_pages.OPTIONS_PAGE.read_text() == nix_pages.options_page(nix.value("options", nixpkgs))


def test_the_wheels_are_those_of_the_lock_files_for_both_processors() -> None:
    table = json.loads((ROOT / "nix/wheels.json").read_text())
    target = {"sys_platform": "linux", "python_version": table["python"], "python_full_version": table["python"] + ".0"}
    for lock, part in (("requirements.lock", "run"), ("requirements-dev.lock", "dev")):
        text = (ROOT / lock).read_text()
        needs = [Requirement(line.rstrip(" \\")) for line in text.splitlines() if line[0].isalnum()]
        locked = {need.name for need in needs if need.marker is None or need.marker.evaluate(target)}
        wheels = [wheel for wheel in table["wheels"] if part in wheel["sets"]]
        assert {wheel["pname"].lower().replace("_", "-").replace(".", "-") for wheel in wheels} == locked
        for wheel in wheels:
            assert set(wheel["files"]) in ({"any"}, {"x86_64-linux", "aarch64-linux"})
            assert all(f"sha256:{file['sha256']}" in text for file in wheel["files"].values())


def test_the_closure_of_an_agent_is_its_loop_and_one_library(nix: Nix) -> None:
    wheels = nix.value("map (wheel: wheel.pname) self.packages.x86_64-linux.hive-agent.given.wheels")
    assert wheels == ["attrs", "idna", "outcome", "sniffio", "sortedcontainers", "trio"]


def test_python_in_nix_is_one_that_the_project_takes() -> None:
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    python = json.loads((ROOT / "nix/wheels.json").read_text())["python"]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.split(".")))
