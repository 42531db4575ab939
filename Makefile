# Each target makes the virtual environment it needs; a second call finds it ready.
#   make test VENV=/some/where    to use another environment
#   make test PYTHON=python3.13   to make it with another Python
#   make bench DEVICE=cuda        to measure on a GPU

VENV ?= .venv

# The first of these that is there and new enough.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

DEVICE ?= cpu

RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt

# For timing: a heap that keeps what is freed. glibc gives large blocks back to the system, and to
# fault them in again takes longer than to fill them. It reads this when a process starts.
TUNABLES := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296
HEAP := GLIBC_TUNABLES=$(TUNABLES):glibc.malloc.top_pad=268435456

.PHONY: help demo test lint docs coverage bench clean

help:
	@echo "make demo   fine-tune a pretrained network on docked poses"
	@echo "make test   run the tests"
	@echo "make lint   check format, style and types"
	@echo "make docs   build the documentation as a site, docs/_build/index.html"
	@echo "make coverage  print which of torch's operators are followed, and at what cost"
	@echo "make bench  measure posegrad beside its peers"
	@echo "make clean  remove caches and outputs, not the environment"

demo: $(VENV)/.demo-ready
	$(RUN) -m examples.docked_poses

test: $(VENV)/.test-ready
	$(RUN) -m pytest -q -n auto

lint: $(VENV)/.lint-ready
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

docs: $(VENV)/.docs-ready
	$(RUN) -m sphinx -W --keep-going -n docs docs/_build

coverage: $(VENV)/.test-ready
	$(RUN) -m tests.operators

bench: $(VENV)/.bench-ready
	$(RUN) -m benchmarks --suite multipose --device $(DEVICE)
	$(RUN) -m benchmarks --suite docked --device $(DEVICE)
	$(RUN) -m benchmarks --suite scaling --device $(DEVICE) --rounds 1
	$(if $(filter cpu,$(DEVICE)),$(RUN) -m benchmarks --suite processes --rounds 7)
	for suite in gramian rows clipping bags overhead forms rules \
	    $(if $(filter cpu,$(DEVICE)),ordinary published operator); do \
	  $(HEAP) $(RUN) -m benchmarks --suite $$suite --device $(DEVICE) --rounds 5 || exit 1; done
	$(RUN) -m benchmarks.report

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dist docs/_build
	rm -rf examples/docked_poses/out examples/bags/out examples/private/out
	find . -name __pycache__ -type d -not -path './.*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(if $(PYTHON),,$(error No Python of 3.11 or later found. Name one: make test PYTHON=...))
	$(PYTHON) -m venv $(VENV)

# torch first: it is most of the download, and shows its progress alone.
$(VENV)/.test-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch
	$(INSTALL) -e '.[test]'
	@touch $@

$(VENV)/.lint-ready: $(VENV)/.test-ready
	$(INSTALL) -e '.[lint]'
	@touch $@

$(VENV)/.docs-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) torch
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.bench-ready: $(VENV)/.demo-ready
	$(INSTALL) -e '.[bench]'
	@touch $@

# pignet2 without its dependencies: it asks for PyMOL and older releases of torch and NumPy, none of
# which scoring a pose needs.
$(VENV)/.demo-ready: $(VENV)/.test-ready examples/docked_poses/requirements.txt
	$(INSTALL) -r examples/docked_poses/requirements.txt
	$(INSTALL) --no-deps pignet2
	@touch $@
