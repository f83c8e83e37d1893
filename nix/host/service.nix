{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.hyperhive;
  unit = import ../systemd/unit.nix;
  inherit (import ../systemd/helper.nix) Helper Daemon;
  containers = cfg.sandbox == "nixos-container";
  helped = cfg.helper.enable || containers;
  # systemd makes its own for the unit; others have to be made and opened.
  elsewhere =
    lib.optional (cfg.settings.state_dir != "/var/lib/hyperhive") {
      path = cfg.settings.state_dir;
      mode = unit.Service.StateDirectoryMode;
    }
    ++ lib.optional (cfg.settings.runtime_dir != "/run/hyperhive") {
      path = cfg.settings.runtime_dir;
      mode = unit.Service.RuntimeDirectoryMode;
    };
  written = (pkgs.formats.toml { }).generate "hyperhive-config.toml" cfg.settings;
  # The daemon's own parser reads it, so a setting that it would refuse ends the build.
  checked = pkgs.runCommand "hyperhive-config-checked.toml" { } ''
    ${cfg.package}/bin/hive-core check ${written}
    cp ${written} $out
  '';
in
{
  config = lib.mkIf cfg.enable {
    services.hyperhive.settings = {
      state_dir = lib.mkDefault "/var/lib/hyperhive";
      runtime_dir = lib.mkDefault "/run/hyperhive";
      sandbox = lib.mkDefault cfg.sandbox;
      dashboard_host = lib.mkDefault cfg.dashboard.address;
      dashboard_port = lib.mkDefault cfg.dashboard.port;
      helper = lib.mkIf helped (lib.mkDefault "/run/hyperhive-root/helper.sock");
      claude = lib.mkIf (cfg.claude != null) (lib.mkDefault (lib.getExe' cfg.claude "claude"));
      agent_memory_bytes = lib.mkIf (cfg.agents.memoryMiB != null) (
        lib.mkDefault (cfg.agents.memoryMiB * 1024 * 1024)
      );
      agent_cpu_percent = lib.mkIf (cfg.agents.cpuPercent != null) (lib.mkDefault cfg.agents.cpuPercent);
      agent_tasks = lib.mkIf (cfg.agents.tasks != null) (lib.mkDefault cfg.agents.tasks);
      operator_pronouns = lib.mkIf (cfg.operatorPronouns != null) (lib.mkDefault cfg.operatorPronouns);
    };

    environment.etc."hyperhive/config.toml".source = checked;
    environment.systemPackages = [ cfg.package ];

    users.users.hyperhive = {
      isSystemUser = true;
      group = "hive-admin";
      home = "/var/lib/hyperhive";
      description = "hyperhive";
    };
    users.groups.hive-admin.members = cfg.adminUsers;

    systemd.tmpfiles.rules = map ({ path, mode }: "d ${path} ${mode} hyperhive hive-admin -") elsewhere;

    systemd.slices.hyperhive.sliceConfig =
      lib.optionalAttrs (cfg.limits.memoryMax != null) { MemoryMax = cfg.limits.memoryMax; }
      // lib.optionalAttrs (cfg.limits.cpuQuota != null) { CPUQuota = cfg.limits.cpuQuota; }
      // lib.optionalAttrs (cfg.limits.tasksMax != null) { TasksMax = cfg.limits.tasksMax; };

    systemd.services.hyperhive = {
      description = unit.Unit.Description;
      wantedBy = [ unit.Install.WantedBy ];
      aliases = [ unit.Install.Alias ];
      after = [ unit.Unit.After ] ++ lib.optional helped Daemon.Unit.After;
      wants = lib.optional helped Daemon.Unit.Wants;
      startLimitIntervalSec = unit.Unit.StartLimitIntervalSec;
      # Units see nothing of the system's PATH.
      path = [
        pkgs.bubblewrap
        pkgs.git
        pkgs.openssh
      ];
      restartTriggers = [ checked ];
      serviceConfig =
        unit.Service
        // lib.optionalAttrs (helped && !containers) Daemon.Service
        // {
          ExecStart = "${cfg.package}/bin/hive-core serve";
        }
        // lib.optionalAttrs (elsewhere != [ ]) { ReadWritePaths = map (folder: folder.path) elsewhere; }
        // lib.optionalAttrs (cfg.environmentFiles != [ ]) {
          EnvironmentFile = map toString cfg.environmentFiles;
        }
        // lib.optionalAttrs (cfg.credentials != { }) {
          LoadCredential = lib.mapAttrsToList (name: path: "${name}:${toString path}") cfg.credentials;
        };
    };

    systemd.services.hyperhive-root = lib.mkIf helped {
      description = Helper.Unit.Description;
      wantedBy = [ Helper.Install.WantedBy ];
      startLimitIntervalSec = Helper.Unit.StartLimitIntervalSec;
      path = [
        pkgs.bubblewrap
        pkgs.util-linux
      ];
      restartTriggers = [ checked ];
      serviceConfig = Helper.Service // {
        ExecStart = "${cfg.package}/bin/hive-root serve";
        ReadWritePaths = Helper.Service.ReadWritePaths ++ [ "-${cfg.settings.state_dir}" ];
      };
    };
  };
}
