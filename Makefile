# Everything runs in .venv, which `make setup` makes with the tested versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo check test format

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/headstart demo

check: setup  # format, lint, types, import directions, laws and units: under 90 seconds
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit tests/laws

test: check  # everything that needs no GPU
	$(BIN)/python -m pytest -q tests/e2e

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
