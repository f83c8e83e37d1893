{
  description = "A stand-in for nixpkgs: what our files use of it, to be evaluated where there is no nixpkgs";
  outputs = { self }:
    let
      plain = import ./lib.nix;
      pkgsFor = system: config: import ./pkgs.nix { lib = plain; inherit system config; };
    in
    {
      lib = plain // { nixosSystem = import ./nixos.nix { lib = plain; inherit pkgsFor; }; };
      legacyPackages = plain.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: pkgsFor system { });
    };
}
