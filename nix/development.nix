# All that the tests, the checks and the formatters want of Python.
{ pkgs }:
import ./environment.nix { inherit pkgs; } {
  pname = "hyperhive-development";
  set = "dev";
}
