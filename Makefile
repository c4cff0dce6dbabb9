# Each target does all its set-up, in .venv; needed are Python 3.11 or newer, pip and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow lint large paper peers sanitize

demo: .venv/run
	$(BIN)/python -m snakemake --cores all

PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --durations 15

test: .venv/test
	$(PYTEST) -m "not slow and not large"

slow: .venv/test
	$(PYTEST) -m "slow and not large"

large: .venv/test
	$(BIN)/python -m pytest -q -s -m large

# the GPU's kernels as nvcc makes them, instruction by instruction: ten minutes
paper: .venv/test
	$(PYTEST) --paper -m "not gpu" tests/kernel/test_gpu.py tests/kernel/test_passes.py

peers: .venv/test
	$(BIN)/python -m benchmarks.peers rwkv rwkv7-hf

sanitize: .venv/test
	$(BIN)/python -m benchmarks sanitize

lint: .venv/test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m snakefmt --check Snakefile workflow
	$(BIN)/python -m snakemake --lint

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml envs/constraints.txt
	$(BIN)/python -m pip install --quiet -c envs/constraints.txt -e .
	touch $@

.venv/test: .venv/bin/python pyproject.toml envs/constraints.txt
	$(BIN)/python -m pip install --quiet -c envs/constraints.txt -e '.[test]'
	touch $@
