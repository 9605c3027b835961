# Two commands do everything: `make profile` and `make test`. `make help` lists the rest.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TEST_ARGS ?= -m 'not slow'
FRAMEWORKS ?= torch jax scikit-learn onnx onnxscript onnxruntime

.PHONY: help setup profile test test-frameworks test-torchvision lint docs fuzz clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(INSTALLED) ## A virtual environment with the package and all that its tests need

# The stamp is newer than pyproject.toml once everything in it is installed, so a second run installs nothing.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" -m venv $(VENV); exit; \
		fi; \
	done; test -x $(BIN)/python || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

profile: $(INSTALLED) ## Time the operators on this machine's CPU; the record is saved in bench_results/local
	$(BIN)/dcn-bench profile

test: $(INSTALLED) ## All tests but the slow ones (TEST_ARGS='-m slow' runs those)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TEST_ARGS)

# Whoever needs a build of torch other than the package index's installs it into .venv first: it is kept.
$(VENV)/.frameworks: $(INSTALLED)
	$(BIN)/python -m pip install --quiet $(FRAMEWORKS) --editable '.[test,fake-gpu]'
	@touch $@

# The files whose tests are left out for want of a package say so in these words.
test-frameworks: $(VENV)/.frameworks ## Install PyTorch, JAX, scikit-learn, ONNX and CuPy, and run the tests that `make test` leaves out without them
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TEST_ARGS) $$(grep -l 'is not installed"' tests/test_*.py)

# torchvision works with the build of torch that it was made for alone, so neither goes into .venv.
$(VENV)-torchvision/.installed: $(INSTALLED)
	$(BIN)/python -m venv $(VENV)-torchvision
	$(VENV)-torchvision/bin/python -m pip install --quiet --editable . pytest torch torchvision
	@touch $@

test-torchvision: $(VENV)-torchvision/.installed ## PyTorch with torchvision in an environment of their own (6 GB): its detectors with our layers
	$(VENV)-torchvision/bin/python -m pytest tests/test_torchvision.py

$(VENV)/.linters: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

lint: $(VENV)/.linters ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.frameworks
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

# The reference is made from the docstrings, those of dcn_kernels.torch and dcn_kernels.jax too, so these must import.
docs: $(VENV)/.docs ## The documentation, in build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs build/docs
	@echo build/docs/index.html

# FUZZ_SEED: of the day, so that every night draws other calls; a failure prints the command that repeats it.
FUZZ_SECONDS ?= 3600
FUZZ_SEED ?= $(shell date +%Y%m%d)

fuzz: $(INSTALLED) ## An hour of drawn calls on the CPU, for the night: half of it with guard pages (FUZZ_SECONDS=3600)
	$(BIN)/dcn-check fuzz --seed $(FUZZ_SEED) --seconds $$(( $(FUZZ_SECONDS) / 2 ))
	$(BIN)/dcn-check fuzz --seed $(FUZZ_SEED) --seconds $$(( $(FUZZ_SECONDS) / 2 )) --guard

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) $(VENV)-torchvision build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

-include gpu.mk
