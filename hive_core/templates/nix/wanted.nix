# What of an agent's evaluated configuration the host wants to know, as plain data. Given to nix as text.
#
# The system's derivation is made and not built, so that whatever of a build is evaluation is seen before it. Below
# `facts` a thing that cannot be told is null: what an agent wrote may throw, and NixOS may have it otherwise.
config:
let
  inherit (builtins) attrNames filter mapAttrs;
  plain = value: builtins.unsafeDiscardStringContext (toString value);
  known =
    value:
    let
      tried = builtins.tryEval (builtins.deepSeq value value);
    in
    if tried.success then tried.value else null;
  mark = value: builtins.substring 0 16 (builtins.hashString "sha256" (plain value));
  only = keep: attrs: removeAttrs attrs (filter (name: !keep attrs.${name}) (attrNames attrs));
  enabled = only (one: one.enable or true);
in
{
  inherit (config.hyperhive) settings persona role;
  mounts =
    filter (path: path != "/") (attrNames config.fileSystems)
    ++ map (mount: mount.where or "?") (
      filter (mount: builtins.substring 0 1 (mount.what or "") == "/") (config.systemd.mounts or [ ])
    );
  system = plain config.system.build.toplevel.outPath;
  derivation = plain config.system.build.toplevel.drvPath;
  facts = {
    packages = known (
      map (package: {
        name = plain (package.name or package);
        mark = mark (package.drvPath or package);
      }) config.environment.systemPackages
    );
    services = known (
      if config.systemd ? units then
        mapAttrs (_: unit: mark (unit.text or "")) config.systemd.units
      else
        null
    );
    etc = known (
      mapAttrs (_: entry: mark (entry.source or (entry.text or ""))) (enabled config.environment.etc)
    );
    # Whatever else of a system is written as a script: what starts it, and what puts it together.
    scripts = known (
      mark (
        builtins.concatStringsSep "\n" (
          map plain [
            (config.system.activationScripts.script or "")
            (config.system.systemBuilderCommands or "")
            (config.system.extraSystemBuilderCmds or "")
            (config.environment.extraSetup or "")
          ]
        )
      )
    );
    users = known (
      mapAttrs (_: user: map plain (user.extraGroups or [ ])) (enabled config.users.users)
    );
    setuid = known (
      mapAttrs (_: wrapper: {
        setuid = wrapper.setuid or false;
        setgid = wrapper.setgid or false;
        capabilities = plain (wrapper.capabilities or "");
      }) (enabled (config.security.wrappers or { }))
    );
    capabilities = known (
      mapAttrs (_: service: plain service.serviceConfig.AmbientCapabilities) (
        only (service: service ? serviceConfig.AmbientCapabilities) config.systemd.services
      )
    );
    network = known {
      firewall = config.networking.firewall.enable or false;
      dhcp = config.networking.useDHCP or false;
      tcp = map plain (config.networking.firewall.allowedTCPPorts or [ ]);
      udp = map plain (config.networking.firewall.allowedUDPPorts or [ ]);
      nameservers = map plain (config.networking.nameservers or [ ]);
    };
    programs = known (
      [ (plain (config.hyperhive.package.name or "")) ]
      ++ (
        if config.hyperhive.claude.enable then
          [ (plain (config.hyperhive.claude.package.name or "")) ]
        else
          [ ]
      )
    );
  };
}
