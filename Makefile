PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
# One test process for each core, at most four; each keeps to one thread so that they do not fight over cores.
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); [ $$n -gt 4 ] && echo 4 || echo $$n)

.PHONY: help install test test-lowest test-newest test-slow reliability test-gpu lint demo bench schemas docs clean

help:
	@echo "make demo       train, prune, export and report on a small real data set; results in runs/demo"
	@echo "make test       linter, types and tests"
	@echo "make test-lowest  the tests on the lowest versions that pyproject.toml allows; PYTHON=python3.10 or python3.11"
	@echo "make test-newest  the tests on what pip resolves today; both in an environment of their own, removed at the end"
	@echo "make test-slow  the tests that take minutes"
	@echo "make reliability  the fuzzers and the kill test in full; writes their counts into docs/reliability.md"
	@echo "make test-gpu   the tests that need a GPU, skipped without one; DEVICE=cpu for a small dry run of them"
	@echo "make bench      every benchmark of docs/benchmarks.md, on the CPU; DATA=FOLDER for those with CIFAR-10"
	@echo "make docs       the site of docs/, in site/"
	@echo "make schemas    write the JSON schemas in configs/ anew, after a change of the config"
	@echo "make clean      remove the virtual environment, caches and build products (runs/ stays)"

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]'
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

test-lowest test-newest:
	$(PYTHON) scripts/test_versions.py $(@:test-%=%) -q -n $(JOBS)

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

reliability: $(READY)
	$(BIN)/python scripts/reliability.py

test-gpu: $(READY)
	$(BIN)/python -m pytest -q tests/gpu $(if $(DEVICE),--device $(DEVICE))

demo: $(READY)
	$(BIN)/pat demo

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_all.py $(if $(DATA),--data $(DATA))

docs: $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

schemas: $(READY)
	for kind in experiment pruning; do $(BIN)/pat schema $$kind > configs/$$kind.schema.json || exit 1; done

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
