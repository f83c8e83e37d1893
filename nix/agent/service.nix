# The harness as a unit of the container, and what the container has besides.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.hyperhive;
  program = if cfg.role == "manager" then "hive-mind" else "hive-agent";
  claude = lib.optionalString cfg.claude.enable " --claude ${lib.getExe' cfg.claude.package "claude"}";
in
{
  config = {
    assertions = [
      {
        assertion =
          cfg.settings.available_models == [ ]
          || lib.elem cfg.settings.model cfg.settings.available_models;
        message = "hyperhive.model is ${cfg.settings.model}, and hyperhive.availableModels has ${lib.concatStringsSep ", " cfg.settings.available_models}: choose one of them.";
      }
      {
        assertion = builtins.stringLength cfg.settings.description <= 200;
        message = "hyperhive.description is longer than 200 characters: shorten it.";
      }
    ];

    nixpkgs.config.allowUnfreePredicate =
      package: cfg.claude.enable && lib.getName package == "claude-code";

    # The sockets are bound to /run/hive from the host; the harness waits for the daemon behind them by itself.
    systemd.services.hive-agent = {
      description = "hyperhive, the turn loop of this agent";
      wantedBy = [ "multi-user.target" ];
      unitConfig.ConditionPathIsDirectory = "/run/hive";
      # The program's shell finds what the container has, agent.nix's packages among it.
      environment.PATH = lib.mkForce "/run/current-system/sw/bin";
      environment.HOME = "/root";
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/${program} serve --run /run/hive --state /state --sandbox bwrap${claude}";
        WorkingDirectory = "/state";
        Restart = "on-failure";
        RestartSec = 2;
        # Told to stop it ends its turn's program with it: the host leases the message again.
        KillMode = "mixed";
        UMask = "0077";
        NoNewPrivileges = true;
        OOMPolicy = "continue";
      };
    };

    environment.systemPackages = [
      pkgs.bash
      pkgs.coreutils
      pkgs.git
    ];
  };
}
