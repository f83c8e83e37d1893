# `nix fmt`: Python, TOML and Nix as `nix flake check` wants them.
{ pkgs }:
let
  environment = import ./development.nix { inherit pkgs; };
in
pkgs.writeShellScriptBin "hyperhive-format" ''
  set -eu
  export PATH=${environment}/venv/bin:${pkgs.nixfmt}/bin:${pkgs.taplo}/bin:$PATH
  cd "$(${pkgs.git}/bin/git rev-parse --show-toplevel)"
  ruff format .
  taplo fmt
  find flake.nix nix -name '*.nix' -exec nixfmt {} +
''
