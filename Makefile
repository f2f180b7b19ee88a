# Every target sets itself up: a virtual environment in .venv, vLLM for the machine it finds, this package.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := $(VENV)/bin
MODEL ?=
FORMAT ?= oscar-int2
MINUTES ?= 10
MODEL_FLAG = $(if $(MODEL),--model $(MODEL))
# Two processes, a file in one of them: engines and interpreted kernels are mostly single-threaded. In the order of their
# names: by default files of few tests come last, and those are the engines, which then leave one process idle.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-gpu soak docs lint format bench clean

demo: $(VENV)/.demo
	$(BIN)/kvcompress demo $(MODEL_FLAG) --kv-cache-dtype $(FORMAT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not long"

# What takes minutes: a soak, two workers or engines against one, an engine compiled by Inductor.
test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long

# Everything that runs on a GPU; elsewhere tests/gpu is skipped with the reason and the others are interpreted.
test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -rs tests/gpu tests/triton_kernels tests/attention

# Every night: mixed load on one server, which must not leak and must answer alike to its end. MINUTES=60 for an hour.
soak: $(VENV)/.dev
	$(BIN)/python benchmarks/episodic_soak.py --minutes $(MINUTES) --random-weights $(MODEL_FLAG) \
	  --json build/soak.json --logs build

# The site is build/docs/index.html; warnings are errors.
docs: $(VENV)/.dev
	$(BIN)/python docs/settings_reference.py
	$(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a GPU: kernels, store, prefill and a whole engine, against vLLM's own. On a CPU: the engine.
bench: $(VENV)/.dev
	if nvidia-smi -L >/dev/null 2>&1; then \
	  $(BIN)/python benchmarks/benchmark_decode.py --rotations --triton && $(BIN)/python benchmarks/benchmark_store.py && \
	  $(BIN)/python benchmarks/benchmark_prefill.py && $(BIN)/python benchmarks/benchmark_engine.py && \
	  $(BIN)/python benchmarks/benchmark_eviction.py; \
	else \
	  $(BIN)/python -c "from pathlib import Path; from vllm_kvcompress.demo.model import fetch_demo_model; fetch_demo_model(Path('.demo/smollm2-135m'))" && \
	  { test -f .demo/smollm2-135m/kvcompress/rotation.safetensors || $(BIN)/kvcompress calibrate .demo/smollm2-135m; } && \
	  $(BIN)/python benchmarks/benchmark_engine.py --model .demo/smollm2-135m --formats auto,oscar-int2,hadamard-int2 \
	    --batches 4 --contexts 1024 --share 0 --rounds 3 --chunk 2048 --capacity-lengths 8192; \
	fi

clean:
	rm -rf $(VENV) .demo build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, found {sys.version}"'
	$(PYTHON) -m venv $(VENV)

# The environment for development holds all that the demo needs.
$(VENV)/.demo: $(BIN)/python pyproject.toml docker/install.sh
	test -f $(VENV)/.dev || PYTHON=$(BIN)/python EXTRAS=demo docker/install.sh
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml docker/install.sh
	PYTHON=$(BIN)/python EXTRAS=dev docker/install.sh
	touch $@
