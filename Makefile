# Every target sets up what it needs, the first time, on a machine with git,
# make and some python3; see tools/venv.sh.

# Tests and the demo run on the CPU unless told otherwise.
export JAX_PLATFORMS ?= cpu
# libtpu compiles for TPUs without looking for one, in several processes.
export TPU_SKIP_MDS_QUERY ?= 1
export ALLOW_MULTIPLE_LIBTPU_LOAD ?= 1
export TF_CPP_MIN_LOG_LEVEL ?= 2

PYTHON := .venv/bin/python
INSTALL := sh tools/venv.sh '3.12 3.13' .venv --constraint constraints.txt --editable
# An environment is made again when one of these changes.
MADE_FROM := setup.py pyproject.toml constraints.txt tools/venv.sh

.PHONY: help setup demo test test-full notebooks gpu goldens format clean

help:
	@echo 'make demo       train a small long-context model here, and look at it'
	@echo 'make setup      the environment for working on longjax, in .venv'
	@echo 'make test       formatting, lint, all tests'
	@echo 'make test-full  the same with the whole option grid'
	@echo 'make notebooks  run the notebooks, and write them with what they show'
	@echo 'make gpu        on a Hopper GPU: kernels checked, then timed'
	@echo 'make goldens    write tests/goldens again with PyTorch'
	@echo 'make format     format the code and mend what lint can'
	@echo 'make clean      remove environments, caches, builds (runs/ stays)'

setup: .venv/.made-test

demo: .venv/.made-demo
	$(PYTHON) -m experiments.main --config=configs/demo.py --workdir=runs/demo

# A process for each core: most of a test is compiling. A file's tests stay
# together, since they share what was compiled; and files keep their order, of
# which tests/conftest.py puts the longest first.
PYTEST := $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test: lint
	$(PYTEST)

test-full: lint
	$(PYTEST) -m ''

.PHONY: lint
lint: .venv/.made-test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

# One of them: .venv/bin/python tools/notebooks.py 01_patterns
notebooks: setup
	$(PYTHON) tools/notebooks.py

# Needs no environment of ours: any python3 with jax[cuda13] will do.
gpu:
	sh experiments/benchmarks/gpu.sh

goldens: .venv-goldens/.made
	.venv-goldens/bin/python tests/goldens/make_goldens.py

format: .venv/.made-test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean:
	rm -rf .venv .venv-goldens .uv build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find longjax configs experiments tests -name __pycache__ -prune \
	  -exec rm -rf {} +

# The demo needs a third of what the tests do: no compilers for GPU and TPU.
.venv/.made-demo: $(MADE_FROM)
	$(INSTALL) '.[data]'
	@touch $@

.venv/.made-test: $(MADE_FROM)
	$(INSTALL) '.[data,test]'
	@touch $@

.venv-goldens/.made: tools/venv.sh Makefile
	sh tools/venv.sh 3.11 .venv-goldens \
	  torch==2.13.0 transformers==5.23.0 numpy
	@touch $@
