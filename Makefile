# One environment for everything: .venv, made on first use.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all check fix clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Merge a long and a short reasoner, verify, measure accuracy and answer length; then merge, prune and quantize by a recipe.
demo: $(VENV)/.ready
	$(BIN)/python benchmarks/long_to_short/run.py --output demo-output

test: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n auto -m "not slow"

test-all: $(VENV)/.ready
	$(BIN)/python -m pytest -q -n auto

# Everything a change must pass besides the tests.
check: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

fix:
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
