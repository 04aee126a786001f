PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint bench

help:
	@echo "make demo   the whole job on data it makes itself: train, evaluate, draw, export, report"
	@echo "make test   all tests"
	@echo "make lint   ruff"
	@echo "make bench  time the pooling op on the device at hand"

# The stamp is written last, so an install that fails is repeated.
.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@

demo: .venv/.installed
	$(BIN)/python benchmarks/throughput.py --quick --out runs/demo/throughput
	$(BIN)/mvam-fast demo --out runs/demo --throughput runs/demo/throughput/throughput.json

test: .venv/.installed
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .

bench: .venv/.installed
	$(BIN)/python benchmarks/throughput.py
