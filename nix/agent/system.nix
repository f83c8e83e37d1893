# lib.mkAgent { system, name, modules }: the NixOS system of an agent's container.
{ nixpkgs, agent }:
{
  system,
  name,
  modules,
}:
nixpkgs.lib.nixosSystem {
  inherit system;
  modules = [
    agent
    {
      boot.isContainer = true;
      networking.hostName = name;
      hyperhive.role = if name == "hm1nd" then "manager" else "agent";
      # Names and addresses are the host's to give; the model is reached through a socket.
      networking.useDHCP = false;
      system.stateVersion = "25.11";
    }
  ]
  ++ modules;
}
