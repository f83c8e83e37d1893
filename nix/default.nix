# What flake.nix offers, for each system.
{ self, nixpkgs }:
let
  inherit (nixpkgs) lib;
  forEach =
    make:
    lib.genAttrs [
      "x86_64-linux"
      "aarch64-linux"
    ] (system: make nixpkgs.legacyPackages.${system});
  host = import ./host {
    inherit nixpkgs;
    flake = self;
  };
  agent = import ./agent { flake = self; };
in
{
  packages = forEach (pkgs: import ./packages.nix { inherit pkgs; });
  apps = forEach (pkgs: import ./apps.nix { inherit pkgs self; });
  devShells = forEach (pkgs: import ./shell.nix { inherit pkgs; });
  formatter = forEach (pkgs: import ./formatter.nix { inherit pkgs; });
  checks = forEach (pkgs: import ./checks.nix { inherit pkgs nixpkgs self; });
  # Whole machines take long, and a host that can run them: `nix build .#vmTests.NAME`.
  legacyPackages = forEach (pkgs: {
    vmTests = import ./tests { inherit pkgs self; };
  });

  nixosModules = {
    inherit agent;
    default = host;
    hive-c0re = host;
  };
  lib.mkAgent = import ./agent/system.nix { inherit nixpkgs agent; };
}
