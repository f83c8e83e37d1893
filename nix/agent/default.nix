# hyperhive.*: an agent, from inside its container.
{ flake }:
{
  imports = [
    (import ./options.nix { inherit flake; })
    ./aliases.nix
    ./service.nix
  ];
}
