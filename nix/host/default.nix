# services.hyperhive: the daemon as a NixOS service.
{ flake }:
{
  imports = [
    (import ./options.nix { inherit flake; })
    ./assertions.nix
    ./service.nix
    ./aliases.nix
  ];
}
