# The programs on the very wheels that the lock files name: what ships is what was tested.
{ pkgs }:
let
  project = (fromTOML (builtins.readFile ../pyproject.toml)).project;
  environment = import ./environment.nix { inherit pkgs; };
in
{
  default = environment {
    pname = "hyperhive";
    set = "run";
    sources = [
      "hive_core"
      "hive_agent"
      "hive_mind"
      "dashboard"
    ];
    scripts = project.scripts;
    mainProgram = "hive";
  };

  # What runs inside a container: no web server, no database, one library.
  hive-agent = environment {
    pname = "hive-agent";
    set = "agent";
    sources = [
      "hive_core/__init__.py"
      "hive_core/version.py"
      "hive_core/protocol"
      "hive_agent"
      "hive_mind"
    ];
    scripts = { inherit (project.scripts) hive-agent hive-mind; };
    mainProgram = "hive-agent";
  };
}
