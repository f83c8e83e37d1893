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
    # Agents are made of what this host's flake has locked.
    services.hyperhive.settings = {
      hyperhive_source = lib.mkDefault "${flake}";
      nixpkgs = lib.mkDefault "${nixpkgs}";
    };
    # What agents propose is evaluated by the daemon itself.
    systemd.services.hyperhive.path = [ config.nix.package ];
  };
}
