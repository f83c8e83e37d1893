# Whole machines, each with the module as its users have it: `nix build .#vmTests.NAME`. The agents are rehearsals.
{ pkgs, self }:
{
  swarm = pkgs.testers.runNixOSTest (import ./swarm.nix { inherit self; });
}
