# make help lists the targets. Everything happens in .venv; PYTHON chooses the Python that it is made with.
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
OUT ?= outputs/gpu
# One process per core with one thread each is faster, and steadier, than torch's threads in one process.
JOBS ?= auto

# What trains with whatever backend is the best one; it is run with the reference too.
WHOLE_RUNS := $(addprefix tests/, \
  test_checkpoint.py test_torch_optim.py test_optimizer.py model/test_models.py fisher/test_learning.py \
  passes/test_gradient_tap.py passes/test_gradient_tap_models.py algebra/test_low_rank.py \
  backends/reference/test_low_rank_steps.py backends/cpu/test_low_rank_training.py)

VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools-installed
INSTALLED := $(VENV)/.package-installed
EXAMPLES := $(VENV)/.examples-installed
DOCS := $(VENV)/.docs-installed
NO_EXTENSION := fishleg_fast/_native_build.txt
BUILD_INPUTS := setup.py CMakeLists.txt fishleg_fast/_version.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)

.DELETE_ON_ERROR:
.PHONY: help setup setup-examples setup-docs docs test lint train train-resnet train-gpt train-ddp convergence bench bench-ops bench-passes bench-gpu wallclock wheel clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(INSTALLED)  ## make .venv and install everything that the other targets need, at the versions that CI tests

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) should be Python 3.10 or newer: make setup PYTHON=python3.12 chooses another" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build's own tools come first, so that the extension is built with the tested ones (no build isolation).
$(TOOLS): constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt setuptools pybind11 cmake ninja
	@touch $@

# Without the extension the package works, but not all tests pass; setup then tries again at the next call.
$(INSTALLED): $(TOOLS) pyproject.toml $(BUILD_INPUTS)
	$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e '.[dev,train,triton]'
	@if [ -e $(NO_EXTENSION) ]; then \
	  echo "The compiled extension was not built: $$(cat $(NO_EXTENSION))" >&2; \
	else touch $@; fi

setup-examples: $(EXAMPLES)  ## what the examples for transformers and Lightning need besides

$(EXAMPLES): $(INSTALLED)
	$(BIN)/python -m pip install --no-build-isolation -c constraints.txt -e '.[examples]'
	@touch $@

setup-docs: $(DOCS)  ## what the documentation needs besides

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install -c constraints.txt 'fishleg_fast[docs]'  # that is there; only the extra's packages come
	@touch $@

docs: setup-docs  ## the documentation as a site that needs no network: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: setup  ## run the tests; PYTEST_ARGS='-k name' for some of them, JOBS=0 for one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS) --backend reference $(WHOLE_RUNS) || [ $$? -eq 5 ]  # 5: -k chose none

lint: setup  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

train: setup  ## train the deep autoencoder, FishLeg beside AdamW; ARGS='--help' for its options
	$(BIN)/python -m benchmarks.train.train_autoencoder $(ARGS)

train-resnet: setup  ## train a ResNet18, FishLeg beside AdamW; ARGS='--help' for its options
	$(BIN)/python -m benchmarks.train.train_resnet $(ARGS)

train-gpt: setup  ## train a small GPT on Python's help texts, FishLeg beside AdamW; ARGS='--help' for its options
	$(BIN)/python -m benchmarks.train.train_gpt $(ARGS)

train-ddp: setup  ## train the deep autoencoder by two processes (gloo) beside one; ARGS='--help' for its options
	$(BIN)/python -m benchmarks.train.train_ddp $(ARGS)

convergence: setup  ## the study behind the defaults: optimizers, problems, learning rates, seeds (hours)
	$(BIN)/python -m benchmarks.study.convergence $(ARGS)

bench: setup  ## what a step costs beside AdamW and the published way (minutes); ARGS='--help' for its options
	$(BIN)/python -m benchmarks.cpu.step_time $(ARGS)

bench-ops: setup  ## every op on a CPU by pytest-benchmark, beside what torch's products and copies reach (a minute)
	$(BIN)/python -m benchmarks.cpu.micro_ops

bench-passes: setup  ## what the C++ backend for CPUs does, beside the reference
	$(BIN)/python -m benchmarks.cpu.passes $(ARGS)

bench-gpu:  ## on a GPU: check and time every kernel and whole steps, results to OUT; PYTHON is used as it is (9 minutes)
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(ARGS)

wallclock: setup  ## seconds until the other optimizers' training NLL (long)
	$(BIN)/python -m benchmarks.study.wallclock $(ARGS)

# The wheel is built from the sdist. An installation goes on without the extension; a wheel to give away may not.
wheel: | $(BIN)/python  ## build an sdist and a wheel into dist/ and check them
	$(BIN)/python -m pip install -c constraints.txt build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	@for wheel in dist/*.whl; do $(BIN)/python -m zipfile -l "$$wheel" | grep '/_native\..*\.so ' >/dev/null \
	  || { echo "$$wheel has no compiled extension: the build said why above" >&2; exit 1; }; done

clean:  ## remove builds and caches; rm -r .venv starts from nothing
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f fishleg_fast/*.so $(NO_EXTENSION) $(INSTALLED)
	find fishleg_fast kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
