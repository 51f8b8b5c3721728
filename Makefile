# noria: `make demo` and `make test` need Python 3.11+ and nothing else; both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: setup demo up test unit lint bench bench-serving soak clean

# The lock is the tested set. torch comes first and by its exact version: on Linux a bare `torch` may bring CUDA's gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt tests/clients.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "noria needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the tested set into $(VENV) (about 3 minutes and 3 GB, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/clients.txt
	@touch $@

setup: $(VENV)/.installed

demo: setup
	@$(BIN)/noria demo $(ARGS)

up: setup
	@$(BIN)/noria up

test: setup lint
	@$(BIN)/python -m tests.side_by_side $(ARGS)

unit: setup
	@$(BIN)/python -m pytest tests/unit $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup
	@for one in export training; do $(BIN)/python -m benchmarks.$$one || exit 1; done

# Peers are installed into ~/.cache/noria/peers (3.5 GB, once); needs wrk. Leave the machine alone meanwhile.
bench-serving: setup
	@$(BIN)/python -m benchmarks.serving --out benchmarks/results $(ARGS)

# 100 swaps under load, 100 kills and 500 slow connections; about half an hour. ARGS="--swaps 3 --kills 2" is the short form.
soak: setup
	@$(BIN)/python -m benchmarks.soak --out benchmarks/results $(ARGS)
	@SOAK=1 $(BIN)/python -m pytest tests/integration/test_protection.py -k 500_slow -rP

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache test-artifacts story
