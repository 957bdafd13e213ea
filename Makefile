# Needs Python >= 3.11, make and a network for the first installation; nothing else.
PYTHON ?= python3
VENV := .venv
FLOOR := .venv-floor
TORCH_FLOOR := 2.6.0

.PHONY: help demo demo-full test test-floor lint clean

help:
	@echo "make demo       install into $(VENV) if needed, run the main job (3 minutes on 2 cores), write resect-demo/"
	@echo "make demo-full  the statistics of the README: 5-fold cross-validation (about 10 minutes)"
	@echo "make test       install if needed, run every test"
	@echo "make test-floor run the core's tests on torch $(TORCH_FLOOR), the oldest supported, in $(FLOOR)"
	@echo "make lint       formatting, lint and types"

demo: $(VENV)/.lab
	$(VENV)/bin/resect demo --out resect-demo

demo-full: $(VENV)/.lab
	$(VENV)/bin/resect demo --full --out resect-demo-full

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test-floor: $(FLOOR)/.core
	$(FLOOR)/bin/python -m pytest -m core tests/blocks tests/train tests/analyse tests/shrink

lint: $(VENV)/.dev
	$(VENV)/bin/ruff format --check src tests examples
	$(VENV)/bin/ruff check src tests examples
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(FLOOR) build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Resect needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1). Set another: make PYTHON=python3.12 demo"; exit 1; }
	@echo "Setting up $(VENV): downloads about 3 GB from the Python package index, most of it PyTorch and its"
	@echo "CUDA libraries (6 GB on disk, a few minutes). To use a smaller PyTorch, install it into $(VENV) first."
	$(PYTHON) -m venv $(VENV)

# The stamps make a second run install nothing; a changed pyproject.toml installs again.
$(VENV)/.lab: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[lab]"
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.lab

$(FLOOR)/.core: pyproject.toml
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH_FLOOR)" "safetensors==0.4.3" numpy pytest hypothesis
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
