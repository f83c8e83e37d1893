# sandbox = "nixos-container": what a host has besides for containers that are NixOS systems.
{ flake, nixpkgs }:
{ config, lib, ... }:
let
  cfg = config.services.hyperhive;
  inherit ((import ../systemd/helper.nix).Containers) ReadWritePaths RestrictSUIDSGID;
in
{
  config = lib.mkIf (cfg.enable && cfg.sandbox == "nixos-container") {
    # nixos-container and its unit: a host that declares no container of its own would not have them.
    boot.enableContainers = true;
    # Where it keeps them is there before the first.
    systemd.tmpfiles.rules = map (path: "d ${path} 0755 root root -") ReadWritePaths;
    # Agents are made of what this host's flake has locked.
    services.hyperhive.settings = {
      hyperhive_source = lib.mkDefault "${flake}";
      nixpkgs = lib.mkDefault "${nixpkgs}";
    };
    # What agents propose is evaluated and built by the daemon, as its own user.
    systemd.services.hyperhive.path = [ config.nix.package ];
    systemd.services.hyperhive-root = {
      path = [ config.nix.package ];
      serviceConfig = {
        inherit ReadWritePaths;
        RestrictSUIDSGID = lib.mkForce RestrictSUIDSGID;
      };
    };
  };
}
