# A virtual environment as bin/setup makes it, of one set of the wheels in wheels.json and of our own sources: the whole
# of it in venv/, and in bin/ our commands alone, so that nobody gets its python by installing hyperhive.
{ pkgs }:
{
  pname,
  set,
  sources ? [ ],
  scripts ? { },
  mainProgram ? pname,
}:
let
  inherit (pkgs) lib;
  inherit (pkgs.stdenv.hostPlatform) system;
  table = builtins.fromJSON (builtins.readFile ./wheels.json);
  python = pkgs.${"python" + builtins.replaceStrings [ "." ] [ "" ] table.python};
  site = "$out/venv/lib/python${table.python}/site-packages";

  wheel =
    {
      pname,
      version,
      files,
      ...
    }:
    let
      file = files.any or files.${system};
    in
    pkgs.fetchPypi {
      inherit pname version;
      inherit (file)
        python
        abi
        platform
        sha256
        ;
      dist = file.python;
      format = "wheel";
    };

  versionFile = builtins.readFile ../hive_core/version.py;

  # Only what is named is read, so that a change of the documents builds nothing anew.
  root = ../.;
  tree = builtins.path {
    name = "hyperhive-source";
    path = root;
    filter =
      path: _:
      let
        relative = lib.removePrefix (toString root + "/") path;
      in
      lib.any (
        name: relative == name || lib.hasPrefix (name + "/") relative || lib.hasPrefix (relative + "/") name
      ) sources;
  };

  # Nobody can write beside them later, so they would be compiled at each start.
  compiled = map (source: "${site}/${source}") sources;

  script =
    name: target:
    let
      module = builtins.head (lib.splitString ":" target);
    in
    ''
      printf '#!%s -P\nimport sys\nfrom ${module} import main\nsys.exit(main())\n' "$out/venv/bin/python" > $out/bin/${name}
      chmod 755 $out/bin/${name}
    '';
in
pkgs.stdenv.mkDerivation {
  inherit pname;
  version = lib.head (builtins.match ".*__version__ = \"([0-9.a-z]+)\".*" versionFile);
  dontUnpack = true;
  nativeBuildInputs = [
    python.pkgs.pip
    pkgs.autoPatchelfHook
  ];
  # What compiled wheels expect of a system.
  buildInputs = [ pkgs.stdenv.cc.cc.lib ];
  wheels = map wheel (lib.filter (one: lib.elem set one.sets) table.wheels);
  installPhase = ''
    ${python}/bin/python -m venv --without-pip $out/venv
    mkdir wheels $out/bin
    for wheel in $wheels; do cp $wheel wheels/$(stripHash $wheel); done
    pip --python $out/venv/bin/python install --no-index --no-deps --no-warn-script-location wheels/*.whl
  ''
  + lib.optionalString (sources != [ ]) ''
    cp -r ${tree}/. ${site}/
    chmod -R u+w ${site}
    $out/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash ${toString compiled}
  ''
  + lib.concatStrings (lib.mapAttrsToList script scripts);
  meta = {
    inherit mainProgram;
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
  };
}
