# make sweep   set up and run the default sweep        make test   set up and run lint, types and the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup sweep test lint types tests test-slow test-faults test-doctor test-cluster test-gpu doctor-matrix clean
help:
	@echo "make sweep | test | test-slow | test-faults | test-doctor | test-cluster | test-gpu | doctor-matrix | clean"

setup: $(READY)

# torch first and alone: the plain PyPI wheel would bring gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

sweep: setup
	$(BIN)/python -m flowray.tune sweeps/head.yaml $(ARGS)

test: lint types tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Threads are pinned: two test workers with a pool of threads each would fight over two cores.
tests: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		-m "not slow and not gpu and not faults and not doctor and not cluster" $(ARGS)

test-slow test-faults test-doctor test-cluster test-gpu: test-%: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $* --timeout 1800 $(ARGS)

# docs/benchmarks/doctor.md: what the doctor makes of every planted fault; about a minute a fault.
doctor-matrix: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/doctor_matrix.py $(ARGS)

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
