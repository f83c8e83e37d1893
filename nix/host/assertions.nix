{ config, lib, ... }:
let
  cfg = config.services.hyperhive;
  kinds = [
    "anthropic-api-key"
    "claude-oauth-token"
  ];
  unknown = lib.filter (name: !lib.elem name kinds) (lib.attrNames cfg.credentials);
  stored = lib.filter (name: lib.hasPrefix builtins.storeDir (toString cfg.credentials.${name})) (
    lib.attrNames cfg.credentials
  );
  openFiles = lib.filter (path: lib.hasPrefix builtins.storeDir (toString path)) cfg.environmentFiles;
  exposed = stored ++ map toString openFiles;
  # What the daemon reads: settings win over the options.
  port = cfg.settings.dashboard_port;
  managerPort = cfg.settings.manager_port or 8000;
  address = cfg.settings.dashboard_host;
  folders = [
    cfg.settings.state_dir
    cfg.settings.runtime_dir
  ];
  # What its unit shows nothing of: ProtectHome, PrivateTmp.
  hidden = map (path: "${path}/") [
    "/home"
    "/root"
    "/run/user"
    "/tmp"
    "/var/tmp"
  ];
  unseen = lib.filter (folder: lib.any (path: lib.hasPrefix path "${folder}/") hidden) folders;
  helped = cfg.helper.enable || cfg.sandbox == "nixos-container";
  bounds = lib.filter (name: cfg.settings ? ${name}) [
    "agent_memory_bytes"
    "agent_cpu_percent"
    "agent_tasks"
  ];
  loopback = lib.elem address [
    "127.0.0.1"
    "::1"
    "localhost"
  ];
in
{
  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = unknown == [ ];
        message = "services.hyperhive.credentials has no use for ${lib.concatStringsSep ", " unknown}: a credential is ${lib.concatStringsSep " or " kinds}; others are given with `hive login NAME`.";
      }
      {
        assertion = exposed == [ ];
        message = "services.hyperhive would put a secret into the Nix store, where every user can read it (${lib.concatStringsSep ", " exposed}): give the path as a string, of a file outside the store.";
      }
      {
        assertion = cfg.settings.sandbox == cfg.sandbox;
        message = "services.hyperhive.settings.sandbox is ${cfg.settings.sandbox}, for which this host would lack what it needs: say services.hyperhive.sandbox instead.";
      }
      {
        assertion = cfg.sandbox != "nspawn" || cfg.helper.enable;
        message = "services.hyperhive.sandbox is nspawn, for which the daemon has no privileges: leave services.hyperhive.helper.enable as it is.";
      }
      {
        assertion = unseen == [ ];
        message = "services.hyperhive.settings would have the hive in ${lib.concatStringsSep ", " unseen}, of which the daemon's unit sees nothing: choose a place outside of /home, /root, /run/user, /tmp and /var/tmp.";
      }
      {
        assertion = port == 0 || port != managerPort;
        message = "services.hyperhive.dashboard.port is ${toString managerPort}, the port of the manager's page: choose another, or set services.hyperhive.settings.manager_port.";
      }
    ];
    warnings =
      lib.optional (!loopback) (
        "services.hyperhive.dashboard.address is ${address}: the dashboard has no encryption of its own, so whoever can"
        + " listen on that network can sign in; put a proxy with TLS before it, or use 127.0.0.1 and `ssh -L`."
      )
      ++ lib.optional (bounds != [ ] && !helped) (
        "services.hyperhive has ${lib.concatStringsSep ", " bounds} for its agents, and nobody would hold them to it: the"
        + " daemon alone has no control groups. Leave services.hyperhive.helper.enable as it is, or bound the daemon and"
        + " all agents together with services.hyperhive.limits."
      )
      ++ lib.optional (cfg.sandbox == "nspawn") (
        "services.hyperhive.sandbox is nspawn, and systemd-nspawn makes no container over the /usr of a system whose /bin"
        + " is a directory, as that of NixOS is: no agent would be started. Say bwrap or nixos-container."
      );
  };
}
