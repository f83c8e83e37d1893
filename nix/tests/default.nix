# Whole machines, each with the module as its users have it: `nix build .#vmTests.NAME`. The agents are rehearsals.
{ pkgs, self }:
builtins.mapAttrs (_: test: pkgs.testers.runNixOSTest (import test { inherit self; })) {
  swarm = ./swarm.nix;
  containers = ./containers.nix;
}
