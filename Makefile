# Every target sets up what it needs: `make serve` works as the only command on a fresh machine with
# Python 3.11 and pip. VENV, PYTHON, HOST, PORT, ARGS can be set on the command line.
VENV ?= .venv
PYTHON ?= python3.11
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin

# Waiting OpenMP threads sleep instead of spinning, so that a busy neighbour does not stall the engine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help serve test test-all lint format bench clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.serve: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

serve: $(VENV)/.serve ## serve the shipped model on $(HOST):$(PORT)
	$(BIN)/dape serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/.dev ## run the fast tests
	$(BIN)/pytest -n 2 -m "not slow and not browser and not gpu" $(ARGS)

test-all: $(VENV)/.dev ## run every test, the slow ones too
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.dev ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## measure prefill, decode and memory on this machine
	$(BIN)/python benchmarks/long_context.py $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
