# hyperhive.*: an agent, from inside its container.
{ flake }:
{
  key = "hyperhive-agent";
  _file = ./default.nix;
  imports = [
    (import ./options.nix { inherit flake; })
    ./aliases.nix
    ./service.nix
  ];
}
