# lib.mkAgent { system, name, modules }: the NixOS system of an agent's container.
{ nixpkgs, agent }:
{
  system,
  name,
  modules,
}:
let
  inherit (nixpkgs) lib;
in
lib.nixosSystem {
  inherit system;
  modules = [
    agent
    # What systemd-nspawn mounts by itself is left to it, by a NixOS that knows the difference.
    (
      { options, ... }:
      {
        boot = {
          isContainer = true;
        }
        // lib.optionalAttrs (options.boot ? isNspawnContainer) { isNspawnContainer = true; };
      }
    )
    {
      networking.hostName = name;
      hyperhive.role = if name == "hm1nd" then "manager" else "agent";
      # Names and addresses are the host's to give; the model is reached through a socket.
      networking.useDHCP = false;
      # The host builds; nothing in here speaks to its store.
      nix.enable = false;
      documentation.enable = lib.mkDefault false;
      system.stateVersion = "25.11";
    }
  ]
  ++ modules;
}
