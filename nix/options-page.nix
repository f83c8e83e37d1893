# Every option of ours as data, for docs/options.md: { host = [ … ]; agent = [ … ]; }.
{
  lib,
  pkgs,
  self,
}:
let
  # A value as one would write it.
  shown =
    value:
    if builtins.isAttrs value && value._type or "" == "literalExpression" then
      value.text
    else if builtins.isList value then
      "[ ${lib.concatStrings (map (one: shown one + " ") value)}]"
    else if builtins.isAttrs value then
      "{ ${lib.concatStrings (lib.mapAttrsToList (name: one: "${name} = ${shown one}; ") value)}}"
    else
      builtins.toJSON value;
  collect =
    options:
    lib.concatMap (
      name:
      let
        option = options.${name};
      in
      if lib.isOption option then
        lib.optional (!(option.internal or false)) {
          name = lib.concatStringsSep "." option.loc;
          type = option.type.description;
          default =
            if option ? defaultText then
              shown option.defaultText
            else if option ? default then
              shown option.default
            else
              null;
          example = if option ? example then shown option.example else null;
          description = option.description;
        }
      else
        collect option
    ) (lib.attrNames options);
  # Our modules alone: what they set of NixOS is not looked at.
  evaluated =
    module:
    (lib.evalModules {
      modules = [
        module
        { _module.args = { inherit pkgs; }; }
      ];
    }).options;
in
{
  host = collect (evaluated (import ./host/options.nix { flake = self; })).services.hyperhive;
  agent = collect (evaluated (import ./agent/options.nix { flake = self; })).hyperhive;
}
