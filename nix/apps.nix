{ pkgs, self }:
{
  # A rehearsed swarm, without an account: `nix run .#demo`.
  demo = {
    type = "app";
    program = toString (
      pkgs.writeShellScript "hive-demo" ''
        export PATH=${pkgs.git}/bin:${pkgs.bubblewrap}/bin:$PATH
        exec ${self.packages.${pkgs.stdenv.hostPlatform.system}.default}/bin/hive demo "$@"
      ''
    );
  };
}
