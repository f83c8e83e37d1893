# `nix develop -c make lint test`: all that .ci/run would install, but for Claude Code and a browser.
{ pkgs }:
let
  environment = import ./development.nix { inherit pkgs; };
in
{
  default = pkgs.mkShell {
    packages = [
      pkgs.bubblewrap
      pkgs.git
      pkgs.gnumake
      pkgs.nix
      pkgs.nixfmt
      pkgs.strace
      pkgs.systemd
      pkgs.taplo
      pkgs.uv
    ];
    # bin/setup lets .venv point to it; our own packages come from the checkout.
    HIVE_NIX_ENVIRONMENT = "${environment}/venv";
    shellHook = "export PYTHONPATH=$PWD PATH=${environment}/venv/bin:$PATH";
  };
}
