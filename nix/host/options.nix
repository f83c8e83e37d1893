{ flake }:
{ lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
in
{
  options.services.hyperhive = {
    enable = lib.mkEnableOption "hyperhive, a daemon that runs a swarm of coding agents";

    package = mkOption {
      type = types.package;
      default = flake.packages.${pkgs.stdenv.hostPlatform.system}.default;
      defaultText = lib.literalExpression "hyperhive.packages.\${system}.default";
      description = "The package with `hive-core`, the daemon, and `hive`, the command line.";
    };

    claude = mkOption {
      type = types.nullOr types.package;
      default = null;
      example = lib.literalExpression "pkgs.claude-code";
      description = "The package with `claude`, which agents run. Its licence is not free: nixpkgs has to be told to allow it. With none, agents that need it wait for it.";
    };

    sandbox = mkOption {
      type = types.enum [
        "bwrap"
        "nspawn"
        "nixos-container"
      ];
      default = "bwrap";
      description = "What agents run in. With `bwrap` each has a sandbox of bubblewrap's, of the daemon's uid. With `nixos-container` each has a NixOS system and uids of its own, built from its `agent.nix` and from this host's nixpkgs; the daemon builds it, and the helper has containers of it. `nspawn` is for other systems: systemd-nspawn makes no container over the `/usr` of NixOS.";
    };

    settings = mkOption {
      type = (pkgs.formats.toml { }).type;
      default = { };
      example = {
        default_model = "opus";
        tries = 3;
      };
      description = "Settings of the daemon, as in its `config.toml`; docs/defaults.md has their table. The daemon's own parser checks them when the system is built.";
    };

    dashboard.address = mkOption {
      type = types.str;
      default = "127.0.0.1";
      description = "The address of this machine on which the dashboard and the pages of agents are served.";
    };

    dashboard.port = mkOption {
      type = types.port;
      default = 7000;
      description = "The port of the dashboard.";
    };

    agents.memoryMiB = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 8192;
      description = "Memory of each agent and all that it starts, in MiB (`agent_memory_bytes`); held by the helper. With none, the daemon's default.";
    };

    agents.cpuPercent = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 100;
      description = "CPU time of each agent: 100 is one core (`agent_cpu_percent`); held by the helper. With none, the daemon's default.";
    };

    agents.tasks = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 4096;
      description = "Processes and threads of each agent (`agent_tasks`); held by the helper. With none, the daemon's default.";
    };

    limits.memoryMax = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "16G";
      description = "Memory of the daemon and all agents together, as MemoryMax= of systemd takes it. With none, all of the machine's.";
    };

    limits.cpuQuota = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "400%";
      description = "CPU time of the daemon and all agents together, as CPUQuota= of systemd takes it: 100% is one core.";
    };

    limits.tasksMax = mkOption {
      type = types.nullOr types.ints.positive;
      default = null;
      example = 20000;
      description = "Processes and threads of the daemon and all agents together.";
    };

    helper.enable = mkOption {
      type = types.bool;
      default = true;
      description = "Whether a helper that is root, `hyperhive-root.service`, starts the agents, each as a transient unit outside the daemon's, which is hardened further then; `hive login` takes a token (`--token`) or a key in the place of running the program. Without it nothing here is root, and agents are children of the daemon, in its unit and hardened as it is: nobody holds each to `agents.*`, `systemctl` does not tell one from another, and the daemon is hardened less. With `nixos-container` there is a helper in any case, and the daemon's unit stays as it is.";
    };

    adminUsers = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "ada" ];
      description = "Users who may command the daemon with `hive`: they become members of the group `hive-admin`. Whoever can do that can do all that the hive can.";
    };

    operatorPronouns = mkOption {
      type = types.nullOr types.str;
      default = null;
      example = "she/her";
      description = "How agents speak of the operator. It stands in the prompt of each agent that is created from then on.";
    };

    environmentFiles = mkOption {
      type = types.listOf types.path;
      default = [ ];
      example = [ "/run/secrets/hyperhive.env" ];
      description = "Files with VARIABLE=value lines for the daemon, read by systemd when it starts.";
    };

    credentials = mkOption {
      type = types.attrsOf types.path;
      default = { };
      example = {
        anthropic-api-key = "/run/secrets/anthropic-api-key";
      };
      description = "Files with a credential of the model provider, by what it is: `anthropic-api-key` or `claude-oauth-token`. systemd hands them to the daemon and to nobody else (LoadCredential=).";
    };
  };
}
