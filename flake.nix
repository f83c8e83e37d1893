{
  description = "hyperhive: run a swarm of coding agents on a machine of your own";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";

  outputs =
    { self, nixpkgs }:
    let
      flake = import ./nix { inherit self nixpkgs; };
    in
    {
      inherit (flake)
        apps
        checks
        devShells
        formatter
        legacyPackages
        lib
        nixosModules
        packages
        ;
    };
}
