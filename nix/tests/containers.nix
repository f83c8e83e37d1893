# The same story where each agent has a NixOS system of its own, which the machine builds by itself, without a network.
{ self }:
{
  name = "hyperhive-containers";

  nodes.machine =
    { lib, pkgs, ... }:
    let
      prompt = import ./manager.nix {
        inherit pkgs;
        changes = [
          {
            from = "iris";
            match = "rsvg-convert";
            edit = "sed -i 's/systemPackages = \\[ \\]/systemPackages = [ pkgs.librsvg ]/' agent.nix";
          }
          # Its container boots, and nothing in it says hello.
          {
            from = "operator";
            match = "Break iris";
            edit = "sed -i 's/^}$/  systemd.services.hive-agent.enable = false;\\n}/' agent.nix";
          }
        ];
      };
      # An agent as it will be, so that all that building one takes is there; what it wishes for is there built.
      agent = self.lib.mkAgent {
        inherit (pkgs.stdenv.hostPlatform) system;
        name = "iris";
        modules = [
          {
            hyperhive.settings.program = "rehearsal";
          }
        ];
      };
    in
    {
      imports = [ self.nixosModules.default ];
      services.hyperhive = {
        enable = true;
        sandbox = "nixos-container";
        adminUsers = [ "ada" ];
        settings = {
          default_program = "rehearsal";
          manager_prompt = "${prompt}";
        };
      };
      users.users.ada.isNormalUser = true;
      # What a later configuration of this machine changes.
      specialisation.changed.configuration.services.hyperhive.settings.tries = 9;
      nix.settings.substituters = lib.mkForce [ ];
      virtualisation = {
        cores = 2;
        memorySize = 6144;
        diskSize = 16384;
        writableStore = true;
        additionalPaths = [
          (pkgs.closureInfo { rootPaths = [ agent.config.system.build.toplevel.drvPath ]; })
          pkgs.librsvg
        ];
      };
    };

  testScript = builtins.readFile ./containers.py;
}
