# Everything on a fresh machine with Python 3.11: `make demo` and `make test` do their own set-up.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test test-ranks check lint format clean

demo: .venv/.base
	$(BIN)/python tools/demo.py demo

test: .venv/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

test-ranks: .venv/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist

check: lint
	$(BIN)/lint-imports --no-cache

lint: .venv/.all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.all
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo build dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.base: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.all: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[all]'
	touch $@ .venv/.base
