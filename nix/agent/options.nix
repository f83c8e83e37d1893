{ flake }:
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
  word = types.strMatching "[A-Za-z0-9][]A-Za-z0-9._:[-]{0,79}";
  variables = types.attrsOf types.str;
  setting =
    type: default: description:
    mkOption { inherit type default description; };
  optional = type: setting (types.nullOr type) null;
  mcpServer = types.submodule {
    options = {
      command = mkOption {
        type = types.str;
        description = "The program that serves the tools, started inside the container.";
      };
      args = setting (types.listOf types.str) [ ] "Its arguments.";
      env = setting variables { } "Its environment.";
      allowed_tools =
        setting (types.nullOr (types.listOf types.str)) null
          "Its tools that are to be had; null is all of them.";
    };
  };
  destination = types.submodule {
    options = {
      to = mkOption {
        type = types.str;
        description = "As `host:port`, `*.suffix:port` or `http://host`.";
      };
      addresses =
        setting (types.listOf types.str) [ ]
          "Networks in which, besides the public ones, the host's addresses may lie.";
      methods = setting (types.listOf types.str) [
        "GET"
        "HEAD"
      ] "Of plain requests (`http://`), those that it takes.";
    };
  };
  branch = "[A-Za-z0-9_][A-Za-z0-9._/@+#=,-]{0,199}";
  extra = types.strMatching "[a-z][a-z0-9-]{0,62}";
  project = types.submodule {
    options = {
      name = mkOption {
        type = types.strMatching "[a-z][a-z0-9-]{0,62}";
        description = "The project of the hive's, as `hive project list` tells it.";
      };
      path = optional (types.strMatching "/projects/[A-Za-z0-9][A-Za-z0-9._-]{0,62}") "Where the clone is; with none, /projects/NAME.";
      branch = optional (types.strMatching branch) "The branch to begin from; with none, the project's own.";
      push = optional (types.strMatching "(${branch}|[*])?[*]?") "The branches that may be pushed, `*` at the end for any rest; with none, those below the agent's name; empty, none.";
      force = setting types.bool false "Whether they may be pushed by force, and removed.";
      tags = setting types.bool false "Whether tags may be pushed.";
    };
  };
in
{
  options.hyperhive = {
    role = setting (types.enum [
      "agent"
      "manager"
    ]) "agent" "Whether this is an agent or hm1nd, the manager.";

    persona = setting types.lines "" "Who the agent is: its CLAUDE.md.";

    package = mkOption {
      type = types.package;
      default = flake.packages.${pkgs.stdenv.hostPlatform.system}.hive-agent;
      defaultText = lib.literalExpression "hyperhive.packages.\${system}.hive-agent";
      description = "The package with `hive-agent`, the turn loop.";
    };

    claude.enable = mkOption {
      type = types.bool;
      default = config.hyperhive.settings.program == "claude";
      defaultText = lib.literalExpression ''config.hyperhive.settings.program == "claude"'';
      description = "Whether the container has Claude Code. Its licence is not free; this allows it for the container, and allows nothing else.";
    };

    claude.package = mkOption {
      type = types.package;
      default = pkgs.claude-code;
      defaultText = lib.literalExpression "pkgs.claude-code";
      description = "The package with `claude`.";
    };

    # The keys of agent.toml, under their own names: `hyperhive.settings = fromTOML (readFile ./agent.toml)`.
    settings = {
      program = setting (types.enum [
        "claude"
        "rehearsal"
      ]) "claude" "What takes the agent's turns; `rehearsal` is a stand-in that needs no account.";
      model = setting word "sonnet" "The model that the agent thinks with.";
      available_models = setting (types.listOf word) [ ] "The models that may be chosen; with none, any.";
      effort = optional (types.enum [
        "low"
        "medium"
        "high"
        "xhigh"
        "max"
      ]) "How hard the model thinks; with none, as the program has it.";
      tools = setting (types.listOf word) [
        "Bash"
        "Read"
        "Edit"
        "Write"
        "Glob"
        "Grep"
      ] "The program's own tools that are on.";
      turns = setting (types.enum [
        "warm"
        "cold"
      ]) "warm" "`warm`: one process of the program takes many turns; `cold`: each has its own.";
      warm_idle_s =
        setting (types.ints.between 1 86400) 300
          "Seconds that a warm process is kept without a turn.";
      warm_turns = setting (types.ints.between 1 100000) 50 "Turns that a warm process takes.";
      warm_memory_mib =
        setting (types.ints.between 64 1048576) 1024
          "MiB of memory above which it takes no more.";
      background_s =
        setting (types.ints.between 1 604800) 21600
          "Seconds after which a command in the background is ended.";
      turn_silence_s =
        setting (types.ints.between 10 86400) 1800
          "Seconds without a line after which a turn is stuck.";
      context_window = optional (types.ints.between 1000 100000000) "Tokens that fit into the model's context; with none, as the program says.";
      compact_at_percent =
        setting (types.ints.between 0 100) 75
          "Percent of the context above which the session is compacted by itself; 0: never.";
      description = setting types.str "" "What others read of the agent, at most 200 characters.";
      credential =
        setting (types.strMatching "[a-z][a-z0-9]*(-[a-z0-9]+)*") "default"
          "The credential of the host that it uses, by its name.";
      recipients = optional (types.listOf (types.strMatching "[a-z][a-z0-9-]{0,29}")) "Whom it may write to; with none, everybody.";
      pair_rate_per_hour = optional (types.ints.between 1 100000) "Messages to one recipient before they are held; with none, the hive's.";
      network = setting (types.enum [
        "private"
        "host"
      ]) "private" "`private`: a loopback of its own; `host`: the network of the machine, its loopback too. Only agent.toml can set it.";
      env =
        setting variables { }
          "More of its program's environment; what the hive sets itself is refused.";
      mcp_servers =
        setting (types.attrsOf mcpServer) { }
          "Servers of tools beside the hive's own, by name.";
      skills =
        setting (types.listOf extra) [ ]
          "Its skills: folders `skills/NAME` of its repository.";
      plugins =
        setting (types.listOf extra) [ ]
          "Plugins of its program: folders `plugins/NAME` of its repository.";
      egress =
        setting (types.listOf (types.either types.str destination)) [ ]
          "What it may reach beside the model: `host:port`, `*.suffix:port`, `http://host`, a preset, or a table with more (docs/reach.md).";
      projects =
        setting (types.listOf project) [ ]
          "The hive's projects that it works on, each a clone of its own.";
    };
  };
}
