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
  network = lib.optionalString (cfg.settings.network != "private") " --network ${cfg.settings.network}";
  claude = lib.optionalString cfg.claude.enable " --claude ${lib.getExe' cfg.claude.package "claude"}";
in
{
  config = {
    assertions = [
      {
        assertion =
          cfg.settings.available_models == [ ] || lib.elem cfg.settings.model cfg.settings.available_models;
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
      # A switch to another system lets it go on: the host starts it anew at its turn's edge.
      restartIfChanged = false;
      unitConfig = {
        ConditionPathIsDirectory = "/run/hive";
        # Its end is the container's, with its exit code; starting it again is the host's to decide.
        SuccessAction = "exit";
        FailureAction = "exit";
      };
      environment = {
        # The program's shell finds what the container has, agent.nix's packages among it, and nothing of the host's.
        PATH = lib.mkForce "/run/current-system/sw/bin";
        HOME = "/root";
        LANG = "C.UTF-8";
      };
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/${program} serve --run /run/hive --state /state --sandbox nixos-container${network}${claude}";
        WorkingDirectory = "/state";
        # The host reads its last words on the console.
        StandardOutput = "journal+console";
        StandardError = "journal+console";
        # By which it knows them; the manager's too.
        SyslogIdentifier = "hive-agent";
        # Told to stop it ends its turn's program with it: the host leases the message again.
        KillMode = "mixed";
        UMask = "0077";
        OOMPolicy = "continue";
      }
      // import ./hardening.nix;
    };

    environment.systemPackages = [
      pkgs.bash
      pkgs.coreutils
      pkgs.git
    ];
  };
}
