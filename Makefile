# Every target does one thing. `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help run setup setup-dev test check lint imports types unit compiled unit-compiled model e2e simulation soak edge fuzz bench docs fmt dist clean
export PYTHONSAFEPATH := 1
# Without its cache pytest rewrites every assertion again, in each of its processes.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
SETUP := deploy/setup.sh deploy/model.txt pyproject.toml constraints.txt
TESTS := $(BIN)/python -m pytest -q
COMPILED := build/compiled
IN_COMPILED := PYTHONPATH=$(CURDIR)/$(COMPILED)

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

run: setup ## Start a router and two replicas, and show a request coming home (ARGS="...")
	@$(BIN)/roost up $(ARGS)

setup: .venv/.engine ## Make .venv with all that `make run` needs

setup-dev: .venv/.dev ## Make .venv with all that tests and linters need

.venv/.engine: $(SETUP)
	@deploy/setup.sh engine

.venv/.dev: $(SETUP)
	@deploy/setup.sh dev && touch .venv/.engine

test: check unit-compiled model e2e simulation ## All tests: what CI runs

check: lint imports types unit ## The quick loop: linters, types, unit tests

lint: setup-dev ## ruff
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .

imports: setup-dev ## import-linter: who may import whom, what must stay pure
	@$(BIN)/lint-imports --no-cache --no-logo

types: setup-dev ## mypy --strict
	@$(BIN)/mypy

unit: setup-dev ## Tests without the real model
	@$(TESTS) -n auto --dist worksteal -m "not model and not e2e and not simulation"

$(COMPILED)/.done: $(shell find router -name '*.py') .venv/.dev deploy/compile_router.py
	@rm -rf build/wheel $(COMPILED)
	@echo "compiling the router's data path, as an install does"
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	@$(BIN)/python -m pip install --quiet --no-deps --target $(COMPILED) build/wheel/*.whl
	@! command -v cc >/dev/null || $(IN_COMPILED) $(BIN)/python -c "from roost_router.compiled import is_compiled; assert is_compiled(), 'the data path did not compile'"
	@cd $(COMPILED) && rm -r roost_engine roost_kernels roost_loadtest && touch .done  # the tree's own serve

compiled: $(COMPILED)/.done ## Make build/compiled: the router as an install has it

unit-compiled: $(COMPILED)/.done ## The router's unit tests once more, with that
	@$(IN_COMPILED) $(TESTS) -n auto --dist worksteal -m "not interpreted and not simulation" tests/router tests/wire

model: setup-dev ## Tests of the engine with the real model
	@$(TESTS) -m "model and not e2e"

e2e: $(COMPILED)/.done ## Tests with real processes: router (compiled), two engines, the openai SDK
	@$(IN_COMPILED) $(TESTS) -m e2e

simulation: $(COMPILED)/.done ## The router in virtual time: planted bugs are noticed, 60 s of random faults
	@$(TESTS) -m simulation && $(IN_COMPILED) $(BIN)/python -m roost_loadtest.simulation

soak: $(COMPILED)/.done ## The same random faults for SECONDS (3600) of CPU; a failure tells how to replay it
	@$(IN_COMPILED) $(BIN)/python -m roost_loadtest.simulation --seconds $(or $(SECONDS),3600) --first-seed 1000000

edge: setup-dev ## Suites of others against the router: openai-python's tests, slowhttptest
	@$(BIN)/roost bench edge

fuzz: setup-dev ## Fuzz every parser, each for SECONDS (60); guided by coverage with `pip install atheris`
	@$(BIN)/python tests/fuzz/fuzz.py $(or $(SECONDS),60)

bench: $(COMPILED)/.done ## Benchmarks, each a table with a ratio; nothing else may run beside them
	@export $(IN_COMPILED) && for part in ttft decide proxy; do $(BIN)/python -m roost bench $$part || exit; done

docs: setup-dev ## Regenerate docs/options.md from the command line
	@$(BIN)/python -m roost.options >docs/options.md

fmt: setup-dev ## Format and fix what can be fixed mechanically
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .

dist: setup-dev ## Build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove all that was built, .venv included
	@rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
