# As much of nixpkgs' packages as our files name. Every package is a derivation that was never built.
{ lib, system, config ? { } }:
let
  fake = pname: attrs: derivation ({ name = "${pname}-0"; inherit system; builder = "/bin/sh"; args = [ "-c" ": > $out" ]; })
    // { inherit pname; version = "0"; meta.mainProgram = pname; } // attrs;
  # Takes what the real one takes and keeps what can be read of it; `drv` says that nothing was made.
  build = attrs:
    let drv = derivation { name = attrs.name or "${attrs.pname}-${attrs.version}"; inherit system; builder = "/bin/sh"; args = [ "-c" (attrs.installPhase or attrs.text or "") ]; }; in
    attrs // drv // { meta = attrs.meta or { }; passthru = attrs.passthru or { }; given = attrs; };
  unfree = package: if (config.allowUnfreePredicate or (_: false)) package then package else throw "Package `${package.pname}' has an unfree license, refusing to evaluate.";
  pkgs = {
    inherit lib system config;
    stdenv = { mkDerivation = build; hostPlatform = { inherit system; }; cc.cc.lib = fake "gcc-lib" { }; };
    python313 = fake "python3" { pkgs.pip = fake "pip" { }; executable = "python3.13"; sitePackages = "lib/python3.13/site-packages"; };
    fetchPypi = { pname, version, format, dist, python, abi, platform, sha256 }:
      build { name = "${pname}-${version}-${python}-${abi}-${platform}.whl"; inherit pname version format dist sha256; };
    writeText = name: text: build { inherit name text; } // { outPath = builtins.toFile name text; };
    writeShellScriptBin = name: text: build { inherit name text; };
    writeShellScript = name: text: builtins.toFile name (builtins.unsafeDiscardStringContext text);
    runCommand = name: attrs: text: build (attrs // { inherit name text; });
    mkShell = attrs: build ({ name = "shell"; } // attrs);
    formats.toml = _: {
      type = lib.types.attrsOf lib.types.anything // { description = "TOML value"; };
      generate = name: value: build { inherit name; text = builtins.toJSON value; } // { inherit value; };
    };
    testers.runNixOSTest = module: build { name = "vm-test"; inherit module; };
    claude-code = unfree (fake "claude-code" { meta.mainProgram = "claude"; });
  } // lib.genAttrs [ "autoPatchelfHook" "bash" "bubblewrap" "coreutils" "git" "gnumake" "jq" "librsvg" "nix" "nixfmt" "openssh" "ripgrep" "strace" "systemd" "taplo" "uv" ]
    (name: fake name { });
in
pkgs
