# What of an agent's evaluated configuration the host wants to know, as plain data. Given to nix as text.
#
# The system's derivation is made and not built, so that whatever of a build is evaluation is seen before it. Below
# `facts` a thing that cannot be told is null, since what an agent wrote may throw; `absent` names the option that this
# NixOS does not have. What no evaluation can catch costs all facts: they come last, which is told on the side, and the
# host asks again without them.
config:
let
  inherit (builtins)
    attrNames
    attrValues
    concatMap
    concatStringsSep
    elem
    filter
    foldl'
    isAttrs
    isList
    isString
    listToAttrs
    mapAttrs
    tryEval
    ;
  # A text of whatever can be one. What cannot is thrown: other than an error of nix's own that can be caught.
  plain =
    value:
    if isString value then
      builtins.unsafeDiscardStringContext value
    else if isAttrs value then
      if value ? outPath || value ? __toString then plain (toString value) else throw "no text"
    else if isList value then
      concatStringsSep " " (map plain value)
    else if builtins.isFunction value then
      throw "no text"
    else
      toString value;
  mark = value: builtins.substring 0 16 (builtins.hashString "sha256" (plain value));
  known =
    value:
    let
      tried = tryEval (builtins.deepSeq value value);
    in
    if tried.success then tried.value else null;
  only = keep: attrs: removeAttrs attrs (filter (name: !keep attrs.${name}) (attrNames attrs));
  enabled = only (one: one.enable or true);
  prefixed =
    prefix: attrs:
    listToAttrs (
      map (name: {
        name = prefix + name;
        value = attrs.${name};
      }) (attrNames attrs)
    );
  has =
    path:
    (foldl'
      (
        found: name:
        if found.there && isAttrs found.value && found.value ? ${name} then
          found // { value = found.value.${name}; }
        else
          { there = false; }
      )
      {
        there = true;
        value = config;
      }
      path
    ).there;
  # Each thing with the option that it is told from.
  told = {
    packages = {
      of = [
        "environment"
        "systemPackages"
      ];
      value = map (package: {
        name = plain (package.name or package);
        mark = mark (package.drvPath or package);
        paths =
          map (output: plain (package.${output} or package)) (package.meta.outputsToInstall or [ ])
          ++ [
            (plain package)
          ];
      }) config.environment.systemPackages;
    };
    services = {
      of = [
        "systemd"
        "units"
      ];
      value = mapAttrs (
        _: unit:
        mark [
          (unit.text or null)
          (unit.enable or true)
          # Links that are made beside its text.
          (unit.wantedBy or [ ])
          (unit.requiredBy or [ ])
          (unit.upheldBy or [ ])
          (unit.aliases or [ ])
          (unit.overrideStrategy or null)
        ]
      ) (config.systemd.units // prefixed "user: " (config.systemd.user.units or { }));
    };
    etc = {
      of = [
        "environment"
        "etc"
      ];
      value = mapAttrs (
        _: entry:
        mark [
          (entry.source or (entry.text or ""))
          (entry.target or "")
          (entry.mode or "")
          (entry.user or "")
          (entry.group or "")
        ]
      ) (enabled config.environment.etc);
    };
    # Whatever else of a system is written as a script: what starts it, and what puts it together.
    scripts = {
      of = [
        "system"
        "activationScripts"
      ];
      value = mark (
        map (text: "${plain text}\n") [
          (config.system.activationScripts.script or "")
          (config.system.systemBuilderCommands or (config.system.extraSystemBuilderCmds or ""))
          (config.environment.extraSetup or "")
        ]
      );
    };
    users = {
      of = [
        "users"
        "users"
      ];
      value =
        let
          groups = enabled (config.users.groups or { });
          groupsOf =
            name: user:
            filter (group: group != (user.group or "") && elem name (groups.${group}.members or [ ])) (
              attrNames groups
            );
          others = list: filter (group: !elem group list);
        in
        mapAttrs (
          name: user:
          let
            extra = map plain (user.extraGroups or [ ]);
          in
          extra
          ++ others extra (groupsOf name user)
          ++ (if name != "root" && (user.uid or null) == 0 then [ "as root" ] else [ ])
        ) (enabled config.users.users);
    };
    setuid = {
      of = [
        "security"
        "wrappers"
      ];
      value =
        if config.security.enableWrappers or true then
          mapAttrs (_: wrapper: {
            setuid = wrapper.setuid or false;
            setgid = wrapper.setgid or false;
            capabilities = plain (wrapper.capabilities or "");
            owner = plain (wrapper.owner or "root");
            group = plain (wrapper.group or "root");
            permissions = plain (wrapper.permissions or "u+rx,g+x,o+x");
            program = mark (wrapper.source or "");
          }) (enabled config.security.wrappers)
        else
          { };
    };
    capabilities = {
      of = [
        "systemd"
        "services"
      ];
      value = mapAttrs (_: service: plain service.serviceConfig.AmbientCapabilities) (
        only (service: service ? serviceConfig.AmbientCapabilities) (enabled config.systemd.services)
      );
    };
    network = {
      of = [
        "networking"
        "firewall"
      ];
      value =
        let
          inherit (config.networking) firewall;
          places = [
            {
              on = "";
              rules = firewall;
            }
          ]
          ++ map (name: {
            on = " on ${name}";
            rules = firewall.interfaces.${name};
          }) (attrNames (firewall.interfaces or { }));
          range = ports: "${plain ports.from}-${plain ports.to}";
          opened =
            protocol:
            concatMap (
              place:
              map (port: "${port}${place.on}") (
                map plain (place.rules."allowed${protocol}Ports" or [ ])
                ++ map range (place.rules."allowed${protocol}PortRanges" or [ ])
              )
            ) places;
          asking = filter (one: (one.useDHCP or null) == true) (
            attrValues (config.networking.interfaces or { })
          );
        in
        {
          firewall = firewall.enable or false;
          dhcp = config.networking.useDHCP or false || asking != [ ];
          tcp = opened "TCP";
          udp = opened "UDP";
          trusted = filter (name: name != "lo") (map plain (firewall.trustedInterfaces or [ ]));
          nameservers = map plain (config.networking.nameservers or [ ]);
        };
    };
    programs = {
      of = [ "hyperhive" ];
      value = map plain (
        [ (config.hyperhive.package.name or "") ]
        ++ (
          if config.hyperhive.claude.enable or false then
            [ (config.hyperhive.claude.package.name or "") ]
          else
            [ ]
        )
      );
    };
  };
  asked = {
    inherit (config.hyperhive) settings persona role;
    mounts =
      filter (path: path != "/") (attrNames config.fileSystems)
      ++ map (mount: mount.where or "?") (
        filter (mount: builtins.substring 0 1 (mount.what or "") == "/") (config.systemd.mounts or [ ])
      );
    system = plain config.system.build.toplevel.outPath;
    derivation = plain config.system.build.toplevel.drvPath;
  };
  facts = mapAttrs (_: one: if known (has one.of) == true then known one.value else null) told // {
    absent = mapAttrs (_: one: concatStringsSep "." one.of) (
      only (one: known (has one.of) == false) told
    );
  };
in
asked // { facts = builtins.deepSeq asked (builtins.trace "hyperhive: facts" facts); }
