# The names for people: an agent.nix says hyperhive.model, the table under hyperhive.settings is agent.toml's.
{ lib, ... }:
let
  alias =
    name: key:
    lib.mkAliasOptionModule ([ "hyperhive" ] ++ name) [
      "hyperhive"
      "settings"
      key
    ];
in
{
  imports = [
    (alias [ "model" ] "model")
    (alias [ "availableModels" ] "available_models")
    (alias [ "effort" ] "effort")
    (alias [ "env" ] "env")
    (alias [ "extraMcpServers" ] "mcp_servers")
    (alias [ "tools" ] "tools")
    (alias [ "description" ] "description")
    (alias [ "credential" ] "credential")
    (alias [ "egress" ] "egress")
    (alias [ "projects" ] "projects")
    (alias [ "allowedRecipients" ] "recipients")
    (alias [ "autoCompact" "atPercent" ] "compact_at_percent")
    (alias [ "autoCompact" "contextWindow" ] "context_window")
  ];
}
