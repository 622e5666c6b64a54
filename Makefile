# make sweep   set up and run the default sweep        make test   set up and run lint, types and the tests
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= auto
comma := ,

ifneq ($(filter-out auto cpu cuda,$(TORCH)),)
$(error TORCH=$(TORCH): want cpu or cuda)
endif

.PHONY: FORCE help setup sweep test lint types tests test-slow test-faults test-doctor \
	test-cluster test-gpu test-kernels gpu doctor-matrix clean
help:
	@echo "make sweep | test | test-slow | test-faults | test-doctor | test-cluster | test-gpu | test-kernels | \
	gpu | doctor-matrix | clean"

setup: $(READY)

# torch first and alone: its CPU and CUDA builds are different wheels (tools/install_torch.py says
# which it takes; make setup TORCH=cpu or TORCH=cuda forces one).
$(READY): pyproject.toml constraints.txt tools/install_torch.py
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import sys; \
		sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/install_torch.py $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev,dashboard]'
	touch $@

ifneq ($(TORCH),auto)
$(READY): FORCE
endif
FORCE:

sweep: setup
	$(BIN)/python -m flowray.tune sweeps/head.yaml $(ARGS)

test: lint types tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Threads are pinned: two test workers with a pool of threads each would fight over two cores.
QUICK := $(BIN)/python -m pytest -n 2 --dist loadfile \
	-m "not slow and not gpu and not faults and not doctor and not cluster"
tests: setup
	OMP_NUM_THREADS=1 $(QUICK) $(ARGS)

test-slow test-faults test-doctor test-cluster test-gpu: test-%: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $* --timeout 1800 $(ARGS)

# Other processors add the same numbers in other orders. Here the tests of whatever computes run with
# other kernels of MKL, of torch, and of oneDNN and OpenBLAS (numpy's): no outcome may hang on them.
NUMERIC := $(addprefix tests/,config data doctor findings flow losses model probes sample store train) \
	tests/tune/test_rounding.py
KERNELS := MKL_CBWR=COMPATIBLE ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 \
	ONEDNN_MAX_CPU_ISA=SSE41,OPENBLAS_CORETYPE=Prescott
test-kernels: $(addprefix kernels-,$(KERNELS))
kernels-%: setup
	env $(subst $(comma), ,$*) OMP_NUM_THREADS=1 $(QUICK) $(NUMERIC) $(ARGS)

# docs/benchmarks/gpu.md: tests and measurements of one GPU, in eight minutes and without Ray. Where
# there is no .venv the python3 at hand serves, with torch, transformers, diffusers, einops,
# pydantic, webdataset, tensorboardX, pytest and pytest-timeout.
gpu: GPU_PYTHON := $(or $(wildcard $(BIN)/python),python3)
gpu:
	$(GPU_PYTHON) -m pytest -m gpu tests/gpu
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

# docs/benchmarks/doctor.md: what the doctor makes of every planted fault; about a minute a fault.
doctor-matrix: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/doctor_matrix.py $(ARGS)

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
