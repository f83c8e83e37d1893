# The names that the original has: services.hive-c0re.*, and hyperhive.enable.
{ lib, ... }:
let
  alias = from: path: lib.mkAliasOptionModule (from ++ path) ([ "services" "hyperhive" ] ++ path);
in
{
  imports = [
    (alias [ "hyperhive" ] [ "enable" ])
  ]
  ++ map (alias [ "services" "hive-c0re" ]) [
    [ "enable" ]
    [ "package" ]
    [ "claude" ]
    [ "settings" ]
    [ "dashboard" "address" ]
    [ "dashboard" "port" ]
    [ "agents" "memoryMiB" ]
    [ "agents" "cpuPercent" ]
    [ "agents" "tasks" ]
    [ "limits" "memoryMax" ]
    [ "limits" "cpuQuota" ]
    [ "limits" "tasksMax" ]
    [ "adminUsers" ]
    [ "operatorPronouns" ]
    [ "environmentFiles" ]
    [ "credentials" ]
  ];
}
