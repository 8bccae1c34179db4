# make demo   the whole method on a synthetic data set      make test   all quick tests
# Each target first creates a virtual environment in .venv with the requirements and the project.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Additional arguments of pip, such as --index-url for CPU-only builds of torch.
PIP_ARGS ?=
# Without the experiment trackers, which would bring fifty packages to every installation.
PINNED_EXTRAS := cuhk03 timm onnx lpips completion
TEST_WORKERS ?= 2
PYTEST_ARGS ?=
ARGS ?=

.PHONY: help setup test slow test-lowest lint format constraints audit demo demo-compare attack benchmark docs clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv, unless it exists

$(STAMP): requirements.txt requirements-dev.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 | grep ^Python || echo missing); expected Python 3.10 or newer:" \
	       "install one and run make PYTHON=python3.12 $(or $(MAKECMDGOALS),setup)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu:" \
	       "apt-get install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV): torch and its libraries take several gigabytes."
	@# pip unpacks in TMPDIR. /tmp is often in memory and too small for torch.
	@mkdir -p $(VENV)/tmp
	@TMPDIR="$(abspath $(VENV)/tmp)" $(BIN)/python -m pip install --disable-pip-version-check \
	  --progress-bar off --quiet $(PIP_ARGS) -r requirements.txt -r requirements-dev.txt || { \
	  rm -rf $(VENV)/tmp; df -h $(VENV) >&2; \
	  echo "error: the packages were not installed (reason above); with CUDA they need about 10 GB of" \
	       "disk, less without: make PIP_ARGS='--extra-index-url" \
	       "https://download.pytorch.org/whl/cpu' $(or $(MAKECMDGOALS),setup)" >&2; exit 2; }
	@rm -rf $(VENV)/tmp
	@touch $@

test: setup ## run the quick tests
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

slow: setup ## run the tests marked slow
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-lowest: ## run the quick tests with the oldest supported versions (needs python3.10)
	@mkdir -p build
	grep -hoE '[a-z0-9-]+>=[0-9.]+' requirements.txt setup.py | sed 's/>=/==/' > build/lowest.txt
	$(MAKE) test PYTHON=python3.10 VENV=.venv-lowest PIP_ARGS="-c build/lowest.txt"

lint: setup ## run ruff, ruff format and mypy, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## fix and format the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: setup ## pin the installed versions with hashes in constraints.txt (needs uv)
	@mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[^ ;]*//' | \
	  sed -E "s/$$/ ; python_version >= '3.11'/" > build/tested.txt
	uv pip compile setup.py $(addprefix --extra ,$(PINNED_EXTRAS)) --universal --python-version 3.10 --generate-hashes \
	  --no-annotate --custom-compile-command "make constraints" --quiet \
	  --constraint build/tested.txt --output-file constraints.txt
	sed -i -E "s/ and (platform_machine|platform_python_implementation|sys_platform|implementation_name) [!=]= '[A-Za-z0-9_]+'//g" \
	  constraints.txt

audit: ## report known vulnerabilities of constraints.txt (needs pip-audit and the network)
	pip-audit --strict --require-hashes --disable-pip --requirement constraints.txt

demo: setup ## train and test the full method on drawn people (prints the expected time)
	$(BIN)/python tools/demo.py $(ARGS)

demo-compare: setup ## compare base, without and full (three times as long)
	$(BIN)/python tools/demo.py --compare $(ARGS)

attack: setup ## attack the model of the demo (a few minutes; after make demo)
	$(BIN)/python tools/attack.py --checkpoint demo/full --output demo/attacks \
	  --budget 256 --epochs 8 --people 16 $(ARGS)

benchmark: setup ## measure speed and memory: make benchmark ARGS=step
	$(BIN)/python tools/benchmark.py $(ARGS)

docs: setup ## build the documentation site in build/site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo "Open build/site/index.html"

clean: ## remove caches and build output, but no results, data or .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## also remove the virtual environments
	rm -rf .venv .venv-lowest
