# make demo   the whole method on a synthetic data set      make test   all quick tests
# Each sets itself up first: a virtual environment in .venv with the requirements and the project.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# More for pip, such as --index-url of CPU-only builds of torch.
PIP_ARGS ?=
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=

.PHONY: help setup test slow test-lowest lint format demo demo-compare attack benchmark clean distclean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## make .venv (at once when it is there)

$(STAMP): requirements.txt requirements-dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 | grep ^Python || echo missing); expected Python 3.10 or newer:" \
	       "install one and run make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu:" \
	       "apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV): torch and its libraries are some gigabytes the first time."
	@# pip unpacks in TMPDIR; /tmp is often kept in memory, which torch does not fit.
	@mkdir -p $(VENV)/tmp
	@TMPDIR="$(abspath $(VENV)/tmp)" $(BIN)/python -m pip install --disable-pip-version-check \
	  --progress-bar off --quiet $(PIP_ARGS) -r requirements.txt -r requirements-dev.txt || { \
	  rm -rf $(VENV)/tmp; df -h $(VENV) >&2; \
	  echo "error: the packages were not installed (why: above); with CUDA they need some 10 GB of" \
	       "disk, without GPU less: make PIP_ARGS='--extra-index-url" \
	       "https://download.pytorch.org/whl/cpu' $(or $(MAKECMDGOALS),setup)" >&2; exit 2; }
	@rm -rf $(VENV)/tmp
	@touch $@

test: setup ## run the quick tests
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

slow: setup ## run the tests marked slow
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# The lower bounds of requirements.txt, tried: PYTHON=python3.10, the oldest there is.
test-lowest: ## run the quick tests on the oldest supported versions (needs python3.10)
	@mkdir -p build
	grep -hoE '[a-z0-9]+>=[0-9.]+' requirements.txt setup.py | sed 's/>=/==/' > build/lowest.txt
	$(MAKE) test PYTHON=python3.10 VENV=.venv-lowest PIP_ARGS="-c build/lowest.txt"

lint: setup ## ruff, ruff format and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff mend and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: setup ## train and evaluate the full method on synthetic people (some 7 minutes)
	$(BIN)/python tools/demo.py $(ARGS)

demo-compare: setup ## base, without and with upgradation side by side (some 20 minutes)
	$(BIN)/python tools/demo.py --compare $(ARGS)

attack: setup ## attack what the demo trained, at every level (some minutes; after make demo)
	$(BIN)/python tools/attack.py --checkpoint demo/full --output demo/attacks \
	  --budget 256 --epochs 8 --people 16 $(ARGS)

benchmark: setup ## speed and memory
	$(BIN)/python tools/benchmark.py $(ARGS)

clean: ## remove caches and build output; results, data and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf .venv .venv-lowest
