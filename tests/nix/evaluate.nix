# Our flake on the stand-in, or on what is given: a nixpkgs, or its lib alone (a folder with lib/).
{
  given ? "",
}:
let
  lib = if given == "" then import ./standin/lib.nix else import "${given}/lib";
  whole = given != "" && builtins.pathExists "${given}/nixos/lib/eval-config.nix";
  pkgsFor =
    system: config:
    if whole then
      import given { inherit system config; }
    else
      import ./standin/pkgs.nix { inherit lib system config; };
  nixosSystem =
    if whole then
      arguments:
      import "${given}/nixos/lib/eval-config.nix" ({ inherit lib; system = null; } // arguments)
    else
      import ./standin/nixos.nix { inherit lib pkgsFor; };
  nixpkgs = {
    outPath = if whole then given else toString ./standin;
    lib = lib // {
      inherit nixosSystem;
    };
    legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: pkgsFor system { });
  };
  self = (import ../../flake.nix).outputs { inherit self nixpkgs; } // {
    outPath = toString ../..;
  };
in
{
  inherit lib nixpkgs self;
  options = import ../../nix/options-page.nix {
    inherit lib self;
    pkgs = nixpkgs.legacyPackages.x86_64-linux;
  };
  # The NixOS system of one module, as a host's flake would make it.
  host =
    module:
    nixosSystem {
      system = "x86_64-linux";
      modules = [
        self.nixosModules.default
        { system.stateVersion = "25.11"; }
        module
      ];
    };
}
