# `make demo` and `make test` need python3 >= 3.11 (with venv) and make, and nothing before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint long clean

demo: $(VENV)/.installed  ## train the demo once; afterwards show what that run found
	@if [ -e runs/digits/run.json ]; then $(BIN)/dpquant train --resume runs/digits; \
	else $(BIN)/dpquant train configs/runs/digits.yaml --out runs/digits; fi

test: $(VENV)/.installed-test  ## the whole default suite
	$(BIN)/python -m pytest -q -n 2

long: $(VENV)/.installed-test  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m long

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python >= 3.11 is needed (PYTHON=... names another)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .mypy_cache .ruff_cache
