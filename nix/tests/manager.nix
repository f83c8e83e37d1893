# hm1nd's prompt, which carries the script of a rehearsal: it asks for a reader, and for a change of it.
{ pkgs, change }:
let
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
      match = "Change iris";
      do = [
        {
          run = "cd \"$HIVE_CONFIGS/iris/config\" && ${change} && git commit --quiet --all --message 'a change' && git rev-parse HEAD";
          save = "sha";
        }
        {
          tool = "request_apply_commit";
          args = {
            agent = "iris";
            sha = "{sha}";
            reason = "The operator wants a change.";
          };
        }
      ];
    }
  ];
in
pkgs.writeText "hm1nd.md" ''
  You are the manager of this machine.

  ```rehearsal
  ${builtins.toJSON rules}
  ```
''
