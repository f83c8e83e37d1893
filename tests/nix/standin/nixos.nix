# As much of NixOS as our modules set: options that hold what they are given, and the assertions' check.
{ lib, pkgsFor }:
{ modules, system ? null, specialArgs ? { } }:
let
  inherit (lib) mkOption types;
  bag = description: mkOption { inherit description; type = types.attrsOf types.anything; default = { }; };
  flag = mkOption { type = types.bool; default = false; };
  inherit (builtins) mapAttrs;
  hash = value: builtins.hashString "sha256" (builtins.unsafeDiscardStringContext (builtins.toJSON value));
  list = mkOption { type = types.listOf types.unspecified; default = [ ]; };
  base = { config, lib, ... }: {
    options = {
      assertions = list;
      warnings = list;
      boot.isContainer = flag;
      boot.isNspawnContainer = flag;
      boot.enableContainers = flag;
      environment.etc = bag "files of /etc";
      environment.systemPackages = list;
      environment.variables = bag "variables of every shell";
      fileSystems = bag "file systems";
      networking = {
        hostName = mkOption { type = types.str; default = ""; };
        useDHCP = flag;
        nameservers = list;
        firewall = bag "firewall";
        interfaces = bag "interfaces";
      };
      documentation.enable = flag;
      nix.enable = flag;
      nix.settings = bag "nix.conf";
      nix.package = mkOption { type = types.package; };
      nixpkgs.config = bag "configuration of nixpkgs";
      nixpkgs.hostPlatform = mkOption { type = types.str; default = if system == null then throw "no system" else system; };
      security.wrappers = bag "programs with rights of their own";
      specialisation = bag "other configurations of the machine";
      system.activationScripts = bag "what puts a system together";
      system.stateVersion = mkOption { type = types.str; };
      system.build.toplevel = mkOption { type = types.unspecified; };
      systemd = {
        services = bag "services";
        units = bag "units, as they are written";
        user.units = bag "units of users";
        mounts = list;
        slices = bag "slices";
        tmpfiles.rules = list;
      };
      virtualisation = bag "virtual machines";
      users.users = bag "users";
      users.groups = bag "groups";
    };
    config = {
      # As NixOS, which has files, units and scripts that other packages make others of.
      environment.etc."dbus-1".source = "/dbus/${hash (map toString config.environment.systemPackages)}";
      system.activationScripts.script = "setup-etc ${hash (mapAttrs (_: file: file.source or (file.text or "")) config.environment.etc)}";
      systemd.units = { "dbus.service".text = config.environment.etc."dbus-1".source; } // lib.mapAttrs' (name: unit: lib.nameValuePair "${name}.service" { text = builtins.toJSON (unit.serviceConfig or { }); }) config.systemd.services;
      nix.package = lib.mkDefault (pkgsFor config.nixpkgs.hostPlatform config.nixpkgs.config).nix;
      _module.args.pkgs = lib.mkDefault (pkgsFor config.nixpkgs.hostPlatform config.nixpkgs.config);
      system.build.toplevel =
        let failed = builtins.filter (one: !one.assertion) config.assertions; in
        if failed != [ ] then throw "Failed assertions:\n${builtins.concatStringsSep "\n" (map (one: "- ${one.message}") failed)}"
        else derivation {
          name = "nixos-system";
          system = config.nixpkgs.hostPlatform;
          builder = "/bin/sh";
          args = [ "-c" (builtins.readFile ./toplevel.sh) ];
          path = config.environment.systemPackages;
          script = config.system.activationScripts.script;
          units = builtins.unsafeDiscardStringContext (builtins.toJSON (builtins.mapAttrs (_: unit: unit.serviceConfig or { }) config.systemd.services));
        };
    };
  };
in
lib.evalModules { modules = [ base ] ++ modules; inherit specialArgs; }
