# sandbox = "nixos-container": what a host has besides for containers that are NixOS systems.
{ flake, nixpkgs }:
{ config, lib, ... }:
let
  cfg = config.services.hyperhive;
in
{
  config = lib.mkIf (cfg.enable && cfg.sandbox == "nixos-container") {
    # nixos-container and its unit: a host that declares no container of its own would not have them.
    boot.enableContainers = true;
    systemd.tmpfiles.rules = [ "d /etc/nixos-containers 0755 root root -" ];
    # Agents are made of what this host's flake has locked.
    services.hyperhive.settings = {
      hyperhive_source = lib.mkDefault "${flake}";
      nixpkgs = lib.mkDefault "${nixpkgs}";
    };
    systemd.services.hyperhive = {
      # What agents propose is evaluated by the daemon itself.
      path = [ config.nix.package ];
      # nixos-container writes to /etc, /nix/var and /var/lib, and enters containers: that is root's, with all it may.
      serviceConfig = lib.mapAttrs (_: lib.mkForce) {
        User = "root";
        CapabilityBoundingSet = "~";
        ProtectSystem = true;
      };
    };
  };
}
