# Everything runs in .venv, which is created on first use. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo examples test long docs matrix compat dist wheels kernels gpu measure bench lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/train.installed  ## convert a network, then train a ResNeXt on 4,000 real digits (3 minutes)
	$(BIN)/python examples/first_steps.py
	$(BIN)/python -m resnext train --overwrite
	$(BIN)/python -m resnext evaluate
	$(BIN)/python -m resnext predict runs/demo/samples/*.png
	@echo "look at runs/demo/curves.png, confusion.png and mistakes.png; then: . .venv/bin/activate; resnext --help"

examples: .venv/dev.installed  ## run the scripts in examples/ (1 minute)
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python tests/support/zoo.py $$script || exit 1; done

test: .venv/dev.installed  ## run the tests (5 minutes)
	$(BIN)/python -m pytest -q --numprocesses auto --dist worksteal --benchmark-disable

long: .venv/dev.installed  ## run the long tests: kernels in every type, every network of timm (8 minutes)
	$(BIN)/python -m pytest -q -m long --numprocesses auto --dist worksteal --benchmark-disable

docs: .venv/dev.installed  ## build the documentation in build/site (1 minute)
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --quiet
	@echo "open build/site/index.html, or run $(BIN)/mkdocs serve"

matrix: .venv/dev.installed .venv/triton-3.6  ## compile every kernel for five GPUs with two Tritons; write the tables (15 minutes)
	$(BIN)/python -m benchmarks.matrix --triton .venv/triton-3.6

compat: .venv/dev.installed  ## test the oldest and the newest supported torch and Triton (7 minutes, 1.5 GB of downloads)
	$(BIN)/python tests/project/compat.py .venv/compat

dist: .venv/dev.installed  ## build the wheel and the source distribution into dist/ and check them (half a minute)
	rm -rf dist
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

wheels: dist  ## test the wheel on each of Python 3.11 to 3.13 that is on PATH (2 minutes and 1 GB of downloads each)
	$(BIN)/python tests/project/wheels.py dist .venv/wheels $(PYTHONS)

kernels: .venv/dev.installed  ## print registers, spills and instructions of every kernel, for five GPUs (2 minutes)
	$(BIN)/python -m gconv kernels

gpu: .venv/dev.installed  ## test the kernels on the GPU of this machine (minutes; resumable)
	$(BIN)/python tests/gpu/on_gpu.py --out runs/gpu.json

measure: .venv/dev.installed  ## tune and measure on the GPU of this machine (hours; resumable)
	GCONV_CACHE=gconv/kernels/measured $(BIN)/python -m gconv tune
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks networks
	$(BIN)/python -m benchmarks report

bench: .venv/dev.installed  ## time gconv next to F.conv2d, and write benchmarks/results/cpu/bench.json
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/cpu/bench.json
	$(BIN)/python -m benchmarks.stamps cpu/bench.json

lint: .venv/dev.installed  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gconv resnext

format: .venv/dev.installed  ## fix style and formatting where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and all caches, but keep runs/
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gconv needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/triton-3.6: | .venv/dev.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

.venv/train.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing gconv and what training needs into .venv (a minute or two)"
	$(PIP) --editable '.[train]'
	@touch $@

.venv/dev.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing gconv and what its tests need into .venv (a minute or two)"
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/train.installed
