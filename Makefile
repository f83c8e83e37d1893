# The short ways. Each does all of its own set-up first; what the set-up says goes to stderr, and make itself says
# nothing, so that stdout is the command's alone. (Before GNU make 4.4.1, `make -C` names the directory all the same;
# `make -sC` does not.)
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint bench lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## a rehearsed swarm, from nothing to a merge (ARGS="--once --json")
	@bin/setup run
	@exec .venv/bin/hive demo $(ARGS)

test: ## every test group this machine can run (ARGS="unit git" picks some)
	@bin/setup dev
	@exec .venv/bin/python -m tests.run $(ARGS)

test-long: ## the same with the long runs (HIVE_LONG=1)
	@bin/setup dev
	@HIVE_LONG=1 exec .venv/bin/python -m tests.run $(ARGS)

lint: ## ruff and mypy; all three speak before it fails
	@bin/setup dev
	@rc=0; .venv/bin/ruff check . || rc=1; .venv/bin/ruff format --check . || rc=1; .venv/bin/mypy || rc=1; exit $$rc

bench: ## one measurement as JSON lines (NAME=start)
	@bin/setup dev
	@exec .venv/bin/python -m tests.bench $(NAME)

# hatchling is locked too, because the project itself is installed without build isolation. The dev lock is bound to
# the other one: an environment made for dev serves run as well.
BUILD_NEEDS = .venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])'
COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate $(ARGS)

lock: ## both lock files and nix/wheels.json anew with uv (ARGS=--upgrade takes newer versions)
	@command -v uv >/dev/null || { echo "hyperhive: make lock needs uv, and it is not on PATH." >&2; exit 1; }
	@bin/setup dev
	@$(BUILD_NEEDS) | $(COMPILE) pyproject.toml - -o requirements.lock
	@$(BUILD_NEEDS) | $(COMPILE) pyproject.toml - --group dev -c requirements.lock -o requirements-dev.lock
	@.venv/bin/python nix/wheels.py
