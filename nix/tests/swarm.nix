# An agent is asked for, approved, changed, taken back, kept over a rebuild, a rollback and a reboot.
{ self }:
{
  name = "hyperhive-swarm";

  nodes.machine =
    { pkgs, ... }:
    let
      prompt = import ./manager.nix {
        inherit pkgs;
        changes = [
          {
            from = "operator";
            match = "Change iris";
            edit = "sed -i 's/^model = .*/model = \"haiku\"/' agent.toml";
          }
          # Its program cannot read its script any more, and does not come up.
          {
            from = "operator";
            match = "Break iris";
            edit = "sed -i 's/^\\[{/{/' CLAUDE.md";
          }
        ];
      };
    in
    {
      imports = [ self.nixosModules.default ];
      services.hyperhive = {
        enable = true;
        adminUsers = [ "ada" ];
        agents.memoryMiB = 1024;
        settings = {
          default_program = "rehearsal";
          manager_prompt = "${prompt}";
        };
      };
      users.users.ada.isNormalUser = true;
      users.users.eve.isNormalUser = true;
      # What a later configuration of this machine changes.
      specialisation.changed.configuration.services.hyperhive.settings.tries = 9;
      virtualisation.memorySize = 2048;
    };

  testScript = builtins.readFile ./swarm.py;
}
