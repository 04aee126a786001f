PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 9

.PHONY: help demo test test-all lint bench ablation gpu trt-check

help:
	@echo "make demo   the whole job on data it makes itself: train, evaluate, draw, export, report"
	@echo "make test   the tests"
	@echo "make test-all   and the slow ones"
	@echo "make lint   ruff"
	@echo "make ablation  trainings on the scenes that show what does what, hours on a CPU; goes on where it was stopped"
	@echo "make bench  time the pooling op on the device at hand"
	@echo "make trt-check  what needs a GPU with TensorRT: runs it, and says what could not be run"
	@echo "make gpu    tests and benchmarks on a CUDA GPU, without a network, in MINUTES=9; WHEELS=folder, ARGS=..."

# The stamp is written last, so an install that fails is repeated.
.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	# A test evaluates by its retrieval metric, which needs torch and tqdm alone; what the rest of it needs stays away.
	$(BIN)/python -m pip install --quiet --no-deps clip-benchmark==1.6.2
	touch $@

demo: .venv/.installed
	$(BIN)/python benchmarks/throughput.py --quick --out runs/demo/throughput
	$(BIN)/mvam-fast demo --out runs/demo --throughput runs/demo/throughput/throughput.json

# Side by side, one thread each; the tests of a file stay together, for they share what is slow to make.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: .venv/.installed
	$(TESTS)

test-all: .venv/.installed
	$(TESTS) -m ""

lint: .venv/.installed
	$(BIN)/ruff check .

# ARGS: --groups NAME ..., --jobs N, --fresh (trains again what the committed results have)
ablation: .venv/.installed
	$(BIN)/python benchmarks/ablation.py $(ARGS)

bench: .venv/.installed
	$(BIN)/python benchmarks/throughput.py

# With the interpreter that has PyTorch; nothing is fetched.
gpu:
	$(PYTHON) benchmarks/gpu_suite.py --minutes $(MINUTES) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

# TensorRT is not among what is installed: .venv/bin/pip install 'tensorrt>=10.12,!=10.14.*,<12'
trt-check: .venv/.installed
	$(BIN)/python tests/trt_check.py $(ARGS)
