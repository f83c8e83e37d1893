# services.hyperhive: the daemon as a NixOS service.
{ flake, nixpkgs }:
{
  # One module, under however many names it is imported.
  key = "hyperhive-host";
  _file = ./default.nix;
  imports = [
    (import ./options.nix { inherit flake; })
    ./assertions.nix
    ./service.nix
    (import ./containers.nix { inherit flake nixpkgs; })
    ./aliases.nix
  ];
}
