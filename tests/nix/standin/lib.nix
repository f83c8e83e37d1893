# As much of nixpkgs' lib as our modules use, written anew and small: options, types, and the merging of modules.
# What it says of types and of defaults is what nixpkgs says; a test with a real nixpkgs holds the two equal.
let
  inherit (builtins)
    all
    any
    attrNames
    attrValues
    concatLists
    concatMap
    concatStringsSep
    elem
    elemAt
    filter
    foldl'
    functionArgs
    genList
    head
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isPath
    isString
    length
    listToAttrs
    map
    mapAttrs
    match
    removeAttrs
    tail
    toJSON
    toString
    ;

  nameValuePair = name: value: { inherit name value; };
  genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
  unique = foldl' (found: x: if elem x found then found else found ++ [ x ]) [ ];
  last = list: elemAt list (length list - 1);
  optional = condition: x: if condition then [ x ] else [ ];
  optionals = condition: list: if condition then list else [ ];
  optionalAttrs = condition: attrs: if condition then attrs else { };
  optionalString = condition: text: if condition then text else "";
  mapAttrs' = f: attrs: listToAttrs (map (name: f name attrs.${name}) (attrNames attrs));
  mapAttrsToList = f: attrs: map (name: f name attrs.${name}) (attrNames attrs);
  filterAttrs = keep: attrs: listToAttrs (concatMap (name: optional (keep name attrs.${name}) (nameValuePair name attrs.${name})) (attrNames attrs));
  getAttrFromPath = path: attrs: foldl' (set: name: set.${name}) attrs path;
  setAttrByPath = path: value: if path == [ ] then value else { ${head path} = setAttrByPath (tail path) value; };
  hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
  removePrefix = prefix: text:
    if hasPrefix prefix text then builtins.substring (builtins.stringLength prefix) (builtins.stringLength text) text else text;
  splitString = separator: text: filter isString (builtins.split (builtins.replaceStrings [ "." ] [ "\\." ] separator) text);
  showOption = concatStringsSep ".";
  isDerivation = x: isAttrs x && x.type or "" == "derivation";
  isStringLike = x: isString x || isPath x || isAttrs x && (x ? outPath || x ? __toString);

  # Properties of definitions.
  mkIf = condition: content: { _type = "if"; inherit condition content; };
  mkMerge = contents: { _type = "merge"; inherit contents; };
  mkOverride = priority: content: { _type = "override"; inherit priority content; };
  mkDefault = mkOverride 1000;
  mkOptionDefault = mkOverride 1500;
  mkForce = mkOverride 50;
  usual = 100;

  # A definition at a node of the tree, as plain sets with its properties pushed to their values.
  pushDown = definition:
    let type = definition._type or ""; in
    if type == "if" then map (mapAttrs (_: mkIf definition.condition)) (pushDown definition.content)
    else if type == "merge" then concatMap pushDown definition.contents
    else if type == "override" then map (mapAttrs (_: mkOverride definition.priority)) (pushDown definition.content)
    else [ definition ];

  # What a module's definitions say of one path.
  definitionsAt = path: definition:
    if path == [ ] then [ definition ]
    else concatMap (set: optionals (set ? ${head path}) (definitionsAt (tail path) set.${head path})) (pushDown definition);

  # A definition at a leaf, as values with their priorities.
  discharge = definition:
    let type = if isAttrs definition then definition._type or "" else ""; in
    if type == "if" then optionals definition.condition (discharge definition.content)
    else if type == "merge" then concatMap discharge definition.contents
    else if type == "override" then map (found: found // { inherit (definition) priority; }) (discharge definition.content)
    else [ { priority = usual; value = definition; } ];

  mkOption = attrs: attrs // { _type = "option"; };
  mkEnableOption = what: mkOption {
    type = types.bool;
    default = false;
    example = true;
    description = "Whether to enable ${what}.";
  };
  isOption = x: isAttrs x && x._type or "" == "option";
  literalExpression = text: { _type = "literalExpression"; inherit text; };

  mergeAt = option: path: definitions:
    let
      found = concatMap discharge (definitions ++ optional (option ? default) (mkOptionDefault option.default));
      best = foldl' (least: one: if one.priority < least then one.priority else least) 9999 found;
      values = map (one: one.value) (filter (one: one.priority == best) found);
      wrong = filter (value: !option.type.check value) values;
      merged =
        if values == [ ] then
          option.type.empty or (throw "The option `${showOption path}' was accessed but has no value defined. Try setting the option.")
        else if wrong != [ ] then
          throw "A definition for option `${showOption path}' is not of type `${option.type.description}'."
        else option.type.merge path values;
    in
    (option.apply or (x: x)) merged;

  mergeTree = options: path: definitions:
    let
      sets = concatMap pushDown definitions;
      named = unique (concatMap attrNames sets);
      unknown = filter (name: !options ? ${name}) named;
      at = name: concatMap (set: optional (set ? ${name}) set.${name}) sets;
      merge = name: option: if isOption option then mergeAt option (path ++ [ name ]) (at name) else mergeTree option (path ++ [ name ]) (at name);
    in
    if unknown != [ ] then throw "The option `${showOption (path ++ [ (head unknown) ])}' does not exist."
    else mapAttrs merge options;

  joinOptions = path: a: b:
    a // mapAttrs
      (name: option:
        if !a ? ${name} then option
        else if isOption option || isOption a.${name} then throw "The option `${showOption (path ++ [ name ])}' is declared twice."
        else joinOptions (path ++ [ name ]) a.${name} option)
      b;

  evalModules = { modules, specialArgs ? { } }:
    let
      known = { inherit lib config options; } // specialArgs;
      call = module: module (mapAttrs (name: _: known.${name} or config._module.args.${name}) (functionArgs module) // { inherit lib config options; });
      load = parent: module:
        if isFunction module then load parent (call module)
        else if isAttrs module && !module ? outPath then
          let
            apart = module ? options || module ? config || module ? _alias;
            config = if apart then module.config or { } else removeAttrs module [ "imports" "_file" "key" ];
            key = module.key or parent;
            at = number: if key == null then null else "${key}:${toString number}";
            imports = module.imports or [ ];
          in
          [ { inherit key config; options = module.options or { }; alias = module._alias or null; } ]
          ++ concatLists (genList (number: load (at number) (elemAt imports number)) (length imports))
        else load parent (import module);
      # A module with a key counts once.
      once = foldl' (found: module: if module.key != null && any (other: other.key == module.key) found then found else found ++ [ module ]) [ ];
      arguments = { options._module.args = mkOption { type = types.lazyAttrsOf types.raw; default = { }; internal = true; }; };
      loaded = once (concatMap (load null) ([ arguments ] ++ modules));
      options = withPaths [ ] (foldl' (joinOptions [ ]) { } (map (module: module.options) loaded));
      definitions = map (module: module.config) loaded;
      aliases = concatMap (module: optional (module.alias or null != null) module.alias) loaded;
      aliased = concatMap (alias: map (setAttrByPath alias.to) (concatMap (definitionsAt alias.from) definitions)) aliases;
      config = mergeTree options [ ] (definitions ++ aliased);
    in
    { inherit config options; };

  withPaths = path: mapAttrs (name: option:
    if isOption option then option // { loc = path ++ [ name ]; } else withPaths (path ++ [ name ]) option);

  # Types.
  one = path: values:
    if length values == 1 || all (value: value == head values) values then head values
    else throw "The option `${showOption path}' has conflicting definition values.";
  mkType = description: check: { inherit description check; merge = one; _type = "option-type"; };
  composite = type: if elem type.class or "" [ "composite" ] then "(${type.description})" else type.description;
  between = low: high: name: mkType name (x: isInt x && x >= low && x <= high);

  types = rec {
    raw = mkType "raw value" (_: true) // { merge = path: values: if length values == 1 then head values else throw "The option `${showOption path}' is defined twice."; };
    unspecified = raw // { description = "unspecified value"; };
    bool = mkType "boolean" isBool;
    str = mkType "string" isString;
    int = mkType "signed integer" isInt;
    float = mkType "floating point number" isFloat;
    number = either int float // { description = "signed integer or floating point number"; };
    lines = mkType "strings concatenated with \"\\n\"" isString // { merge = _: concatStringsSep "\n"; };
    path = mkType "absolute path" (x: isStringLike x && hasPrefix "/" (toString x));
    package = mkType "package" (x: isDerivation x || isPath x);
    port = between 0 65535 "16 bit unsigned integer; between 0 and 65535 (both inclusive)";
    ints = {
      between = low: high: between low high "integer between ${toString low} and ${toString high} (both inclusive)";
      positive = mkType "positive integer, meaning >0" (x: isInt x && x > 0) // { class = "composite"; };
      unsigned = mkType "unsigned integer, meaning >=0" (x: isInt x && x >= 0);
    };
    strMatching = pattern: mkType "string matching the pattern ${pattern}" (x: isString x && match pattern x != null);
    enum = values:
      let shown = map (value: if isString value then toJSON value else toString value) values; in
      mkType (if length values == 1 then "value ${head shown} (singular enum)" else "one of ${concatStringsSep ", " shown}") (x: elem x values);
    nullOr = type: mkType "null or ${composite type}" (x: x == null || type.check x) // {
      class = "composite";
      merge = path: values: if all (value: value == null) values then null else type.merge path (filter (value: value != null) values);
    };
    either = a: b: mkType "${a.description} or ${b.description}" (x: a.check x || b.check x) // {
      class = "composite";
      merge = path: values: if all a.check values then a.merge path values else b.merge path values;
    };
    listOf = type: mkType "list of ${composite type}" isList // {
      class = "composite";
      empty = [ ];
      merge = path: values: map (value: type.merge path [ value ]) (map (checked path type) (concatLists values));
    };
    lazyAttrsOf = type: attrsOf type // { description = "lazy attribute set of ${composite type}"; };
    attrsOf = type: mkType "attribute set of ${composite type}" isAttrs // {
      class = "composite";
      empty = { };
      merge = path: values:
        let
          sets = concatMap pushDown values;
          defined = name: concatMap (set: optionals (set ? ${name}) (discharge set.${name})) sets;
        in
        genAttrs (filter (name: defined name != [ ]) (unique (concatMap attrNames sets)))
          (name: mergeAt { inherit type; } (path ++ [ name ]) (concatMap (set: optional (set ? ${name}) set.${name}) sets));
    };
    anything = mkType "anything" (_: true) // {
      merge = path: values:
        if all isAttrs values && !any isDerivation values then (attrsOf anything).merge path values
        else if all isList values then concatLists values
        else one path values;
    };
    submodule = module: mkType "submodule" (x: isAttrs x || isFunction x) // {
      class = "composite";
      empty = (evalModules { modules = [ module ]; }).config;
      merge = path: values: removeAttrs (evalModules {
        modules = [ module { _module.args.name = last path; } ] ++ map (value: if isAttrs value then { config = value; } else value) values;
      }).config [ "_module" ];
    };
  };
  checked = path: type: value:
    if type.check value then value else throw "A definition for option `${showOption path}' is not of type `${type.description}'.";

  # evalModules gives to `to` what is defined at `from`, with its properties.
  mkAliasOptionModule = from: to: { config, options, ... }: {
    _alias = { inherit from to; };
    options = setAttrByPath from (mkOption {
      inherit (getAttrFromPath to options) type;
      description = "Alias of {option}`${showOption to}`.";
      apply = _: getAttrFromPath to config;
    });
  };

  lib = {
    inherit
      all any attrNames attrValues concatLists concatMap concatStringsSep elem elemAt filter foldl' genList head isAttrs isBool isDerivation
      isFunction isInt isList isString last length listToAttrs mapAttrs removeAttrs tail
      evalModules filterAttrs genAttrs getAttrFromPath hasPrefix isOption literalExpression mapAttrs' mapAttrsToList mkAliasOptionModule
      mkDefault mkEnableOption mkForce mkIf mkMerge mkOption mkOptionDefault mkOverride nameValuePair optional optionalAttrs optionalString
      optionals removePrefix setAttrByPath showOption splitString types unique;
    concatStrings = concatStringsSep "";
    getExe = package: "${package}/bin/${package.meta.mainProgram or package.pname}";
    getExe' = package: name: "${package}/bin/${name}";
    getName = package: package.pname;
    escapeShellArg = text: "'${builtins.replaceStrings [ "'" ] [ "'\\''" ] (toString text)}'";
    boolToString = x: if x then "true" else "false";
    id = x: x;
  };
in
lib
