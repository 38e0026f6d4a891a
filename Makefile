# Everything runs in .venv, which `make setup` makes with the tested versions of constraints.txt; the bench has its own.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
# Some tests have two threads on a worker's one core: these must not wait for each other by turning in circles.
TEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: setup demo check test format bench bench-peers

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/headstart demo

check: setup  # format, lint, types, import directions, laws and units: about three minutes
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(TEST) tests/unit tests/laws

test: check  # everything that needs no GPU
	$(TEST) tests/e2e

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: bench/.venv/ready  # headstart beside its peers, and docs/benchmarks.md from it: well over an hour on two cores
	bench/.venv/bin/python -m bench $(BENCH)

bench/.venv/ready: pyproject.toml constraints.txt bench/constraints.txt
	$(PYTHON) -m venv bench/.venv
	bench/.venv/bin/python -m pip install --quiet -c constraints.txt -c bench/constraints.txt \
		torch==2.13.0 -e . trl==1.16.0 accelerate datasets
	touch $@

bench-peers:  # peers whose pins clash with ours, each in an environment of its own
	$(PYTHON) -m venv bench/.venv-litgpt
	bench/.venv-litgpt/bin/python -m pip install --quiet torch==2.13.0 litgpt==0.5.13
