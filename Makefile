# Every target sets up what it needs: `make serve` works as the only command on a fresh machine with
# Python 3.11 and pip. VENV, PYTHON, HOST, PORT, ARGS can be set on the command line.
VENV ?= .venv
PYTHON ?= python3.11
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := $(VENV)/bin
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
LIBRARY := kernels/dape_kernels/cpu/libdape_cpu.so

# Waiting OpenMP threads sleep instead of spinning, so that a busy neighbour does not stall the engine.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help serve test test-clients test-all sanitize load-test docs reference lint format bench experiments wheel \
	check-wheel image check-image clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# pip shows nothing of a build that goes on without the C++ library, hence the question afterwards.
$(VENV)/.serve: pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@test -f $(LIBRARY) || echo 'No C++ compiler: attention runs in plain PyTorch, several times slower.' \
		'To mend it: apt install g++, then rm -r $(VENV). `$(BIN)/pip install -v -e .` shows the reason.'
	touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

serve: $(VENV)/.serve ## serve the shipped model on $(HOST):$(PORT)
	$(BIN)/dape serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(VENV)/.dev ## run the fast tests
	$(BIN)/pytest -n 2 -m "not slow and not browser and not gpu" $(ARGS)

$(VENV)/.clients: $(VENV)/.dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[clients]'
	touch $@

test-clients: $(VENV)/.clients ## run the tests with large clients (guidellm) and a browser (chromium)
	$(BIN)/pytest -m browser tests/test_playground_browser.py $(ARGS)
	$(BIN)/pytest tests/clients $(ARGS)

test-all: $(VENV)/.clients ## run every test, the slow ones too
	$(BIN)/pytest $(ARGS)

# Python itself is not built for sanitizers, so their library has to be loaded before it. They end the process
# with a message, which pytest must not capture.
sanitize: $(VENV)/.dev ## run the kernel tests with AddressSanitizer and UBSan
	mkdir -p $(VENV)/sanitize
	DAPE_CPU_SANITIZE=address,undefined $(BIN)/python kernels/csrc/build.py $(VENV)/sanitize/libdape_cpu.so
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		DAPE_CPU_LIBRARY=$(VENV)/sanitize/libdape_cpu.so \
		$(BIN)/pytest -n 2 -s -k cpu tests/test_golden.py tests/test_paged_attention.py tests/test_cpu_attention.py \
		tests/test_cpu_decoder.py tests/test_compiled_network.py $(ARGS)

$(VENV)/.docs: $(VENV)/.serve
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs ## build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

reference: $(VENV)/.serve ## write the pages of docs/ that follow from the code
	$(BIN)/python docs/tools/generate_reference.py

load-test: $(VENV)/.dev ## two minutes of load on a server started for it; fails on any failed request
	$(BIN)/python load_tests/smoke.py $(ARGS)

lint: $(VENV)/.dev ## check style, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.serve ## measure kernels, engine and server on this machine
	$(BIN)/dape bench kernels --json benchmarks/results/kernels.json
	$(BIN)/dape bench engine --json benchmarks/results/engine.json $(ARGS)
	$(BIN)/dape bench serve --json benchmarks/results/serve.json

SWEEP ?= train128
CORPUS ?= corpus
WORKERS ?= 2
experiments: $(VENV)/.dev ## train and score the runs of configs/experiments/$(SWEEP).yaml on $(CORPUS); fill docs/results.md
	$(BIN)/dape train --sweep configs/experiments/$(SWEEP).yaml --corpus $(CORPUS) --out runs/$(SWEEP) --workers $(WORKERS)
	$(BIN)/dape evaluate --sweep configs/experiments/$(SWEEP).yaml --corpus $(CORPUS) --runs runs/$(SWEEP) \
		--ends 2 --dtype bfloat16 --collect docs/results $(ARGS)
	$(BIN)/python benchmarks/update_results.py

wheel: ## build the wheel dist/dape_serve-*.whl, with the C++ library inside
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

check-wheel: wheel ## let the wheel serve from an empty environment
	$(PYTHON) deploy/check_wheel.py dist/dape_serve-$(VERSION)-*.whl $(VENV)/check-wheel --port $(PORT)

DEVICE ?= cpu
image: ## build the container image dape-serve:VERSION; DEVICE=cuda for NVIDIA GPUs
	docker build --build-arg DEVICE=$(DEVICE) --tag dape-serve:$(VERSION) .

check-image: ## build the image without Docker (root, buildah, debootstrap) and let it serve
	$(PYTHON) deploy/check_image.py $(VENV)/check-image --port $(PORT)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
