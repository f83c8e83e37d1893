# `nix flake check`: form and types of Python, Nix and TOML, the option docs, the modules evaluated, the fast tests.
{
  pkgs,
  nixpkgs,
  self,
}:
let
  inherit (pkgs.stdenv.hostPlatform) system;
  environment = import ./development.nix { inherit pkgs; };
  check =
    name: needs: script:
    pkgs.runCommand "hyperhive-${name}" { nativeBuildInputs = needs; } ''
      cp -r ${self} source
      chmod -R u+w source
      cd source
      export HOME=$TMPDIR PYTHONPATH=$PWD PATH=${environment}/venv/bin:$PATH
      ${script}
      touch $out
    '';
  host = nixpkgs.lib.nixosSystem {
    inherit system;
    modules = [
      self.nixosModules.default
      {
        services.hyperhive.enable = true;
        system.stateVersion = "25.11";
      }
    ];
  };
  agent = self.lib.mkAgent {
    inherit system;
    name = "iris";
    modules = [ ];
  };
  options = import ./options-page.nix {
    inherit (nixpkgs) lib;
    inherit pkgs self;
  };
  written = pkgs.writeText "options.json" (builtins.toJSON options);
in
{
  python-format = check "python-format" [ ] "ruff check . && ruff format --check .";
  python-types = check "python-types" [ ] "mypy";
  nix-format = check "nix-format" [
    pkgs.nixfmt
  ] "find flake.nix nix -name '*.nix' -exec nixfmt --check {} +";
  toml-format = check "toml-format" [ pkgs.taplo ] "taplo fmt --check";
  option-docs = check "option-docs" [ ] "python -m tests.nix_pages --check ${written}";
  # Evaluated whole and built as far as the daemon's own parser of its settings.
  modules = pkgs.writeText "hyperhive-modules" (
    builtins.toJSON {
      host = host.config.systemd.services.hyperhive.serviceConfig;
      helper = host.config.systemd.services.hyperhive-root.serviceConfig;
      settings = host.config.environment.etc."hyperhive/config.toml".source;
      agent = agent.config.hyperhive.settings;
    }
  );
  # The tests ask git what belongs to the checkout.
  fast-tests = check "fast-tests" [ pkgs.git ] ''
    git init --quiet
    python -m pytest tests/lint
    python -m pytest -n 2 tests/unit
  '';
}
