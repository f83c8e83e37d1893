"""`make bench [NAME=group]`: runs a group of measurements, or all of them."""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

import tests.bench
from tests.compiled import compile_packages

GROUPS = sorted(
    module.name.removeprefix("group_")
    for module in pkgutil.iter_modules(tests.bench.__path__)
    if module.name.startswith("group_")
)


def main(names: list[str]) -> int:
    if unknown := [name for name in names if name not in GROUPS]:
        print(f"there is no bench group {unknown[0]!r}; the groups are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    compile_packages()
    for name in names or GROUPS:
        for figure in importlib.import_module(f"tests.bench.group_{name}").measure():
            print(json.dumps(figure), flush=True)
    return 0


sys.exit(main(sys.argv[1:]))
