# An agent is asked for, approved, changed, kept over a rebuild, a rollback and a reboot.
{ self }:
{
  name = "hyperhive-swarm";

  nodes.machine =
    { pkgs, ... }:
    let
      # What the manager does when the operator writes to it: hm1nd's prompt carries the rehearsal's script.
      rules = [
        {
          from = "operator";
          match = "a reader";
          do = [
            {
              tool = "request_spawn";
              args = {
                name = "iris";
                persona = "You read.";
                reason = "The operator wants a reader.";
              };
            }
          ];
        }
        {
          from = "operator";
          match = "another model";
          do = [
            {
              run = "cd \"$HIVE_CONFIGS/iris/config\" && sed -i 's/^model = .*/model = \"haiku\"/' agent.toml && git commit --quiet --all --message 'another model' && git rev-parse HEAD";
              save = "sha";
            }
            {
              tool = "request_apply_commit";
              args = {
                agent = "iris";
                sha = "{sha}";
                reason = "The operator wants another model.";
              };
            }
          ];
        }
      ];
      prompt = pkgs.writeText "hm1nd.md" ''
        You are the manager of this machine.

        ```rehearsal
        ${builtins.toJSON rules}
        ```
      '';
    in
    {
      imports = [ self.nixosModules.default ];
      services.hyperhive = {
        enable = true;
        adminUsers = [ "ada" ];
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
