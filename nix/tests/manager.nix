# hm1nd's prompt, which carries the script of a rehearsal: it asks for iris, who draws, and for changes of it.
#
# changes: what it does when it reads what: { from, match, edit }, where edit is a command in iris's repository.
{ pkgs, changes }:
let
  script = rules: ''
    ```rehearsal
    ${builtins.toJSON rules}
    ```
  '';
  iris = [
    {
      from = "operator";
      match = "Draw";
      do = [
        {
          tool = "send";
          args = {
            to = "hm1nd";
            body = "I need rsvg-convert for that.";
          };
        }
      ];
    }
  ];
  rules = [
    {
      from = "operator";
      match = "an agent that draws";
      do = [
        {
          tool = "request_spawn";
          args = {
            name = "iris";
            persona = "You draw.\n\n${script iris}";
            reason = "The operator wants pictures.";
          };
        }
      ];
    }
  ]
  ++ map (
    {
      from,
      match,
      edit,
    }:
    {
      inherit from match;
      do = [
        {
          # What was denied is committed already, and asked for again.
          run = "cd \"$HIVE_CONFIGS/iris/config\" && ${edit} && { git diff --quiet || git commit --quiet --all --message 'a change'; } && git rev-parse HEAD";
          save = "sha";
        }
        {
          tool = "request_apply_commit";
          args = {
            agent = "iris";
            sha = "{sha}";
            reason = "${from} asked for it.";
          };
        }
      ];
    }
  ) changes;
in
pkgs.writeText "hm1nd.md" ''
  You are the manager of this machine.

  ${script rules}
''
