# The names that the original has: services.hive-c0re.*, and hyperhive.enable.
{ lib, ... }:
let
  path = lib.splitString ".";
  alias =
    from: name: lib.mkAliasOptionModule (path "${from}.${name}") (path "services.hyperhive.${name}");
in
{
  imports = [
    (alias "hyperhive" "enable")
  ]
  ++ map (alias "services.hive-c0re") [
    "enable"
    "package"
    "claude"
    "sandbox"
    "settings"
    "dashboard.address"
    "dashboard.port"
    "agents.memoryMiB"
    "agents.cpuPercent"
    "agents.tasks"
    "limits.memoryMax"
    "limits.cpuQuota"
    "limits.tasksMax"
    "helper.enable"
    "adminUsers"
    "operatorPronouns"
    "environmentFiles"
    "credentials"
  ];
}
